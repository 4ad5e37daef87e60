"""What a picture looks like after every step, and how to stop on the way."""

import sys
from pathlib import Path

from PIL import Image

from fastface_trt import FastFace
from fastface_trt.errors import Cancelled
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.preview import LatentPreview

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
out.mkdir(parents=True, exist_ok=True)
prompt, face = "oil painting; person in a library", SAMPLE_FACES / "dev.png"

with FastFace.load("mini") as fastface:
    # One linear map from latents to colours: less than a thousandth of a decode.
    preview = LatentPreview.fit(fastface.stages, fastface.manifest)

    def show(trace):
        small = Image.fromarray(preview.rgb(trace.latents))
        small.resize((96, 96), Image.Resampling.BICUBIC).save(out / f"step_{trace.step + 1}.png")
        print(f"step {trace.step + 1} of {trace.steps}: branches {', '.join(trace.predictions)}")

    fastface(prompt, face, preset="dcg", on_step=show).images[0].save(out / "finished.png")

    try:
        fastface(prompt, face, on_step=lambda trace: trace.step < 1)
    except Cancelled as stopped:
        print(stopped)
