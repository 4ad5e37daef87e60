"""The module `guidance_step`: Eq. 3 to 5 and the scheduler's step as one small graph.

Between two UNet calls a GPU runs this instead of arithmetic on the host, so the latents stay where
they are. Everything that varies is an input, and every row has its own: requests with different
guidance, rescaling and schedulers share a call. `runtime/guidance.py` and `runtime/sampling.py`
hold the same arithmetic in numpy; names and layout of the inputs are in `engines/contract.py`.

Shape legend: R requests, G branches, B = R·G rows (requests-major), C latent channels, h × w latent
size, N = C·h·w.
"""

# The script decorator reads this source; its operators have no Python types.
# mypy: ignore-errors

from pathlib import Path

import onnx
from onnxscript import FLOAT, script
from onnxscript import opset20 as op

from fastface_trt.engines import contract
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import Dimension, ModuleSpec, TensorSpec

NAME = "guidance_step"

# TensorRT may run a float32 MatMul in TF32, with ten bits of mantissa: sums are written as
# Mul and ReduceSum, which stay float32 everywhere.


@script(default_opset=op)
def _graph(
    noise_prediction: FLOAT,
    latents: FLOAT,
    noise: FLOAT,
    coefficients: FLOAT,
    spread: FLOAT,
    rescale: FLOAT,
    step: FLOAT,
    input_scale: FLOAT,
):
    one = op.Constant(value_float=1.0)
    last = op.Constant(value_ints=[-1])
    axis_1 = op.Constant(value_ints=[1])
    to_rows = op.Concat(op.Shape(coefficients), last, axis=0)
    epsilon_RGN = op.Reshape(noise_prediction, to_rows)

    # The mean first, then the squares of what is left: one pass over squares would cancel. Only the
    # quotient of two deviations is needed, and from that their N − 1 is gone.
    centred_RGN = op.Sub(epsilon_RGN, op.ReduceMean(epsilon_RGN, last, keepdims=1))
    squares_RG = op.ReduceSum(op.Mul(centred_RGN, centred_RGN), last, keepdims=0)
    deviation_RG = op.Sqrt(squares_RG)
    spread_R1 = op.ReduceSum(op.Mul(spread, deviation_RG), last, keepdims=1)

    weighted_RGN = op.Mul(epsilon_RGN, op.Unsqueeze(coefficients, op.Constant(value_ints=[2])))
    sum_RN = op.ReduceSum(weighted_RGN, axis_1, keepdims=0)
    centred_RN = op.Sub(sum_RN, op.ReduceMean(sum_RN, last, keepdims=1))
    squares_R1 = op.ReduceSum(op.Mul(centred_RN, centred_RN), last, keepdims=1)
    own_R1 = op.Sqrt(squares_R1)

    # Where ε̂ is flat there is nothing to rescale; φ first, so that φ = 0 gives a factor of 1.
    flat_R1 = op.Equal(own_R1, op.Constant(value_float=0.0))
    phi_R1 = op.Unsqueeze(rescale, axis_1)
    pull_R1 = op.Div(op.Mul(phi_R1, spread_R1), op.Where(flat_R1, one, own_R1))
    factor_R1 = op.Where(flat_R1, one, op.Sub(op.Add(pull_R1, one), phi_R1))
    shape = op.Shape(latents)
    guided = op.Reshape(op.Mul(sum_RN, factor_R1), shape)

    over_pixels = op.Constant(value_ints=[2, 3])
    a_R1, b_R1, c_R1 = op.Split(step, num_outputs=3, axis=1)
    kept = op.Mul(op.Unsqueeze(a_R1, over_pixels), latents)
    moved = op.Mul(op.Unsqueeze(b_R1, over_pixels), guided)
    fresh = op.Mul(op.Unsqueeze(c_R1, over_pixels), noise)
    next_latents = op.Add(op.Add(kept, moved), fresh)
    scale = op.Unsqueeze(input_scale, op.Constant(value_ints=[1, 2, 3]))
    sample = op.Mul(scale, next_latents)
    return next_latents, guided, sample


def write_guidance_step(
    folder: Path, *, channels: int, latent_size: tuple[int, int], fixed_size: bool
) -> ModuleSpec:
    """Write `folder`/guidance_step/model.onnx and return its entry for the manifest.

    `latent_size` is (h, w), used where the export has a fixed size. It holds no weights and is
    float32 whatever the export's precision: the sums are what fp16 would spoil.
    """
    size: tuple[Dimension, Dimension] = latent_size if fixed_size else ("height", "width")
    picture: tuple[Dimension, ...] = ("requests", channels, *size)
    rows: tuple[Dimension, ...] = ("requests", "branches")
    inputs: dict[str, tuple[Dimension, ...]] = {
        contract.NOISE_PREDICTION: ("batch", channels, *size),
        contract.LATENTS: picture,
        contract.NOISE: picture,
        contract.COEFFICIENTS: rows,
        contract.SPREAD: rows,
        contract.RESCALE: ("requests",),
        contract.STEP: ("requests", 3),
        contract.INPUT_SCALE: ("requests",),
    }
    outputs = dict.fromkeys((contract.NEXT_LATENTS, contract.GUIDED, contract.SAMPLE), picture)
    model = _graph.to_model_proto(
        input_types=[FLOAT[shape] for shape in inputs.values()],
        output_types=[FLOAT[shape] for shape in outputs.values()],
    )
    model.graph.name = NAME
    target = folder / NAME / "model.onnx"
    target.parent.mkdir(parents=True)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)

    def specs(tensors: dict[str, tuple[Dimension, ...]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=n, dtype="float32", shape=s) for n, s in tensors.items())

    return ModuleSpec(
        name=NAME,
        inputs=specs(inputs),
        outputs=specs(outputs),
        files=(describe_file(folder, target),),
    )
