"""Distorted copies of a batch, made where the batch lies: turned, sheared, shifted, bent."""

# Shape letters: B batch, H height, W width, S side of the elastic grid.

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import Recipe

ELASTIC_SIDE = 5  # points on a side of the coarse grid that elastic distortion bends


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Images (B, 1, H, W), each distorted at random as far as the recipe says; 0 stays paper.

    Draws from torch's global generator of the images' device. Returns them as they are when the
    recipe distorts nothing, otherwise as float32 from 0 to 255.
    """
    if not any((recipe.rotate, recipe.stretch, recipe.shear, recipe.shift, recipe.elastic)):
        return images
    size = (len(images), 1, *images.shape[2:])
    grid = functional.affine_grid(_affine(len(images), recipe, images.device), list(size), False)
    if recipe.elastic:
        grid = grid + _bend(images, recipe.elastic)  # (B, H, W, 2)
    return functional.grid_sample(images.float(), grid, align_corners=False)


def _affine(count: int, recipe: Recipe, device: torch.device) -> Tensor:
    """Random affine maps (count, 2, 3) in the units of `affine_grid`, where the image is 2 wide."""
    draw = torch.rand(6, count, device=device) * 2 - 1  # -1 to 1
    turn, shear = draw[0] * recipe.rotate, draw[1] * recipe.shear
    wide, high = torch.exp(draw[2:4] * recipe.stretch)
    right, down = draw[4:6] * recipe.shift
    cosine, sine = turn.cos(), turn.sin()
    first = torch.stack([cosine * wide, (shear * cosine - sine) * wide, right], dim=1)
    second = torch.stack([sine * high, (shear * sine + cosine) * high, down], dim=1)
    return torch.stack([first, second], dim=1)


def _bend(images: Tensor, strength: float) -> Tensor:
    """Smooth random displacements (B, H, W, 2): those of a coarse grid, interpolated."""
    coarse = torch.rand(len(images), 2, ELASTIC_SIDE, ELASTIC_SIDE, device=images.device) * 2 - 1
    high, wide = (_interpolation(side, images.device) for side in images.shape[2:])
    return (high @ (coarse * strength) @ wide.T).permute(0, 2, 3, 1)


@cache
def _interpolation(side: int, device: torch.device) -> Tensor:
    """The matrix (side, S) that interpolates a coarse line: faster than doing so for each image."""
    identity = torch.eye(ELASTIC_SIDE, device=device)[None, :, :, None]  # (1, S, S, 1)
    lines = functional.interpolate(identity, (side, 1), mode="bicubic", align_corners=True)
    return lines[0, :, :, 0].T.contiguous()


def examples(images: np.ndarray, recipe: Recipe, draws: int, seed: int = 0) -> np.ndarray:
    """What the recipe makes of uint8 images (N, 1, H, W): uint8 (N, draws, 1, H, W)."""
    torch.manual_seed(seed)
    repeated = torch.from_numpy(images).repeat_interleave(draws, dim=0)  # (N * draws, 1, H, W)
    distorted = augment(repeated, recipe).round().to(torch.uint8).numpy()
    return distorted.reshape(len(images), draws, *images.shape[1:])
