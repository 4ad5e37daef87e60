"""The types that travel between export, engines and runtime: what a module is, and what a file is.

An export is a folder of ONNX modules with `manifest.json` beside them, an engine is a folder with
`engine.json`. Both manifests refuse unknown fields and file names that leave their folder, both are
written last, so a folder without one is unfinished by definition.
"""

import errno
import json
import os
import stat
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fastface_trt.engines.dtypes import DType as DType
from fastface_trt.errors import ExportIncomplete, ManifestError

MANIFEST_LIMIT: Final = 64 << 20
"""Bytes of a manifest at most: weight maps and layer lists of a UNet are some megabytes."""
SCHEMA_VERSION: Final = 1
EXPORT_MANIFEST = "manifest.json"
ENGINE_MANIFEST = "engine.json"

MODULE_NAMES = (
    "text_encoder",
    "text_encoder_2",
    "image_encoder",
    "face_projection",
    "unet",
    "guidance_step",
    "vae_decoder",
)

AdapterKind = Literal[
    "faceid-plus-v2", "faceid", "faceid-portrait", "faceid-portrait-unnorm", "pulid"
]
"""What an adapter takes of a face and how its attention adds to the text's: FaceID-Plus-v2 an
embedding and a picture, FaceID the embedding alone, FaceID-Portrait the embeddings of up to five
pictures of a person, of length 1 or as the recogniser gave them, PuLID an embedding and a picture,
with id tokens of its own."""

EMBEDDING_ALONE: Final = ("faceid", "faceid-portrait", "faceid-portrait-unnorm")
"""Kinds that look at no picture of a face, so that their exports have no image encoder."""

PORTRAIT: Final = ("faceid-portrait", "faceid-portrait-unnorm")
"""Kinds that take several pictures of one person."""

MAX_FACES: Final = 5
"""Pictures of a person that a FaceID-Portrait export takes unless it was asked for others."""

MOST_FACES: Final = 16
"""The most that it may be asked for: each picture costs 16 tokens in every decoupled block."""

Orthogonal = Literal["off", "v1", "v2"]
"""Which of PuLID's ways frees the id attention's result from what the text attention says."""

Dimension = int | str
"""A fixed size, or the name of a dynamic one: batch, requests, branches, and height and width in
latent pixels."""


def _stays_inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or PureWindowsPath(path).drive:
        raise ValueError(f"file name {path!r} leaves its folder")
    if not pure.parts or not path.isprintable():  # nothing but the folder, or null characters
        raise ValueError(f"{path!r} is not the name of a file")
    return path


RelativePath = Annotated[str, AfterValidator(_stays_inside)]
Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Frozen and closed: a field that this version does not know is an error, not a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(Strict):
    """One named input or output of a module."""

    name: str
    dtype: DType
    shape: tuple[Dimension, ...]


class FileEntry(Strict):
    """A file of this folder with its size in bytes and SHA-256 (hexadecimal)."""

    path: RelativePath
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Probe(Strict):
    """Inputs of a module and what the PyTorch module made of them, to compare an engine with.

    `file` is a safetensors file with tensors `input.NAME` and `output.NAME`, `sizes` gives the
    module's dynamic sizes in it, `tolerance` the relative L2 error that the precision explains.
    """

    file: FileEntry
    sizes: dict[str, Positive]
    tolerance: float = Field(gt=0, allow_inf_nan=False)


class ModuleSpec(Strict):
    """One ONNX module: `files[0]` is the graph, the others hold its external data.

    `probe` says nothing about the module that its files do not say, so it is no part of an engine's
    identity; exports of versions before it lack one.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: tuple[FileEntry, ...] = Field(min_length=1)
    probe: Probe | None = None

    def dtype_of(self, name: str) -> DType:
        """The element type of the input or output called `name`."""
        return next(t.dtype for t in (*self.inputs, *self.outputs) if t.name == name)


class Source(Strict):
    """Where weights came from: what was asked for, which revision, and under which licence."""

    role: str
    location: str
    revision: str | None = None
    sha256: str | None = None
    licence: str = "unknown"


LoraRole = Literal["distillation", "style", "faceid"]


class LoraPart(Strict):
    """What of a LoRA went into one component: modules by kind (lora, loha, lokr, difference, each
    with "dora-" before it where it has magnitudes), and how many had an alpha of their own."""

    modules: int = Field(ge=1)
    alphas: int = Field(default=0, ge=0)
    kinds: dict[str, int] = {}


class LoraFused(Strict):
    """A LoRA that was added to the weights before export, and by which factor.

    file: its name; tensors: how many it holds, all of which were used; components: where they went.
    role: "style" is what `--lora` gives, "faceid" the adapter's own.
    """

    role: LoraRole
    scale: float = Field(allow_inf_nan=False)
    location: str | None = None
    file: str | None = None
    sha256: str | None = None
    tensors: int | None = Field(default=None, ge=1)
    components: dict[str, LoraPart] = {}


class Quantization(Strict):
    """How a module came to compute in 8 bits: layers by PyTorch name, and what was kept and why.

    attention: the attentions whose products are in 8 bits too, q, k, v and softmax.
    """

    format: Literal["fp8", "int8"]
    method: str
    tool: str
    calibration: str
    calibration_rows: int = Field(ge=1)
    layers: tuple[str, ...]
    attention: tuple[str, ...] = ()
    excluded: dict[str, tuple[str, ...]] = {}


class ExportManifest(Strict):
    """Everything about an export that the runtime or a builder needs; see the module docstring.

    quantization: of the UNet; vae_quantization: of the VAE's decoder.
    orthogonal, zero_tokens: PuLID's trade between likeness and editing; the image tokens that are
    counted include the zero ones. attention_operator, group_norm: spelled out, or as ONNX's own
    operators of opset 23 and 21. face_model: a folder whose files are among the extra ones, or the
    name of an InsightFace pack. face_parser: the extra file, an ONNX graph, that finds the
    background around a face for PuLID. max_faces: pictures of one person that a request may have;
    each has as many of the `image_token_count` tokens, and where it is more than one a mask says
    which are there. image_*: side in pixels and normalisation of the image encoder's input, None
    where the adapter has no image encoder and the export no such module.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    checkpoint: str
    adapter: str
    adapter_kind: AdapterKind = "faceid-plus-v2"
    orthogonal: Orthogonal = "off"
    zero_tokens: int = Field(0, ge=0)
    face_parser: RelativePath | None = None
    precision: Literal["fp32", "fp16", "bf16", "fp8", "int8"]
    weight_storage: Literal["fp32", "fp16", "bf16"]
    quantization: Quantization | None = None
    vae_quantization: Quantization | None = None
    attention_operator: Literal["spelled", "onnx"] = "spelled"
    group_norm: Literal["spelled", "onnx"] = "spelled"
    modules: dict[str, ModuleSpec]
    extra_files: tuple[FileEntry, ...] = ()
    sources: tuple[Source, ...] = ()
    loras: tuple[LoraFused, ...] = ()
    scheduler: dict[str, Any]
    steps: Positive
    allowed_steps: tuple[Positive, ...]
    height: Positive
    width: Positive
    fixed_size: bool = False
    vae_scale_factor: Positive
    latent_channels: Positive
    image_token_count: Positive
    max_faces: Positive = 1
    image_encoder_size: Positive | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    force_zeros_for_empty_prompt: bool = True
    face_model: RelativePath
    random_weights: bool = False
    tool_versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _names_what_it_means(self) -> "ExportManifest":
        """Every file that is opened has an entry, and only one content."""
        hashes: dict[str, str] = {}
        for file in self.files():
            if hashes.setdefault(file.path, file.sha256) != file.sha256:
                raise ValueError(f"{file.path!r} has two contents")
        if self.face_parser is not None and self.face_parser not in hashes:
            raise ValueError(f"face_parser {self.face_parser!r} is not among the files")
        for name, module in self.modules.items():
            if module.name != name:
                raise ValueError(f"the module {name!r} is called {module.name!r}")
            graph = module.files[0].path
            if not graph.endswith(".onnx"):  # ONNX Runtime reads other formats by their endings
                raise ValueError(f"the graph of {name} is {graph!r}, no .onnx file")
        return self

    def latent_shape(
        self, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture; without `height` and `width` of the export's own.

        A side that `size_unit` does not divide is rounded down.
        """
        height, width = height or self.height, width or self.width
        factor = self.vae_scale_factor
        return self.latent_channels, height // factor, width // factor

    @property
    def tokens_per_face(self) -> int:
        """Image tokens of one picture of a person."""
        return self.image_token_count // self.max_faces

    @property
    def size_unit(self) -> int:
        """What divides the sides of pictures, in pixels: the UNet halves the latents twice."""
        return self.vae_scale_factor * 4

    def files(self) -> list[FileEntry]:
        """Every file of the export, modules' and others'."""
        modules = self.modules.values()
        probes = [module.probe.file for module in modules if module.probe is not None]
        return [f for m in modules for f in m.files] + probes + list(self.extra_files)


class BuildReport(Strict):
    """How a build went; it changes nothing about the engine.

    layers: of the parsed network. Peak bytes are of the building process: what it allocated, and
    that plus the pages of mapped files. built_on: the machine, its GPU and driver, where known.
    refitted_from: key of the engine whose weights were replaced to make this one.
    """

    layers: int | None = None
    peak_anonymous_bytes: int = 0
    peak_resident_bytes: int = 0
    warnings: tuple[str, ...] = ()
    built_on: dict[str, str] = {}
    refitted_from: str | None = None


class EngineManifest(Strict):
    """What one built engine is and what it was built from; `key` is its identity in the cache."""

    schema_version: Literal[1] = SCHEMA_VERSION
    key: str
    backend: str
    backend_version: str
    module: ModuleSpec
    options: dict[str, Any] = {}
    hardware: dict[str, str] = {}
    files: tuple[FileEntry, ...] = Field(min_length=1)
    build_seconds: float = Field(ge=0, allow_inf_nan=False)
    report: BuildReport = BuildReport()


def open_file(path: Path) -> FileIO:
    """`path` for reading, unbuffered, if it is an ordinary file.

    A pipe that nobody writes to, a device without end, a socket or a folder under the name of a
    file is an `OSError` at once; nothing waits for it.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not an ordinary file", str(path))
    return FileIO(handle, "r")


Manifest = TypeVar("Manifest", bound=Strict)


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Where the first thing that pydantic refused stands (dotted), and what is wrong with it."""
    first = error.errors()[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]


def read_manifest(path: Path, kind: type[Manifest]) -> Manifest:
    """Read and check a manifest file; raise `ManifestError` with the first thing that is wrong."""
    try:
        with open_file(path) as file:
            content = file.read(MANIFEST_LIMIT + 1)
        if len(content) > MANIFEST_LIMIT:
            raise ManifestError(f"{path} is larger than a manifest.", "Export or build it again.")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ExportIncomplete(
            f"{path.parent} has no {path.name}, so it is not a finished folder.",
            "Run the export or build again; it starts over safely.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"{path} cannot be read: {error}.", "Export or build it again."
        ) from None
    try:
        version = json.loads(text).get("schema_version")
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{path} has schema version {version!r:.40}; this program reads {SCHEMA_VERSION}.",
                "Export or build it again with this version.",
            )
        return kind.model_validate_json(text)
    except ValidationError as error:
        where, problem = first_problem(error)
        raise ManifestError(
            f"{path} is not valid at {where or 'the top'}: {problem}.", "Export or build it again."
        ) from None
    # ValueError: no JSON, or a number of thousands of digits. RecursionError: lists in lists.
    except (ValueError, AttributeError, RecursionError):
        raise ManifestError(f"{path} is not a manifest.", "Export or build it again.") from None
