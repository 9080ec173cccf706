"""Random distortion of a batch on its own device: rotated, sheared, shifted, bent."""

# Shape letters: B batch, H height, W width, S side of the elastic grid.

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.training.recipes import Recipe

ELASTIC_SIDE = 5  # points on each side of the coarse grid of elastic distortion


def find_paper(images: Tensor) -> Tensor:
    """Return the median level of each image's border, float32 (B, 1, 1, 1)."""
    sides = [images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]]
    return torch.cat(sides, dim=-1).float().median(dim=-1).values.view(-1, 1, 1, 1)


def augment(
    images: Tensor, recipe: Recipe, strength: float = 1.0, has_own_paper: bool = False
) -> Tensor:
    """Distort each image (B, 1, H, W) at random, within the recipe's limits.

    What comes in over the border is 0, or the image's own paper if `has_own_paper`. `strength` (0
    to 1) scales all distortions except mirroring. Draws from torch's global generator of the
    images' device. Returns the images unchanged when the recipe distorts nothing, otherwise as
    float32 from 0 to 255.
    """
    if not recipe.distorts:
        return images
    images, count, device = images.float(), len(images), images.device
    paper = find_paper(images) if has_own_paper else None
    if recipe.stroke:
        # Thicker or thinner, by up to a pixel on each side.
        amount = (torch.rand(count, 1, 1, 1, device=device) * 2 - 1) * (recipe.stroke * strength)
        thick = functional.max_pool2d(images, 3, 1, 1)
        thin = -functional.max_pool2d(-images, 3, 1, 1)
        images = torch.lerp(images, torch.where(amount > 0, thick, thin), amount.abs())
    # Random affine maps in the units of `affine_grid`, where the image is 2 units wide.
    draw = (torch.rand(6, count, device=device) * 2 - 1) * strength  # -1 to 1
    turn, shear = draw[0] * recipe.rotate, draw[1] * recipe.shear
    across, up = torch.exp(draw[2:4] * recipe.stretch)
    if recipe.mirror:
        across = torch.where(torch.rand(count, device=device) < recipe.mirror, -across, across)
    right, down = draw[4:6] * recipe.shift
    cosine, sine = turn.cos(), turn.sin()
    first = torch.stack([cosine * across, (shear * cosine - sine) * across, right], dim=1)
    second = torch.stack([sine * up, (shear * sine + cosine) * up, down], dim=1)
    weights = torch.stack([first, second], dim=1)  # (B, 2, 3)
    if recipe.elastic:
        bend = torch.rand(count, 2, ELASTIC_SIDE**2, device=device) * 2 - 1  # -1 to 1
        weights = torch.cat([weights, bend * recipe.elastic * strength], dim=2)  # (B, 2, 3 + S^2)
    high, wide = images.shape[2:]
    basis = _basis(high, wide, device)[: weights.shape[2]]  # (3 + S^2 or 3, H W)
    grid = (weights.flatten(0, 1) @ basis).view(count, 2, high, wide).permute(0, 2, 3, 1)
    if paper is None:
        return functional.grid_sample(images, grid, align_corners=False)
    return functional.grid_sample(images - paper, grid, align_corners=False) + paper


@cache
def _basis(high: int, wide: int, device: torch.device) -> Tensor:
    """Return a basis (3 + S^2, H W) whose weighted sum gives each pixel's place in one product.

    It has the pixel coordinates in the units of `grid_sample`, the constant one, and a bump for
    each point of the coarse grid (Simard et al. 2003 smooth random displacements with a Gaussian;
    these are bicubic).
    """
    across, down = ((2 * torch.arange(side) + 1) / side - 1 for side in (wide, high))
    ones = torch.ones(high, wide)
    affine = torch.stack([ones * across, ones * down[:, None], ones])  # (3, H, W)
    points = torch.eye(ELASTIC_SIDE**2).view(-1, 1, ELASTIC_SIDE, ELASTIC_SIDE)
    bumps = functional.interpolate(points, (high, wide), mode="bicubic", align_corners=True)
    return torch.cat([affine, bumps[:, 0]]).flatten(1).to(device)


def draw_examples(
    images: np.ndarray, recipe: Recipe, draws: int, has_own_paper: bool = False
) -> np.ndarray:
    """Return distorted copies, uint8 (N, draws, 1, H, W), of uint8 images (N, 1, H, W)."""
    torch.manual_seed(0)
    repeated = torch.from_numpy(images).repeat_interleave(draws, dim=0)  # (N * draws, 1, H, W)
    distorted = augment(repeated, recipe, has_own_paper=has_own_paper).round().clamp(0, 255)
    return distorted.to(torch.uint8).numpy().reshape(len(images), draws, *images.shape[1:])
