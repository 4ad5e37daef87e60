"""The probe of a module: seeded inputs and what the PyTorch module makes of them, in one file.

An engine is compared with it after a refit (`fastface_trt.engines.probe`). It is as small as the
module allows: the UNet with two requests of one branch, the others with one row, at the smallest
latent size, so a full-size UNet's file stays below 1 MB in fp16. A weight that is wrong shows at
any size. A module of one fixed size that is a large one has no probe: PyTorch on a CPU would take
longer for it than for the whole export.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastface_trt.engines import contract
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import Dimension, Probe
from fastface_trt.engines.probe import INPUT, OUTPUT, PROBE_FILE
from fastface_trt.errors import WeightsError
from fastface_trt.export.modules import ModuleExport
from fastface_trt.export.onnx_writer import MODEL_FILE

PROBE_REQUESTS: Final = 2
TOLERANCES: Final = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 3e-2, "fp8": 5e-2, "int8": 5e-2}
"""Relative L2 error that is put down to the type that weights are stored or computed in. With 8-bit
codes a value near the middle of two may fall to either side on another backend."""

_SEED: Final = 20
_LATENT: Final = 8
_LATENT_POSITIONS: Final = 32 * 32

_MANIPULATION: Final = {
    "scale": 1.1,
    "power": 1.2,
    "quantile": 0.65,
    "sharpness": 5.0,
    "adain_weight": 0.8,
    "invert_first_token": 1.0,
    "upper_bound": 10.0,
}
"""Values that change the result in every term of Eq. 7 to 10."""


def write_probe(export: ModuleExport, folder: Path, precision: str) -> Probe | None:
    """Write `folder`/NAME/probe.safetensors, running the module once as it was exported.

    Returns None without running anything for latents of a fixed size beyond 32 × 32. `precision`
    is the coarser of those that weights are stored and computed in. Raises `WeightsError` where
    the module overflows. Of a quantised module the
    written graph runs, by ONNX Runtime: the PyTorch module is not quantised.
    """
    sizes = _sizes(export)
    latents = next((s for n, s in export.shapes.items() if n in (contract.SAMPLE, "latents")), ())
    if math.prod(_size(of, sizes) for of in latents[2:]) > _LATENT_POSITIONS:
        return None
    inputs = _inputs(export, sizes)
    if export.quantization is None:
        with torch.no_grad(), _watched(export.module) as layers:
            results = export.module.eval()(**inputs)
        results = results if isinstance(results, tuple) else (results,)
    else:
        results, layers = _run_graph(folder / export.name / MODEL_FILE, inputs), []
    _require_finite(export.name, precision, results, layers)
    outputs = dict(zip(export.outputs, results, strict=True))
    path = folder / export.name / PROBE_FILE
    tensors = {INPUT + k: v for k, v in inputs.items()} | {
        OUTPUT + k: v for k, v in outputs.items()
    }
    # Not save_file, which makes a file that only its owner can read.
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    return Probe(file=describe_file(folder, path), sizes=sizes, tolerance=TOLERANCES[precision])


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[str]]:
    """Names of layers in the order in which they return values that are not finite.

    The result need not tell: a clamp makes a number of an infinite value.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return look

    hooks = [
        layer.register_forward_hook(watch(name))
        for name, layer in module.named_modules()
        if not any(layer.children())
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _require_finite(
    name: str, precision: str, results: tuple[Tensor, ...], layers: list[str]
) -> None:
    """Raise `WeightsError` where a module overflows: its pictures would be black or noise."""
    if not layers and all(bool(torch.isfinite(result).all()) for result in results):
        return
    where = f", first in its layer {layers[0]}" if layers else ""
    vae = "Give a VAE that does not overflow (--vae madebyollin/sdxl-vae-fp16-fix), or export"
    hint = f"{vae if name == 'vae_decoder' else 'Export'} with --precision bf16 or fp32."
    if precision in ("fp32", "bf16"):
        hint = "Its weights may be damaged: download them again, or use others."
    raise WeightsError(f"{name} returns values that are not finite in {precision}{where}.", hint)


def _run_graph(model: Path, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    arrays = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return tuple(torch.from_numpy(array) for array in arrays)


def _sizes(export: ModuleExport) -> dict[str, int]:
    names = {
        size for name in export.inputs for size in export.shapes[name] if isinstance(size, str)
    }
    sizes = {}
    for name in names:
        if name in ("height", "width"):
            # Twice the multiple, or more: the exporter takes smaller ones for constants.
            sizes[name] = max(_LATENT, 2 * export.multiples.get(name, 1))
        elif name == "text":
            sizes[name] = contract.TEXT_POSITIONS
        else:
            # One row is what other modules run anyway: TensorRT has a profile for it.
            sizes[name] = PROBE_REQUESTS if "requests" in names else 1
    return sizes


def _inputs(export: ModuleExport, sizes: dict[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    inputs = {}
    for name, example in export.inputs.items():
        shape = tuple(_size(of, sizes) for of in export.shapes[name])
        inputs[name] = _values(name, example, shape, generator).to(example.dtype)
    return inputs


def _values(name: str, example: Tensor, shape: tuple[int, ...], generator: Any) -> Tensor:
    if name == contract.TIMESTEP:
        return torch.linspace(999, 249, shape[0])
    if name == contract.TIME_IDS:
        return torch.tensor([1024.0, 1024, 0, 0, 1024, 1024]).expand(shape)
    if name == contract.IP_ADAPTER_SCALE:
        return torch.linspace(0.4, 1.0, shape[0] * shape[1]).reshape(shape)
    if name == contract.MANIPULATION:
        return _manipulation(shape)
    if name == contract.TOKEN_MASK:
        # The last row has half of the tokens: a probe of one row too.
        mask = torch.zeros(shape)
        mask[-1, shape[1] // 2 :] = contract.MASKED
        return mask
    if not example.is_floating_point():
        # Token ids: random words in front of the example's end marks.
        ids = example[:1].expand(shape).clone()
        words = torch.randint(1, int(example.max()), shape, generator=generator)
        return torch.where(ids == 0, words, ids)
    return torch.randn(shape, generator=generator)


def _manipulation(shape: tuple[int, ...]) -> Tensor:
    """[R, parts, columns]: every kind in turn, so that each request and part has another one."""
    rows = torch.zeros(shape)
    for column, name in enumerate(contract.MANIPULATION_COLUMNS):
        for request in range(shape[0]):
            for part in range(shape[1]):
                kind = (request + part) % len(contract.KINDS)
                rows[request, part, column] = kind if name == "kind" else _MANIPULATION[name]
    return rows


def _size(of: Dimension, sizes: dict[str, int]) -> int:
    return of if isinstance(of, int) else sizes[of]
