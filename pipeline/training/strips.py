"""Strips to train a reader of numbers with: each is a function of the seed and the step.

Digits of one hand, and things that are none, are put next to each other on a strip, on the
device of the images.
"""

# Shape letters: B strips, L places on a strip, M tiles on all of them, H height, W width.

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
GAP, GAP_OF_PAIR = (-3.5, 8.0), 2.5  # pixels: of a strip, and what a pair's differs by
BASELINE = 2.5  # pixels by which a digit lies higher or lower
SLANT = 0.32  # largest tangent of a strip
FOREIGN, MIXED = 0.08, 0.08  # shares of the strips: without a digit, with digits and others
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
    device = labels.device
    wanted = torch.randint(1, TEXT_LENGTH + 1, (count, 1), device=device)
    is_tile = torch.arange(TEXT_LENGTH, device=device) < wanted  # (B, L)
    total = int(is_tile.sum())
    chosen = torch.randint(len(labels), (total,), device=device)
    tiles, digits = images[chosen], labels.new_full(is_tile.shape, NO_DIGIT)
    digits[is_tile] = labels[chosen]
    if outliers:
        kind = torch.rand(count, 1, device=device)
        among = torch.where(kind < (FOREIGN + MIXED), AMONG, 0.0)
        is_foreign = torch.rand(digits.shape, device=device) < torch.where(kind < FOREIGN, 1, among)
        letters = outliers.draw_letters(total)
        tiles = torch.where(is_foreign[is_tile].view(-1, 1, 1, 1), letters, tiles)
        digits = digits.masked_fill(is_foreign, NO_DIGIT)
    return lay_out(augment(tiles, recipe, strength), is_tile, digits)


def lay_out(tiles: Tensor, is_tile: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
    """Put tiles (M, 1, 28, 28) on strips (B, 1, H, W); return these and their texts (B, L).

    `is_tile` (B, L) says at which places of the strips the M tiles are, `digits` (B, L) what they
    show, or -1. As many as fit are used, from the left. A text is digits, then -1.
    """
    shape, device = is_tile.shape, tiles.device

    def draw(low: float, high: float, *of: int) -> Tensor:
        return low + (high - low) * torch.rand(*of, device=device)

    heights = draw(*HEIGHT, shape[0], 1) * draw(1 - OF_DIGIT, 1 + OF_DIGIT, *shape)
    slant = draw(-SLANT, SLANT, shape[0], 1).expand(shape)
    tiles = _resize(tiles.float(), heights[is_tile], slant[is_tile])
    is_ink = (tiles >= INK).any(dim=2).flatten(1)  # (M, 28): columns with ink
    left, width = torch.zeros((2, *shape), dtype=torch.long, device=device)
    left[is_tile] = is_ink.int().argmax(dim=1)
    width[is_tile] = TILE - is_ink.flip(1).int().argmax(dim=1) - left[is_tile]
    gaps = (draw(*GAP, shape[0], 1) + draw(-GAP_OF_PAIR, GAP_OF_PAIR, *shape)).round().long()
    ends = (width + gaps).cumsum(dim=1) - gaps
    is_used = is_tile & (ends <= _WIDE)
    length = (ends * is_used).amax(dim=1, keepdim=True)
    offset = (draw(0, 1, shape[0], 1) * (_WIDE - length + 1)).long()
    places = (offset + ends - width - left)[is_tile].view(-1, 1, 1)  # of a tile's first column
    across = places + torch.arange(TILE, device=device)  # (M, 1, 28)
    rows = draw(-BASELINE, BASELINE, len(tiles), 1, 1).round().long()
    down = rows + torch.arange(TILE, device=device).view(1, -1, 1)  # (M, 28, 1)
    is_inside = (across >= 0) & (across < _WIDE) & (down >= 0) & (down < _HIGH)
    is_inside = is_inside & is_used[is_tile].view(-1, 1, 1)
    strip = torch.nonzero(is_tile)[:, 0].view(-1, 1, 1)
    index = (strip * _HIGH + down.clamp(0, _HIGH - 1)) * _WIDE + across.clamp(0, _WIDE - 1)
    ink = torch.where(is_inside, tiles[:, 0], 0.0)
    strips = torch.zeros(shape[0] * _HIGH * _WIDE, device=device)
    strips.scatter_reduce_(0, index.flatten(), ink.flatten(), "amax")
    is_read = is_used & (digits != NO_DIGIT)
    order = (~is_read).int().argsort(dim=1, stable=True)  # the digits first
    texts = digits.masked_fill(~is_read, NO_DIGIT).gather(1, order)
    return strips.view(-1, 1, _HIGH, _WIDE), texts


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
