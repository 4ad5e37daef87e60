"""Our settings as the string parameters of a `config.pbtxt`, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastface_trt.engines.manifest import first_problem
from fastface_trt.errors import InvalidRequest
from fastface_trt.serving.settings import Seconds, WorkerSettings


class TritonSettings(WorkerSettings):
    """Our parameters in `config.pbtxt`; paths are relative to the version's folder."""

    drain_seconds: Seconds = 30.0

    def to_parameters(self) -> dict[str, str]:
        """What differs from the defaults, as strings for `config.pbtxt`."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in values.items()
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], folder: Path) -> "TritonSettings":
        """The inverse of `to_parameters`, with paths below `folder`.

        Names in capitals are Triton's own. Raises `InvalidRequest` for a value that is not valid.
        """
        values: dict[str, Any] = {k: v for k, v in parameters.items() if not k.isupper()}
        try:
            if "engine_options" in values:
                values["engine_options"] = json.loads(values["engine_options"])
            settings = cls.model_validate(values)
        except (ValidationError, json.JSONDecodeError) as error:
            where, problem = (
                first_problem(error) if isinstance(error, ValidationError) else ("it", str(error))
            )
            raise InvalidRequest(
                f"The parameters of config.pbtxt are not valid at {where}: {problem}.",
                "Write the repository again: fastface-trt export-triton.",
            ) from None
        export = settings.export if settings.export == "mini" else str(folder / settings.export)
        cache = None if settings.cache is None else folder / settings.cache
        return settings.model_copy(update={"export": export, "cache": cache})
