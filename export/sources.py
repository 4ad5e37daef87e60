"""Weights on disk: hub snapshots, local folders and single files, loaded one component at a time.

Loading is lazy because a full-size export would not fit otherwise: each component is loaded,
exported and dropped before the next. The hub client's own settings (`HF_HOME`, `HF_HUB_OFFLINE`,
tokens) apply.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastface_trt.checkpoints import ADAPTERS, HubItem
from fastface_trt.engines.files import sha256_file
from fastface_trt.engines.manifest import Source
from fastface_trt.errors import FastFaceError, WeightsError
from fastface_trt.export.precision import Model

_CONFIG_PATTERNS = ["*.json", "*.txt", "tokenizer/*", "tokenizer_2/*"]
_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@contextmanager
def weights_errors(what: str) -> Iterator[None]:
    """Turn whatever a loader raises into one `WeightsError` that names `what`."""
    try:
        yield
    except FastFaceError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{what} could not be loaded: {reason[:300]}",
            "Check the path or name, that the files are complete, and that you accepted the "
            "licence on the hub; offline, the files must be in the hub cache already.",
        ) from error


@dataclass(frozen=True)
class Located:
    """A hub item or path as a local path, with its record for the manifest."""

    path: Path
    source: Source


def sha256_folder(folder: Path) -> str:
    """One SHA-256 for a folder: over the relative names and the SHA-256 of all its files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def locate(item: HubItem, role: str, *, patterns: list[str] | None = None) -> Located:
    """Find an item on disk, downloading it when it is a hub id; raise `WeightsError` when absent.

    A location that exists as a path, or looks like one, is local; otherwise it is a hub id, with an
    optional `@revision`.
    """
    local = Path(item.location).expanduser()
    if local.exists():
        path = local / item.path if item.path else local
        digest = sha256_file(path) if path.is_file() else sha256_folder(path)
        return Located(
            path, Source(role=role, location=local.name, sha256=digest, licence=item.licence)
        )
    repository, _, revision = item.location.partition("@")
    if local.is_absolute() or repository.count("/") != 1 or repository.startswith("."):
        raise WeightsError(f"There is no {local} ({role}).", "Check the path.")
    from huggingface_hub import hf_hub_download, snapshot_download

    wanted = revision or item.revision
    with weights_errors(f"{repository} ({role})"):
        if item.path and "." in Path(item.path).name:
            path = Path(hf_hub_download(repository, item.path, revision=wanted))
            root = path
            for _ in Path(item.path).parts:
                root = root.parent
        else:
            allow = [f"{item.path}/*"] if item.path else patterns
            root = Path(snapshot_download(repository, revision=wanted, allow_patterns=allow))
            path = root / item.path if item.path else root
    # The cache names a snapshot's folder by its commit, which is the exact revision.
    return Located(
        path,
        Source(role=role, location=repository, revision=root.name, licence=item.licence),
    )


def parse_item(text: str, licence: str = "unknown") -> HubItem:
    """A path, a hub id, `id@revision`, or `id/path/to/file` as given on the command line."""
    if Path(text).expanduser().exists() or text.count("/") <= 1 or text.startswith((".", "/", "~")):
        return HubItem(text, licence=licence)
    name, _, revision = text.partition("@")
    owner, repository, path = name.split("/", 2)
    return HubItem(f"{owner}/{repository}", revision or None, path, licence)


def parse_scaled_item(text: str) -> tuple[HubItem, float]:
    """What `parse_item` reads, with `=SCALE` behind it or at scale 1."""
    name, _, scale = text.rpartition("=")
    try:
        if name and not Path(text).expanduser().exists():
            return parse_item(name), float(scale)
    except ValueError:
        pass
    return parse_item(text), 1.0


def parse_adapter(text: str) -> HubItem:
    """The name of a published adapter (`checkpoints.ADAPTERS`), or what `parse_item` reads."""
    named = next((item for name, item in ADAPTERS.items() if name == text), None)
    return parse_item(text) if named is None or Path(text).exists() else named


class CheckpointSource:
    """Components of one SDXL checkpoint: a diffusers folder, a hub id, or a single file."""

    def __init__(self, item: HubItem, dtype: torch.dtype, config: HubItem) -> None:
        single = Path(item.location).expanduser()
        self.single_file = single if single.is_file() else None
        self.dtype = dtype
        if self.single_file:
            self.located = locate(item, "checkpoint")
            # A single file has no configuration; SDXL's own is a few kilobytes of the base model.
            self.folder = locate(config, "configuration", patterns=_CONFIG_PATTERNS).path
        else:
            variant = ".fp16" if dtype == torch.float16 else ""
            weights = [f"{c}/*{variant}.safetensors" for c in _COMPONENTS]
            self.located = locate(
                item, "checkpoint", patterns=[*_CONFIG_PATTERNS, "*/*.json", *weights]
            )
            self.folder = self.located.path
        self._text_encoders: dict[str, Model] | None = None

    def _load(self, cls: Any, component: str) -> Model:
        with weights_errors(f"{component} of {self.located.source.location}"):
            if self.single_file:
                return self._load_from_single_file(self.single_file, cls, component).eval()
            folder = self.folder / component
            if not folder.is_dir():
                raise WeightsError(
                    f"{self.folder} has no folder {component}.",
                    "An SDXL checkpoint in diffusers' layout has unet, vae, text_encoder, "
                    "text_encoder_2, tokenizer and tokenizer_2.",
                )
            has_variant = any(folder.glob("*.fp16.safetensors"))
            variant = "fp16" if self.dtype == torch.float16 and has_variant else None
            of_transformers = cls.__module__.startswith("transformers")
            options = {"dtype" if of_transformers else "torch_dtype": self.dtype}
            return cls.from_pretrained(
                str(folder), variant=variant, use_safetensors=True, **options
            ).eval()

    def _load_from_single_file(self, file: Path, cls: Any, component: str) -> Model:
        if component in ("unet", "vae"):
            return cls.from_single_file(
                str(file), config=str(self.folder), subfolder=component, torch_dtype=self.dtype
            )
        if self._text_encoders is None:
            from diffusers import StableDiffusionXLPipeline

            # Only the pipeline knows how to convert text encoders; spare it the rest.
            pipeline = StableDiffusionXLPipeline.from_single_file(
                str(file), config=str(self.folder), unet=None, vae=None, torch_dtype=self.dtype
            )
            self._text_encoders = {
                "text_encoder": pipeline.text_encoder,
                "text_encoder_2": pipeline.text_encoder_2,
            }
        return self._text_encoders[component]

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of `unet`, `vae`, `text_encoder`, `text_encoder_2` or `scheduler`."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        file = self.folder / component / name
        with weights_errors(f"{component} of {self.located.source.location}"):
            return dict(json.loads(file.read_text(encoding="utf-8")))

    def skeleton(self, component: str) -> Model:
        """The component as its configuration describes it, on torch's meta device: names and
        shapes of its weights without their values, to check files against before loading."""
        cls, config = _class_of(component), self.config(component)
        with torch.device("meta"), weights_errors(f"{component} of {self.located.source.location}"):
            if cls.__module__.startswith("transformers"):
                return cls(cls.config_class.from_dict(config)).eval()
            return cls.from_config(config).eval()

    def component(self, name: str) -> Model:
        """`unet` (without an adapter), `vae`, `text_encoder` or `text_encoder_2`."""
        return self._load(_class_of(name), name)

    def tokenizer(self, name: str) -> Path:
        """The folder of `tokenizer` or `tokenizer_2`."""
        folder = self.folder / name
        if not folder.is_dir():
            raise WeightsError(f"{self.folder} has no folder {name}.", "Download it completely.")
        return folder

    def force_zeros_for_empty_prompt(self) -> bool:
        """Whether an empty negative prompt means zero embeddings (true for SDXL base)."""
        index = self.folder / "model_index.json"
        if not index.is_file():
            return True
        return bool(json.loads(index.read_text()).get("force_zeros_for_empty_prompt", True))


def _class_of(component: str) -> Any:
    import diffusers
    import transformers

    return {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }[component]


def load_unet_folder(folder: Path) -> Model:
    """A UNet from its diffusers folder, in float32."""
    from diffusers import UNet2DConditionModel

    with weights_errors(f"UNet {folder}"):
        unet = UNet2DConditionModel.from_pretrained(str(folder), torch_dtype=torch.float32)
    return unet.eval()


def load_vae(item: HubItem, dtype: torch.dtype) -> tuple[Model, Source]:
    """A VAE of its own: AutoencoderKL or the tiny one, by the class that its config names."""
    import diffusers

    located = locate(item, "vae", patterns=["*.json", "*.safetensors"])
    with weights_errors(f"VAE {item.location}"):
        name = json.loads((located.path / "config.json").read_text())["_class_name"]
        if name not in ("AutoencoderKL", "AutoencoderTiny"):
            raise WeightsError(f"{name} is not a VAE that SDXL latents fit.", "Use SDXL's.")
        vae = getattr(diffusers, name).from_pretrained(str(located.path), torch_dtype=dtype)
    return vae.eval(), located.source


def load_image_encoder(folder: Path, dtype: torch.dtype) -> Model:
    """The CLIP vision model that the adapter was trained with."""
    from transformers import CLIPVisionModelWithProjection

    with weights_errors(f"image encoder {folder}"):
        encoder = CLIPVisionModelWithProjection.from_pretrained(str(folder), dtype=dtype)
    return encoder.eval()


def load_unet_weights(unet: Model, item: HubItem) -> Source:
    """Replace a UNet's weights by those of a file (Lightning ships its UNets this way)."""
    from fastface_trt.export.weight_files import open_weights

    located = locate(item, "unet")
    with weights_errors(f"UNet weights {located.path.name}"):
        unet.load_state_dict(open_weights(located.path).read())
    return located.source


def quiet_libraries() -> None:
    """Switch off progress bars and notices of diffusers, transformers and the hub client's loader.

    For commands only: it changes the libraries' own settings for the whole process.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
