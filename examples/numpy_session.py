"""A session over your own memory: image tokens, latents and pixels go in and out by DLPack.

numpy stands here for any library with DLPack (PyTorch, CuPy, JAX); on a GPU nothing is copied to
the host.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fastface_trt import FastFace
from fastface_trt.embedding.session import Session
from fastface_trt.mini.folders import SAMPLE_FACES

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
out.mkdir(parents=True, exist_ok=True)

with FastFace.load("mini") as fastface:
    session = Session(fastface)
    ada = np.from_dlpack(session.tokens(fastface.analyze(SAMPLE_FACES / "ada.png")))
    bruno = np.from_dlpack(session.tokens(fastface.analyze(SAMPLE_FACES / "bruno.png")))
    request = fastface.request("photo; person in a forest", preset="am1", seed=3)

    # Image tokens are numbers like others: a face between two people.
    pixels = np.empty((request.height, request.width, 3), np.uint8)
    output = session.generate(request, (ada + bruno) / 2, out=pixels)
    Image.fromarray(pixels).save(out / "between.png")

    latents = np.from_dlpack(output.latents)
    print(f"image tokens {ada.shape}, latents {latents.shape}, pixels {pixels.shape}")

    # The same noise for another face: only the person changes.
    noise = np.random.default_rng(0).standard_normal(latents.shape).astype(np.float32)
    for name, tokens in (("ada", ada), ("bruno", bruno)):
        session.generate(request, tokens, latents=noise, out=pixels)
        Image.fromarray(pixels).save(out / f"{name}.png")
