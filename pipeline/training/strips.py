"""Strips to train a reader of numbers with: each is a function of the seed and the step.

Digits of one hand, and things that are none, are put next to each other on a strip, on the
device of the images.
"""

# Shape letters: B strips, L places of a strip, M = B L tiles, H height, W width.

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.signature import STRIPS, TEXT_LENGTH
from pipeline.training.augment import augment
from pipeline.training.outliers import Outliers
from pipeline.training.recipes import Recipe

NO_DIGIT = -1  # in the labels: nothing to read
TILE = 28  # pixels of a tile's side
INK = 64  # level from which a pixel counts as ink
HEIGHT = (15.0, 23.0)  # pixels of a digit
OF_DIGIT = 0.06  # by which a digit's height differs from its strip's
GAP, GAP_OF_PAIR = (-3.5, 14.0), 2.5  # pixels: of a strip, and what a pair's differs by
BASELINE = 2.5  # pixels by which a digit lies higher or lower
SLANT = 0.32  # largest tangent of a strip
FOREIGN, MIXED = 0.12, 0.12  # shares of the strips: without a digit, with digits and others
AMONG = 0.35  # of the things on a mixed strip, the share that are no digits
_, _HIGH, _WIDE = STRIPS.shape


def make_strips(
    images: Tensor,
    labels: Tensor,
    count: int,
    recipe: Recipe,
    strength: float,
    outliers: Outliers | None,
) -> tuple[Tensor, Tensor]:
    """Make strips (B, 1, H, W) of digits uint8 (N, 1, 28, 28) with labels (N,), and texts (B, L).

    Each tile is distorted as the recipe says, at this strength. With `outliers`, letters and other
    strokes stand on a part of the strips. Draws from torch's global generator.
    """
    device, total = labels.device, count * TEXT_LENGTH
    chosen = torch.randint(len(labels), (total,), device=device)
    tiles, digits = images[chosen], labels[chosen].view(count, TEXT_LENGTH)
    if outliers:
        kind = torch.rand(count, 1, device=device)
        among = torch.where(kind < (FOREIGN + MIXED), AMONG, 0.0)
        is_foreign = torch.rand(digits.shape, device=device) < torch.where(kind < FOREIGN, 1, among)
        letters = outliers.draw_letters(total)
        tiles = torch.where(is_foreign.view(-1, 1, 1, 1), letters, tiles)
        digits = torch.where(is_foreign, NO_DIGIT, digits)
    return lay_out(augment(tiles, recipe, strength), digits)


def lay_out(tiles: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
    """Put tiles (B L, 1, 28, 28) on strips (B, 1, H, W); return these and their texts (B, L).

    As many tiles as are drawn and fit are used, from the left. The texts are digits, then -1.
    """
    count, device = len(digits), tiles.device

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, device=device)

    heights = draw(*HEIGHT, count, 1) * draw(1 - OF_DIGIT, 1 + OF_DIGIT, *digits.shape)
    slant = draw(-SLANT, SLANT, count, 1).expand(digits.shape).reshape(-1)
    tiles = _resize(tiles.float(), heights.reshape(-1), slant)
    is_ink = (tiles >= INK).any(dim=2).flatten(1)  # (M, 28): columns with ink
    left = is_ink.int().argmax(dim=1).view(digits.shape)
    right = TILE - is_ink.flip(1).int().argmax(dim=1).view(digits.shape)  # behind the last
    gaps = draw(*GAP, count, 1) + draw(-GAP_OF_PAIR, GAP_OF_PAIR, *digits.shape)
    ends = (right - left + gaps.round().long()).cumsum(dim=1)  # with the gap behind each
    starts = ends - (right - left + gaps.round().long())
    wanted = torch.randint(1, TEXT_LENGTH + 1, (count, 1), device=device)
    is_used = (torch.arange(TEXT_LENGTH, device=device) < wanted) & (starts + right - left <= _WIDE)
    is_used = is_used.cumprod(dim=1).bool()
    length = ((starts + right - left) * is_used).amax(dim=1, keepdim=True)
    offset = (draw(0, 1, count, 1) * (_WIDE - length + 1)).long()
    places = (offset + starts - left).view(-1, 1, 1)  # of each tile's first column
    rows = (draw(-BASELINE, BASELINE, len(tiles), 1, 1)).round().long()
    across = places + torch.arange(TILE, device=device)  # (M, 1, 28)
    down = rows + torch.arange(TILE, device=device).view(1, -1, 1)  # (M, 28, 1)
    strip = torch.arange(count, device=device).repeat_interleave(TEXT_LENGTH).view(-1, 1, 1)
    is_inside = (across >= 0) & (across < _WIDE) & (down >= 0) & (down < _HIGH)
    is_inside = is_inside & is_used.view(-1, 1, 1)
    index = (strip * _HIGH + down.clamp(0, _HIGH - 1)) * _WIDE + across.clamp(0, _WIDE - 1)
    ink = torch.where(is_inside, tiles[:, 0], 0.0)
    strips = torch.zeros(count * _HIGH * _WIDE, device=device)
    strips.scatter_reduce_(0, index.flatten(), ink.flatten(), "amax")
    is_read = is_used & (digits != NO_DIGIT)
    order = (~is_read).int().argsort(dim=1, stable=True)  # the digits first
    texts = torch.where(is_read, digits, NO_DIGIT).gather(1, order)
    return strips.view(count, 1, _HIGH, _WIDE), texts


def _resize(tiles: Tensor, heights: Tensor, slant: Tensor) -> Tensor:
    """Scale the ink of tiles (M, 1, 28, 28) to these heights (M,), slant it and centre it."""
    is_ink = tiles[:, 0] >= INK
    sides = []  # the middle of the ink and its extent: across, then down
    for ink in (is_ink.any(dim=1), is_ink.any(dim=2)):
        first, last = ink.int().argmax(dim=1), TILE - 1 - ink.flip(1).int().argmax(dim=1)
        sides.append(((first + last) / 2, last - first + 1))
    (x, wide), (y, high) = sides
    # Nothing may become wider than a tile: it is scaled less.
    scale = torch.maximum(high / heights, wide / (TILE - 2))
    zero = torch.zeros_like(scale)
    middle = (TILE - 1) / 2
    # In the units of affine_grid, in which a tile is 2 units wide.
    first = torch.stack([scale, scale * slant, (x - middle) / (TILE / 2)], dim=1)
    second = torch.stack([zero, scale, (y - middle) / (TILE / 2)], dim=1)
    grid = functional.affine_grid(
        torch.stack([first, second], dim=1), list(tiles.shape), align_corners=False
    )
    return functional.grid_sample(tiles, grid, align_corners=False)


def ctc_loss(outputs: Tensor, texts: Tensor) -> Tensor:
    """Return the mean CTC loss of log-probabilities (B, T, K + 1) for texts (B, L), in nats.

    A text ends with -1. The loss of each strip is divided by its digits (Graves et al. 2006).
    """
    count, steps, symbols = outputs.shape
    lengths = (texts != NO_DIGIT).sum(dim=1)
    return functional.ctc_loss(
        outputs.transpose(0, 1),
        texts.clamp(min=0),
        torch.full((count,), steps, device=texts.device),
        lengths,
        blank=symbols - 1,
    )
