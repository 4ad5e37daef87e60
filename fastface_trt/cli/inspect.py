"""`inspect`: read a manifest, an engine, or a picture's parameters."""

import json
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fastface_trt.engines.files import verify_files
from fastface_trt.engines.manifest import (
    ENGINE_MANIFEST,
    EXPORT_MANIFEST,
    EngineManifest,
    ExportManifest,
    LoraFused,
    ModuleSpec,
    read_manifest,
)
from fastface_trt.errors import ExportIncomplete
from fastface_trt.measure.tables import text_console
from fastface_trt.runtime.export_folder import Export, find_export
from fastface_trt.runtime.picture_file import FORMATS, read_parameters


@click.command()
@click.argument("what")
@click.option("--verify", is_flag=True, help="Check every file against its hash.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest or parameters as JSON.")
def inspect(what: str, verify: bool, as_json: bool) -> None:
    """Show WHAT: an export's folder (or mini), an engine's folder, or a picture."""
    out = text_console()
    path = find_export(what)
    if path.suffix.lower() in FORMATS:
        click.echo(json.dumps(read_parameters(path), indent=2))
    elif (path / ENGINE_MANIFEST).is_file():
        engine = read_manifest(path / ENGINE_MANIFEST, EngineManifest)
        if verify:
            verify_files(path, engine.files)
        if as_json:
            click.echo(engine.model_dump_json(indent=2))
        else:
            out.print(
                f"Engine {engine.key}\n{engine.backend} {engine.backend_version}, "
                f"options {engine.options}, hardware {engine.hardware}"
            )
            _show_module(out, engine.module)
    elif (path / EXPORT_MANIFEST).is_file():
        export = Export.open(path).manifest
        if verify:
            verify_files(path, export.files())
        if as_json:
            click.echo(export.model_dump_json(indent=2))
        else:
            _show_export(out, export)
    else:
        raise ExportIncomplete(
            f"{path} is neither an export, an engine nor a picture of this program.",
            f"An export has {EXPORT_MANIFEST}, an engine {ENGINE_MANIFEST}.",
        )
    if verify:
        out.print("Every file has its size and hash.")


def _show_export(out: Console, export: ExportManifest) -> None:
    random = ", random weights" if export.random_weights else ""
    out.print(
        f"Export of {export.checkpoint} with {export.adapter} ({export.adapter_kind}, "
        f"{export.image_token_count} tokens){random}: {export.precision} "
        f"(weights stored as {export.weight_storage}), {export.width}x{export.height}"
        f"{' only' if export.fixed_size else ''}, {export.steps} steps of "
        f"{export.scheduler['class']}{_network(export.scheduler)}, face model {export.face_model}"
    )
    if export.max_faces > 1:
        out.print(
            f"FaceID-Portrait: up to {export.max_faces} pictures of a person, "
            f"{export.tokens_per_face} tokens each"
        )
    if export.adapter_kind == "pulid":
        parser = "with a face parser" if export.face_parser else "without a face parser"
        out.print(
            f"PuLID: orthogonal {export.orthogonal}, {export.zero_tokens} zero tokens, {parser}"
        )
    for lora in export.loras:
        out.print(f"LoRA fused: {lora.role} at {lora.scale}")
    if export.quantization is not None:
        record = export.quantization
        kept = sum(len(names) for names in record.excluded.values())
        out.print(
            f"UNet in {record.format}: {len(record.layers)} layers, {kept} kept in fp16; "
            f"{record.tool} ({record.method}) on {record.calibration}"
        )
    table = Table(title="Sources")
    for heading in ("role", "location", "revision or hash", "licence"):
        table.add_column(heading, overflow="fold")
    for source in export.sources:
        identity = source.revision or (source.sha256 or "-")[:16]
        table.add_row(source.role, source.location, identity, source.licence)
    out.print(table)
    if export.loras:
        out.print(_loras(export.loras))
    for module in export.modules.values():
        _show_module(out, module)


def _loras(loras: tuple[LoraFused, ...]) -> Table:
    table = Table(title="LoRAs")
    for heading in ("role", "scale", "file", "what of it went where"):
        table.add_column(heading, overflow="fold")
    for lora in loras:
        parts = [
            f"{component}: {part.modules} modules"
            f" ({', '.join(f'{n} {kind}' for kind, n in part.kinds.items())}), {part.alphas} alphas"
            for component, part in lora.components.items()
        ]
        table.add_row(lora.role, f"{lora.scale:g}", lora.file or "-", "\n".join(parts) or "-")
    return table


def _network(scheduler: Mapping[str, Any]) -> str:
    """What the UNet predicts, and how it was trained where that is not the usual way."""
    zero = ", zero terminal SNR" if scheduler.get("rescale_betas_zero_snr") else ""
    return f" for {scheduler.get('prediction_type', 'epsilon')}{zero}"


def _show_module(out: Console, module: ModuleSpec) -> None:
    size = sum(f.bytes for f in module.files) / 2**20
    table = Table(title=f"{module.name} ({size:.1f} MB)", title_justify="left")
    for heading in ("", "name", "type", "shape"):
        table.add_column(heading)
    for way, tensors in (("in", module.inputs), ("out", module.outputs)):
        for tensor in tensors:
            table.add_row(way, tensor.name, tensor.dtype, " x ".join(map(str, tensor.shape)))
    out.print(table)
