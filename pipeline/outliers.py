"""Things that are no digits, made for training beside the digits of a batch: nothing to be sure of.

They come from torch's global generator. What a model is measured with is made in another way, by
`nondigits.py`.
"""

# Shape letters: M things, B digits, H height, W width, S strokes, P points of a stroke.

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

SIDE, HALF = 28, 14  # pixels
STROKES, POINTS = 8, 20  # of one thing at most; of one stroke
STOCK, PIECE = 4096, 256  # drawings of either kind; so many are made at a time
# How each digit may be turned and be none. 4: along its diagonal, 2: left to right, 1: upside down.
# A 2 mirrored is nearly a 5, a 6 turned twice is a 9; 0 and 1 stay too much what they are.
TURNS: dict[int, tuple[int, ...]] = {
    2: (4, 5, 6, 7),
    3: (2, 3, 4, 5, 6, 7),
    4: (1, 2, 3, 5, 6),
    5: (4, 5, 6, 7),
    6: (1, 2, 4, 5, 6, 7),
    7: (2, 3, 4, 5, 6),
    8: (5, 6),
    9: (1, 2, 4, 5, 6, 7),
}


class Outliers:
    """Things beside the digits of a batch: digits spoiled there and then, and a stock of drawings.

    The stock is a function of the seed.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.strokes, self.filled = _stock(seed, device)

    def written(self, digits: Tensor, labels: Tensor, count: int) -> Tensor:
        """Things of strokes (M, 1, H, W), most made of digits (B, 1, H, W) with labels (B,)."""
        turned, mixed = round(0.28 * count), count // 8
        strokes = count - turned - 3 * mixed
        return torch.cat(
            [
                _turned(digits, labels, turned),
                _cut(digits, mixed),
                _pairs(digits, mixed),
                _over(digits, labels, mixed),
                _some(self.strokes, strokes),
            ]
        )

    def painted(self, count: int) -> Tensor:
        """Filled shapes, clouds and plain paper (M, 1, H, W)."""
        return _some(self.filled, count)


@cache
def _stock(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Things of strokes, and filled shapes, uint8 (STOCK, 1, H, W) each."""
    torch.manual_seed(seed)
    strokes, filled = (
        torch.cat([make(PIECE, device) for _ in range(STOCK // PIECE)])
        for make in (_strokes, _filled)
    )
    return _levels(strokes), _levels(filled)


def _levels(ink: Tensor) -> Tensor:
    """Ink from 0 to 1 as gray levels."""
    return (255 * ink).round().to(torch.uint8)


def _turned(digits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Digits turned and mirrored so that they are none."""
    ways = _ways(labels.device)[labels]  # (B, 8): 1 where allowed
    chosen = torch.multinomial(ways.sum(dim=1) + 1e-9, count, replacement=True)
    way = torch.multinomial(ways[chosen] + 1e-9, 1).view(-1, 1, 1, 1)  # (M, 1, 1, 1)
    things = digits[chosen]
    things = torch.where(way & 4 > 0, things.mT, things)
    things = torch.where(way & 2 > 0, things.flip(-1), things)
    return torch.where(way & 1 > 0, things.flip(-2), things)


@cache
def _ways(device: torch.device) -> Tensor:
    """Which turns (10, 8) are allowed of each digit."""
    ways = torch.zeros(10, 8)
    for digit, turns in TURNS.items():
        ways[digit, list(turns)] = 1
    return ways.to(device)


def _some(things: Tensor, count: int) -> Tensor:
    return things[torch.randint(len(things), (count,), device=things.device)]


def _cut(digits: Tensor, count: int) -> Tensor:
    """Halves of two digits, each where the other half belongs."""
    first, second = _some(digits, count), _some(digits, count)
    beside = torch.cat([first[..., HALF:], second[..., :HALF]], dim=-1)
    above = torch.cat([first[..., HALF:, :], second[..., :HALF, :]], dim=-2)
    return torch.where(_coin(count, digits.device), beside, above)


def _pairs(digits: Tensor, count: int) -> Tensor:
    """Two digits beside each other, squeezed into the place of one."""
    return torch.cat([_some(digits, count)[..., ::2], _some(digits, count)[..., 1::2]], dim=-1)


def _over(digits: Tensor, labels: Tensor, count: int) -> Tensor:
    """A digit written over another that lies on its side; 0 and 1 would still leave a digit."""
    wide = (labels > 1).float() + 1e-9
    first, second = torch.multinomial(wide, 2 * count, replacement=True).view(2, -1)
    return torch.maximum(digits[first], digits[second].mT)


def _strokes(count: int, device: torch.device) -> Tensor:
    """Strokes between the points of a jittered lattice, or one long curl; some mirrored; 0 to 1."""
    is_curl = _coin(count, device, 0.4)
    ways = zip(_curls(count, device), _segments(count, device), strict=True)
    first, second, third = (torch.where(is_curl, *pair) for pair in ways)
    along = torch.linspace(0, 1, POINTS, device=device)[:, None]  # (P, 1)
    paths = (1 - along) ** 2 * first + 2 * along * (1 - along) * second + along**2 * third
    least, most = torch.where(is_curl, 4, 3), torch.where(is_curl, STROKES, 5)
    used = least + (torch.rand(count, 1, 1, 1, device=device) * (most - least + 1)).int()
    order = torch.arange(STROKES, device=device).view(1, -1, 1, 1)
    paths = torch.where(order < used, paths, paths[:, :1]).flatten(1, 2)  # (M, S P, 2)
    paths = _sized(paths) * (7.5 + 2.5 * torch.rand(count, 1, 1, device=device))
    away = torch.cdist(_pixels(device).expand(count, -1, -1), paths).amin(dim=2)
    width = 0.6 + torch.rand(count, 1, device=device) * 1.4  # half of it, in pixels
    ink = (width + 0.5 - away).clamp(0, 1).view(count, 1, SIDE, SIDE)
    return torch.where(_coin(count, device, 0.25), torch.maximum(ink, ink.flip(-1)), ink)


def _sized(paths: Tensor) -> Tensor:
    """Points (M, P, 2) about their middle, at most 1 away from it in the longer direction."""
    least, most = paths.amin(dim=1, keepdim=True), paths.amax(dim=1, keepdim=True)
    half = ((most - least) / 2).amax(dim=2, keepdim=True).clamp(min=0.1)
    return (paths - (least + most) / 2) / half


def _segments(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where strokes begin, what they bend towards, and where they end: (M, S, 1, 2) each.

    Half of them begin where the one before ends, and half are straight.
    """
    shape = (count, STROKES, 1, 2)
    begin, end = (
        torch.randint(-1, 2, (2, *shape), device=device) + _spread(2, *shape, device=device) / 8
    )
    goes_on, is_bent = torch.rand(2, *shape[:-1], 1, device=device) < 0.5
    begin = torch.where(goes_on, end.roll(1, dims=1), begin)
    return begin, (begin + end) / 2 + _spread(*shape, device=device) * 1.2 * is_bent, end


def _curls(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The same of strokes that go on without a corner: a quadratic spline between any points."""
    points = _spread(count, STROKES + 2, 1, 2, device=device) * 1.4
    halfway = (points[:, 1:] + points[:, :-1]) / 2  # (M, S + 1, 1, 2)
    return halfway[:, :-1], points[:, 1:-1], halfway[:, 1:]


def _filled(count: int, device: torch.device) -> Tensor:
    """Boxes, ellipses and blobs of cloudy gray, on paper or all over it, some the other way round.

    Some are without clouds, and some are nothing but one gray level.
    """
    middle, size = _spread(2, count, 1, device=device) * 4, _share(2, count, 1, device=device) * 14
    x, y = (_pixels(device).T[:, None] - middle) / (size + 2)  # (M, H W) each
    corner = 2 + 6 * _share(count, 1, device=device)  # 2 is an ellipse; more is nearly a box
    inside = (x.abs() ** corner + y.abs() ** corner < 1).view(-1, 1, SIDE, SIDE)
    blob = _clouds(count, 4, device) > 0.5
    everywhere = _coin(count, device, 0.2)
    inside = torch.where(_coin(count, device), inside, blob & inside.roll(1, dims=0)) | everywhere
    grain = int(torch.randint(2, SIDE // 2, ()))
    contrast, level = _share(2, count, 1, 1, 1, device=device)
    ink = (level + (_clouds(count, grain, device) - 0.5) * 2 * contrast).clamp(0, 1) * inside
    return torch.where(_coin(count, device), ink, 1 - ink)


def _clouds(count: int, grain: int, device: torch.device) -> Tensor:
    """Smooth noise (M, 1, H, W) from 0 to 1, of as many grains on a side."""
    coarse = torch.rand(count, 1, grain, grain, device=device)
    return functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")


def _coin(count: int, device: torch.device, share: float = 0.5) -> Tensor:
    return torch.rand(count, 1, 1, 1, device=device) < share


def _share(*shape: int, device: torch.device) -> Tensor:
    return torch.rand(shape, device=device)  # 0 to 1


def _spread(*shape: int, device: torch.device) -> Tensor:
    return torch.rand(shape, device=device) * 2 - 1  # -1 to 1


@cache
def _pixels(device: torch.device) -> Tensor:
    """The pixels' coordinates (H W, 2), counted from the middle of the image."""
    place = torch.arange(SIDE, device=device) - (SIDE - 1) / 2
    return torch.cartesian_prod(place, place)
