"""Aligned face crops on tensors: InsightFace's five-point template, batched and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

#: Where the five key points lie in a 112 x 112 crop.
TEMPLATE = torch.tensor(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


def similarity(points: Tensor, target: Tensor) -> Tensor:
    """Return the least-squares similarity transforms [n, 2, 3] from `target` [k, 2] to `points`.

    Args:
        points: [n, k, 2] pixels of the pictures.
        target: [k, 2] pixels of the crop.
    """
    mean_points = points.mean(dim=1, keepdim=True)
    mean_target = target.mean(dim=0, keepdim=True)
    p, q = points - mean_points, target - mean_target
    norm = q.square().sum()
    a = (p[..., 0] * q[:, 0] + p[..., 1] * q[:, 1]).sum(dim=1) / norm
    b = (p[..., 1] * q[:, 0] - p[..., 0] * q[:, 1]).sum(dim=1) / norm
    rotation = torch.stack([torch.stack([a, -b], dim=-1), torch.stack([b, a], dim=-1)], dim=1)
    shift = mean_points[:, 0] - (rotation @ mean_target[0]).reshape(-1, 2)
    return torch.cat([rotation, shift[:, :, None]], dim=2)


def crop_faces(pictures: Tensor, points: Tensor, size: int = 112) -> Tensor:
    """Cut aligned faces out of pictures.

    Args:
        pictures: [n, 3, h, w].
        points: [n, 5, 2] key points in pixels.
        size: width of the crops.

    Returns:
        Crops [n, 3, size, size]; zero outside of the picture.
    """
    height, width = pictures.shape[-2:]
    transform = similarity(points, TEMPLATE * (size / 112))
    axis = torch.arange(size, dtype=torch.float32)
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    base = torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], dim=-1)
    pixels = torch.einsum("nij,hwj->nhwi", transform, base)
    scale = torch.tensor([2 / width, 2 / height])
    grid = (pixels + 0.5) * scale - 1
    return functional.grid_sample(pictures, grid, align_corners=False)
