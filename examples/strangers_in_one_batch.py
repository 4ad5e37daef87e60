"""Three people with settings of their own share UNet calls; each gets what it would get alone."""

import sys
from pathlib import Path

import numpy as np

from fastface_trt import FastFace
from fastface_trt.mini.folders import SAMPLE_FACES

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
out.mkdir(parents=True, exist_ok=True)

with FastFace.load("mini") as fastface:
    requests = [
        fastface.request("photo; person in space, laughing", preset="am1", seed=1),
        fastface.request("oil painting; person on a beach", preset="dcg", seed=2),
        fastface.request("comic book; person in a city", preset="am2+dcg", ip_adapter_scale=0.5),
    ]
    faces = [SAMPLE_FACES / name for name in ("ada.png", "bruno.png", "chika.png")]
    together = fastface.generate(requests, faces)

    for request, face, picture in zip(requests, faces, together.images, strict=True):
        alone = fastface.generate([request], [face]).images[0]
        difference = np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max()
        print(f"{face.stem}: differs from its single run by at most {difference} of 255")
        assert difference <= 1
        picture.save(out / f"{face.stem}.png")
