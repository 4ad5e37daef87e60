"""PuLID's orthogonalisation: what the id attention adds is freed from what the text already says.

With i = λ f(A) V' the id attention's result and h the text attention's, the part of i along h is,
per channel over the N positions of a picture, p = (Σ h i / Σ h²) h. Version 1 adds i − p. Version 2
adds i + (m − 1) p, where m [B,1,N,1] says how much a position looks at the face: the first tokens'
share of softmax(Q K'ᵀ), not scaled by √D, averaged over heads. Both are linear in i, so λ and the
attention manipulation before them commute with it. The map behind m is never manipulated.

Shape legend: B rows, H heads, N query positions, T image tokens, D head size.
"""

import torch
from torch import Tensor

from fastface_trt.engines.manifest import Orthogonal

FACE_TOKENS = 5
"""The tokens whose share of attention counts as looking at the face."""


def orthogonalize(
    image_BHND: Tensor, text_BHND: Tensor, q_BHND: Tensor, k_BHTD: Tensor, variant: Orthogonal
) -> Tensor:
    """What is added to the text attention, [B,H,N,D] in the dtype of `image_BHND`.

    Where the text attention is zero (an empty prompt whose embedding is zeros) nothing is along it.
    """
    if variant == "off":
        return image_BHND
    dtype = torch.promote_types(image_BHND.dtype, torch.float32)
    image, text = image_BHND.to(dtype), text_BHND.to(dtype)
    along = (text * image).sum(-2, keepdim=True)
    length = (text * text).sum(-2, keepdim=True).clamp_min(1e-30)
    projection = along / length * text
    if variant == "v1":
        return (image - projection).to(image_BHND.dtype)
    logits = (q_BHND @ k_BHTD.transpose(-2, -1)).to(dtype)
    shares_BHNT = torch.softmax(logits, dim=-1)
    of_face_B1N1 = shares_BHNT[..., :FACE_TOKENS].sum(-1, keepdim=True).mean(1, keepdim=True)
    return (image + (of_face_B1N1 - 1) * projection).to(image_BHND.dtype)
