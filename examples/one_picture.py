"""A face and a prompt in, a picture out; its file carries the parameters that made it."""

import sys
from pathlib import Path

import numpy as np

from fastface_trt import FastFace
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.picture_file import write_picture

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
out.mkdir(parents=True, exist_ok=True)

with FastFace.load("mini") as fastface:
    result = fastface(
        "photo; person in a garden, smiling", SAMPLE_FACES / "ada.png", preset="am1+dcg", seed=7
    )

write_picture(out / "ada.png", np.asarray(result.images[0]), parameters=result.parameters[0])
print(f"{out / 'ada.png'}: {result.unet_samples} UNet samples, {result.seconds['total']:.2f} s")
for step, branches in enumerate(result.branches[0]):
    print(f"step {step + 1}: branches {', '.join(branches)}")
