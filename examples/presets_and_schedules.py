"""Every preset under the schedules of four checkpoints, side by side.

The mini model was trained for the schedule of `hyper`; the others run all the same.
"""

import sys
from pathlib import Path

from fastface_trt import FastFace
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.images import contact_sheet
from fastface_trt.runtime.presets import PRESETS

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
out.mkdir(parents=True, exist_ok=True)

rows = []
for checkpoint in ("hyper", "lightning", "lcm", "turbo"):
    with FastFace.load("mini", schedule_of=checkpoint) as fastface:
        prompt = "photo; person in a garden, smiling"
        requests = [fastface.request(prompt, preset=preset, steps=4, seed=7) for preset in PRESETS]
        result = fastface.generate(requests, [SAMPLE_FACES / "ada.png"] * len(requests))
    rows.append(result.images)
    print(f"{checkpoint}: {result.unet_samples} UNet samples in {result.seconds['unet']:.2f} s")

contact_sheet(rows, column_labels=PRESETS, cell=96).save(out / "presets_and_schedules.png")
