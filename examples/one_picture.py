"""A face and a prompt in, a picture out; its file carries the parameters that made it."""

import sys
from pathlib import Path

from fastface_trt import FastFace
from fastface_trt.mini.folders import SAMPLE_FACES

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")

with FastFace.load("mini") as fastface:
    result = fastface(
        "photo; person in a garden, smiling", SAMPLE_FACES / "ada.png", preset="am1+dcg", seed=7
    )

(file,) = result.save(out / "ada.png")
print(f"{file}: {result.unet_samples} UNet samples, {result.seconds['total']:.2f} s")
for step, branches in enumerate(result.branches[0]):
    print(f"step {step + 1}: branches {', '.join(branches)}")
