"""The type of models that come from diffusers and transformers."""

from typing import Any, TypeAlias

Model: TypeAlias = Any
"""A diffusers or transformers module. Their attributes are made at run time from a configuration,
so a type checker knows none of them; naming the type says at least what is meant."""
