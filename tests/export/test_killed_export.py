"""An export killed at any moment never looks finished, and the next one cleans up after it."""

import random
import signal
import subprocess
import sys
import time

import pytest

from fastface_trt.engines.files import verify_files
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest

EXPORT = """
import sys
from dataclasses import replace
from pathlib import Path
from fastface_trt.checkpoints import HubItem, find_checkpoint
from fastface_trt.export.exporter import run_export
from fastface_trt.export.options import ExportOptions
tiny, out = Path(sys.argv[1]), Path(sys.argv[2])
entry = replace(
    find_checkpoint("mini"),
    base=HubItem(str(tiny / "checkpoint")),
    adapter=HubItem(str(tiny / "adapter.safetensors")),
    image_encoder=HubItem(str(tiny / "image_encoder")),
    size=32,
)
run_export(ExportOptions(entry), out, lambda line: print(line, flush=True))
"""


@pytest.mark.long
def test_killed_exports_leave_nothing_that_looks_finished(tiny, tmp_path):
    target = tmp_path / "export"
    command = [sys.executable, "-c", EXPORT, str(tiny), str(target)]
    moments = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(1, 30))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():  # it had finished before the kill
            verify_files(target, read_manifest(target / EXPORT_MANIFEST, ExportManifest).files())
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    verify_files(target, read_manifest(target / EXPORT_MANIFEST, ExportManifest).files())
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
