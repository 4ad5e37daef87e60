"""`export`: from a checkpoint and an adapter to a folder of ONNX modules."""

from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import click
from rich.text import Text

from fastface_trt.cli.common import FILE, FOLDER, console, licence_option, timed_lines
from fastface_trt.engines.manifest import MAX_FACES, AdapterKind
from fastface_trt.errors import (
    InvalidRequest,
    LicenceNotAcknowledged,
    MissingDependency,
    install_hint,
)
from fastface_trt.measure.memory import GB, peak_bytes


@click.command()
@click.argument("out", type=FOLDER, required=False)
@click.option(
    "--checkpoint",
    default="hyper",
    show_default=True,
    help="hyper, lightning, lcm, turbo, base or mini.",
)
@click.option("--steps", type=int, help="Steps that the checkpoint is exported for.")
@click.option("--base", help="Other base weights: diffusers folder, single file, or hub id[@rev].")
@click.option(
    "--base-is-distilled/--base-is-not-distilled",
    default=None,
    help="Whether --base was distilled already: then no distillation LoRA is fused into it.",
)
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction"]),
    help="What the base predicts, where it does not say so itself.",
)
@click.option(
    "--zero-snr/--no-zero-snr",
    default=None,
    help="Whether it was trained with zero terminal SNR, where it does not say so itself.",
)
@click.option(
    "--adapter",
    help="faceid-plus-v2, faceid, faceid-portrait, faceid-portrait-unnorm, pulid, a file of one "
    "(.bin or .safetensors), or hub id/path.",
)
@click.option(
    "--base-text", help="Text encoders and tokenizers that --base lacks: folder or hub id."
)
@click.option("--image-encoder", help="Vision model of the adapter: folder, one file, or hub id.")
@click.option("--vae", help="Another VAE: folder, one file, or hub id.")
@click.option("--tiny-vae", is_flag=True, help="Use TAESDXL.")
@click.option(
    "--lora-scale",
    default=1.0,
    show_default=True,
    type=float,
    help="Scale of the adapter's LoRA; it is fused, so another value is another export.",
)
@click.option(
    "--adapter-kind",
    type=click.Choice(get_args(AdapterKind)),
    help="What kind the adapter's file is of, where its keys and name do not tell.",
)
@click.option(
    "--max-faces",
    type=int,
    help=f"Pictures of one person that a FaceID-Portrait export takes [{MAX_FACES}].",
)
@click.option(
    "--orthogonal",
    type=click.Choice(["off", "v1", "v2"]),
    help="How PuLID frees its attention from what the text says [v2].",
)
@click.option(
    "--zero-tokens",
    type=int,
    help="Zero tokens of PuLID: more are easier to edit and less alike [20; 8 for version 1].",
)
@click.option("--face-parser", type=FILE, help="ONNX face parser (BiSeNet, 19 classes) for PuLID.")
@click.option("--lora", "loras", multiple=True, help="LoRA to fuse: FILE[=SCALE] (repeatable).")
@click.option("--distillation-lora", help="Another distillation LoRA: file or hub id/path.")
@click.option("--distillation-lora-scale", type=float, help="Scale of the distillation LoRA.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "fp8", "int8"]),
    default="fp32",
    show_default=True,
    help="What the modules compute in; fp8 and int8: the UNet, the rest in fp16.",
)
@click.option("--fp16", is_flag=True, help="Short for --precision fp16.")
@click.option(
    "--weight-storage",
    type=click.Choice(["fp32", "fp16"]),
    help="What the files hold: fp16 halves an fp32 export.",
)
@click.option(
    "--quantize-attention",
    is_flag=True,
    help="With fp8: q, k, v and softmax of the UNet's self and text attention in fp8 as well.",
)
@click.option(
    "--quantize-vae",
    type=click.Choice(["fp8", "int8"]),
    help="The VAE's convolutions in 8 bits, but the first, the last and shortcuts.",
)
@click.option(
    "--attention-operator",
    type=click.Choice(["spelled", "onnx"]),
    default="spelled",
    show_default=True,
    help="onnx: the UNet's attention as ONNX Attention (opset 23), to compare on a card.",
)
@click.option(
    "--group-norm",
    type=click.Choice(["spelled", "onnx"]),
    default="spelled",
    show_default=True,
    help="onnx: group norms as ONNX GroupNormalization (opset 21), to compare on a card.",
)
@click.option("--height", type=int, help="Picture height in pixels.")
@click.option("--width", type=int, help="Picture width in pixels.")
@click.option("--fixed-size", is_flag=True, help="Export for this size only.")
@click.option(
    "--calibration-prompts",
    type=FILE,
    help="Text file, one prompt a line, that 8 bits are calibrated on [the mini model's].",
)
@click.option(
    "--calibration-faces",
    type=FOLDER,
    help="Folder of photographs of faces for it [for the mini model: its drawn people].",
)
@click.option(
    "--calibration-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Pictures that the calibration makes.",
)
@click.option(
    "--random-weights",
    is_flag=True,
    help="Full-size SDXL with random weights, without downloads: for latency work.",
)
@licence_option
def export(
    out: Path | None,
    checkpoint: str,
    fp16: bool,
    accept_licence: bool,
    calibration_prompts: Path | None,
    calibration_faces: Path | None,
    calibration_size: int,
    **options: Any,
) -> None:
    """Write an SDXL checkpoint with a face adapter as ONNX modules to folder OUT.

    OUT defaults to exports/CHECKPOINT-PRECISION. Downloads go through the hub client, so HF_HOME,
    HF_HUB_OFFLINE and tokens apply. The FaceID adapter is for non-commercial research: say
    --accept-licence once you have read its terms.
    """
    try:
        from fastface_trt.checkpoints import ADAPTERS, find_checkpoint
        from fastface_trt.export.exporter import run_export
        from fastface_trt.export.locations import parse_adapter, parse_item, parse_scaled_item
        from fastface_trt.export.options import ExportOptions, LoraFile
        from fastface_trt.export.precision import QUANTIZED_FORMATS
        from fastface_trt.export.quantization.calibration import (
            PipelineCalibration,
            RandomCalibration,
            default_faces,
            default_prompts,
            find_faces,
            read_prompts,
        )
        from fastface_trt.export.sources import quiet_libraries
    except ImportError as error:
        raise MissingDependency(
            f"Exporting needs {error.name}.", f"Install it with: {install_hint('export')}"
        ) from None
    quiet_libraries()
    entry = find_checkpoint(checkpoint)
    if fp16:
        options["precision"] = "fp16"
    for name in ("base", "base_text", "adapter", "image_encoder", "vae", "distillation_lora"):
        parse = parse_adapter if name == "adapter" else parse_item
        options[name] = parse(options[name]) if options[name] else None
    options["loras"] = tuple(LoraFile(*parse_scaled_item(text)) for text in options["loras"])
    options["faceid_lora_scale"] = options.pop("lora_scale")
    # A file of one's own says no licence: it is asked for as the published one is.
    adapter = next((a for a in ADAPTERS.values() if a == options["adapter"]), entry.adapter)
    base = options["base"] or entry.base
    restricted = [item for item in (adapter, base) if "non-commercial" in item.licence]
    if restricted and not options["random_weights"] and not accept_licence:
        raise LicenceNotAcknowledged(
            f"Checkpoint {checkpoint} uses weights with restricted licences ("
            + "; ".join(f"{item.location}: {item.licence}" for item in restricted)
            + ").",
            "Read their licences, then add --accept-licence.",
        )
    if options["precision"] not in QUANTIZED_FORMATS and not options["quantize_vae"]:
        if calibration_prompts or calibration_faces:
            raise InvalidRequest(
                f"--precision {options['precision']} is not calibrated.",
                "Leave out --calibration-prompts and --calibration-faces, or add --precision fp8.",
            )
    elif options["random_weights"]:
        options["calibration"] = RandomCalibration()
    else:
        if calibration_faces is None and checkpoint != "mini":
            raise InvalidRequest(
                "8 bits are calibrated on faces, and the drawn ones of the mini model do not suit "
                f"{checkpoint}.",
                "Give a folder with photographs: --calibration-faces FOLDER.",
            )
        options["calibration"] = PipelineCalibration(
            read_prompts(calibration_prompts) if calibration_prompts else default_prompts(),
            find_faces(calibration_faces) if calibration_faces else default_faces(),
            pictures=calibration_size,
            licence_acknowledged=accept_licence,
        )
    chosen = ExportOptions(checkpoint=entry, **options)
    kind = f"random-{chosen.precision}" if chosen.random_weights else chosen.precision
    target = out or Path("exports") / f"{checkpoint}-{kind}"
    screen = console()
    line = timed_lines(screen)
    started = perf_counter()
    # A full-size UNet takes minutes in one phase: the spinner shows that it is alive.
    with screen.status(Text("starting")) as status:

        def progress(text: str) -> None:
            line(text)
            status.update(Text(text))

        manifest = run_export(chosen, target, progress)
    size = sum(f.bytes for f in manifest.files()) / 2**30
    line(
        f"{target}: {size:.2f} GB in {perf_counter() - started:.0f} s, "
        f"peak memory {peak_bytes() / GB:.1f} GB"
    )
    click.echo(str(target))
