"""Generated images of no class that train next to a batch, so that a model is unsure of them.

They are drawn with torch's global generator: non-digits for MNIST, altered pictures for a folder of
pictures. Those that a model is measured on are made in another way, by `tools/nondigits.py`.

The module also has the pen strokes of letters and signs, each with and without serifs. Letters
that many people write like a digit are left out: b g I l O o q S s Z z.
"""

# Shape letters: M non-digits, B digits, H height, W width, S strokes, P points of a stroke,
# N pixels near a point, in a row; V ways to write a letter.

import re
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.training.augment import find_paper

SIDE, HALF = 28, 14  # pixels
SPOT = 5  # a full-ink spot's least half width is SPOT + 2 pixels; a narrower one may look like a 1
POINTS = 18  # points of a stroke
NEAR = 3  # pixels: how far from a point of a stroke its ink may reach
STOCK, PIECE = 4096, 128  # images of each kind in stock, and how many are drawn at a time
# How each digit may be turned or mirrored to become a non-digit, as a sum of 4: transpose,
# 2: mirror left to right, 1: mirror top to bottom. A 2 mirrored is nearly a 5, a 6 turned by 180
# degrees is a 9; 0 and 1 change too little.
TURNS: dict[int, tuple[int, ...]] = {2: (4, 5, 6, 7), 3: (2, 3, 4, 5, 6, 7), 4: (1, 2, 3, 5, 6)}
TURNS |= {5: (4, 5, 6, 7), 6: (1, 2, 4, 5, 6, 7), 7: (2, 3, 4, 5, 6), 8: (5, 6)}
TURNS |= {9: (1, 2, 4, 5, 6, 7)}
STROKES = 12  # of one letter, at most
GRID = 10  # points on each side of the letters' grid; x to the right, y down


class Outliers:
    """A stock of non-digits to train with; it depends only on the given digits and the seed."""

    def __init__(self, digits: Tensor, labels: Tensor, seed: int) -> None:
        letters, strokes, self._painted = _draw(seed, digits.device)
        torch.manual_seed(seed)
        mixed = STOCK // 6
        turned = _turn(digits, labels, STOCK - 3 * mixed)
        # Halves of two digits, each in the place of the other half.
        first, second = _pick(digits, mixed), _pick(digits, mixed)
        across = torch.cat([first[..., HALF:], second[..., :HALF]], dim=-1)
        down = torch.cat([first[..., HALF:, :], second[..., :HALF, :]], dim=-2)
        cut = torch.where(_coin(mixed, digits.device), across, down)
        # Two digits next to each other, squeezed into the width of one.
        pairs = torch.cat([_pick(digits, mixed)[..., ::2], _pick(digits, mixed)[..., 1::2]], dim=-1)
        # A digit written over another, transposed one; with a 0 or 1 it may still be a digit.
        wide = (labels > 1).float() + 1e-9
        first, second = torch.multinomial(wide, 2 * mixed, replacement=True).view(2, -1)
        over = torch.maximum(digits[first], digits[second].mT)
        self._written = torch.cat([letters, strokes, turned, cut, pairs, over])
        self._letters = letters

    def draw_letters(self, count: int) -> Tensor:
        """Draw letters and signs (M, 1, H, W), none of which many people write like a digit."""
        return _pick(self._letters, count)

    def draw_written(self, count: int) -> Tensor:
        """Draw non-digits of strokes (M, 1, H, W): a quarter letters, a quarter altered digits."""
        return _pick(self._written, count)

    def draw_painted(self, count: int) -> Tensor:
        """Draw filled shapes, clouds and plain paper (M, 1, H, W)."""
        return _pick(self._painted, count)


class PictureOutliers(Outliers):
    """A stock of images of no class for a folder of pictures, made from them or in their levels.

    Written are altered pictures and pen strokes, painted are filled shapes, noise and plain paper.
    """

    def __init__(self, pictures: Tensor, labels: Tensor, seed: int) -> None:
        _, strokes, filled = _draw(seed, pictures.device)  # a letter may be a class
        torch.manual_seed(seed)
        part = STOCK // 4
        # Pairs of different classes: the second is one of those after the first's in their order.
        order, sizes = labels.argsort(stable=True), labels.bincount()
        first = torch.randint(len(labels), (3, part), device=labels.device)
        label = labels[first]
        skipped = torch.rand(first.shape, device=labels.device) * (len(labels) - sizes[label])
        second = order[(sizes.cumsum(0)[label] + skipped.long()) % len(labels)]
        (cut, split, side), (cut_by, split_by, side_by) = pictures[first], pictures[second]
        # Halves of two pictures, each in the place of the other half, or next to each other.
        across = torch.cat([cut[..., HALF:], cut_by[..., :HALF]], dim=-1)
        down = torch.cat([split[..., HALF:, :], split_by[..., :HALF, :]], dim=-2)
        pairs = torch.cat([side[..., ::2], side_by[..., 1::2]], dim=-1)
        # Half a picture on its own paper, cut in any direction.
        whole, way = _pick(pictures, part), torch.randn(part, 2, device=labels.device)
        is_hidden = (way @ _pixels(labels.device).T > 0).view_as(whole)
        half = torch.where(is_hidden, find_paper(whole).to(torch.uint8), whole)
        # Pen strokes in the levels of a picture's paper and of the pixel that differs most from it.
        models = _pick(pictures, len(strokes)).float()
        paper = find_paper(models)
        away = (models - paper).flatten(1)
        ink = away.gather(1, away.abs().argmax(dim=1, keepdim=True)).view(-1, 1, 1, 1)
        drawn = (paper + ink * (strokes / 255)).round().to(torch.uint8)
        drawn = torch.where(_coin(len(drawn), labels.device), drawn, 255 - drawn)
        self._written = torch.cat([across, down, pairs, half, drawn])
        # Noise, and plain paper: half of them without noise, half on the paper of a picture.
        level, deviation = _share(2, STOCK, 1, 1, 1, device=labels.device)
        paper = find_paper(_pick(pictures, STOCK))
        level = torch.where(_coin(STOCK, labels.device), paper, 255 * level)
        grain = torch.randn(STOCK, 1, SIDE, SIDE, device=labels.device)
        noise = level + 100 * (2 * deviation - 1).clamp(min=0) * grain
        self._painted = torch.cat([filled, noise.clamp(0, 255).to(torch.uint8)])


@cache
def _draw(seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return letters, twice as many stroke drawings, and filled shapes: uint8 (M, 1, H, W) each."""
    torch.manual_seed(seed)
    kinds = ((_draw_letters, STOCK), (_draw_strokes, 2 * STOCK), (_draw_filled, STOCK))
    drawn = [torch.cat([make(PIECE, device) for _ in range(n // PIECE)]) for make, n in kinds]
    return tuple((255 * ink).round().to(torch.uint8) for ink in drawn)


def _turn(digits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return `count` digits turned or mirrored so that they are no longer digits."""
    ways = _allowed_turns(labels.device)[labels]  # (B, 8): 1 where allowed
    chosen = torch.multinomial(ways.sum(dim=1) + 1e-9, count, replacement=True)
    way = torch.multinomial(ways[chosen] + 1e-9, 1).view(-1, 1, 1, 1)  # (M, 1, 1, 1)
    things = digits[chosen]
    things = torch.where(way & 4 > 0, things.mT, things)
    things = torch.where(way & 2 > 0, things.flip(-1), things)
    return torch.where(way & 1 > 0, things.flip(-2), things)


@cache
def _allowed_turns(device: torch.device) -> Tensor:
    """Return which turns are allowed for each digit: 1 or 0, (10, 8)."""
    allowed = [[float(turn in TURNS.get(digit, ())) for turn in range(8)] for digit in range(10)]
    return torch.tensor(allowed, device=device)


def _pick(things: Tensor, count: int) -> Tensor:
    return things[torch.randint(len(things), (count,), device=things.device)]


def _draw_letters(count: int, device: torch.device) -> Tensor:
    """Draw letters with an unsteady hand: narrow or wide, upright or slanted, some with serifs."""
    every = torch.tensor(read_letters(), device=device)  # (V, S, 3, 2)
    chosen = torch.randint(len(every), (count,), device=device)
    points = every[chosen]  # (M, S, 3, 2)
    # Moving the points of the grid keeps strokes that meet together.
    moves = torch.randn(count, GRID * GRID, 2, device=device) * 0.3
    places = (points.round().clamp(0, GRID - 1) @ points.new_tensor([1.0, GRID])).long()
    points = points + moves.gather(1, places.view(count, -1, 1).expand(-1, -1, 2)).view_as(points)
    across, down = points.unbind(dim=-1)
    wide, slant = _share(2, count, 1, 1, device=device)
    across = across * (0.6 + 0.7 * wide) - down * (slant - 0.4) * 0.4
    strokes = torch.stack([down, across], dim=-1)[:, :, None]  # (M, S, 1, 3, 2)
    return _draw_ink(strokes, contrast=_share(count, 1, device=device) * 0.7)


def _draw_strokes(count: int, device: torch.device) -> Tensor:
    """Draw strokes between the points of a jittered lattice, or one long line; some mirrored.

    The ink is 0 to 1.
    """
    is_walk, is_line = _coin(count, device), _coin(count, device, 0.8)
    # A walk is the path of a wandering pen: at each point it turns, by a little or by a lot.
    unsteady, bias = 1.2 + 1.3 * _share(count, 1, device=device), _spread(count, 1, device=device)
    turns = unsteady * torch.randn(count, STROKES + 2, device=device) + 1.2 * bias
    heading = turns.cumsum(dim=1)
    length = torch.exp(0.4 * torch.randn(count, STROKES + 2, device=device))
    steps = torch.stack([heading.sin(), heading.cos()], dim=-1) * length[..., None]
    walks = _bend(steps.cumsum(dim=1)[:, :, None])
    curls = _bend(_spread(count, STROKES + 2, 1, 2, device=device) * 1.4)  # between random points
    # Segments: half of them begin where the previous one ends, and half are straight.
    shape = (count, STROKES, 1, 2)
    ends = torch.randint(-1, 2, (2, *shape), device=device) + _spread(2, *shape, device=device) / 8
    begin, end = ends
    goes_on, is_bent = torch.rand(2, *shape[:-1], 1, device=device) < 0.5
    begin = torch.where(goes_on, end.roll(1, dims=1), begin)
    bends = (begin + end) / 2 + _spread(*shape, device=device) * 1.2 * is_bent
    segments = (begin, bends, end)
    first, second, third = (
        torch.where(is_line, torch.where(is_walk, walk, curl), segment)
        for walk, curl, segment in zip(walks, curls, segments, strict=True)
    )
    least = torch.where(is_line, torch.where(is_walk, 8, 5), 4)  # a shorter walk may be a digit
    most = torch.where(is_line, STROKES, 6)
    used = least + (torch.rand(count, 1, 1, 1, device=device) * (most - least + 1)).int()
    is_used = torch.arange(STROKES, device=device).view(1, -1, 1, 1) < used
    parts = [torch.where(is_used, part, first[:, :1]) for part in (first, second, third)]
    ink = _draw_ink(torch.stack(parts, dim=3), contrast=torch.zeros(count, 1, device=device))
    return torch.where(_coin(count, device, 0.25), torch.maximum(ink, ink.flip(-1)), ink)


def _draw_ink(strokes: Tensor, contrast: Tensor) -> Tensor:
    """Draw strokes (M, S, 1, 3, 2) as ink (M, 1, H, W), 0 to 1, with one width and size an image.

    Horizontal parts are thinner, by the `contrast` (M, 1), 0 to 1.
    """
    count, device = len(strokes), strokes.device
    first, second, third = strokes.unbind(dim=3)  # begins at, bends towards, ends at
    along = torch.linspace(0, 1, POINTS, device=device)[:, None]  # (P, 1)
    paths = (1 - along) ** 2 * first + 2 * along * (1 - along) * second + along**2 * third
    ways = 2 * (1 - along) * (second - first) + 2 * along * (third - second)  # (M, S, P, 2)
    length = ways.norm(dim=-1).flatten(1)  # (M, S P)
    level = ways[..., 1].abs().flatten(1) / length.clamp(min=1e-6)
    paths = paths.flatten(1, 2)  # (M, P, 2), of all strokes; next, centred on their mass:
    least, most = paths.amin(dim=1, keepdim=True), paths.amax(dim=1, keepdim=True)
    half = ((most - least) / 2).amax(dim=2, keepdim=True).clamp(min=0.1)  # of the longer side
    mass = length / length.sum(dim=1, keepdim=True)
    paths = (paths - (paths * mass[:, :, None]).sum(dim=1, keepdim=True)) / half
    paths = paths * (8 + 2 * _share(count, 1, 1, device=device))
    width = 0.5 + 1.8 * _share(count, 1, device=device) ** 2  # half of it, in pixels
    width = (width * (1 - contrast * level)).clamp(min=0.5)
    return (0.5 - _measure_distances(paths, width)).clamp(0, 1)


def _measure_distances(paths: Tensor, width: Tensor) -> Tensor:
    """Return each pixel's distance (M, 1, H, W) from discs around points (M, P, 2), radius (M, P).

    In pixels: 0 is on the rim, below 0 inside; 1 for pixels farther than NEAR from every point.
    """
    side = SIDE + 2 * NEAR  # with a margin, which takes what is outside of the image
    near = torch.arange(-NEAR, NEAR + 1, device=paths.device)  # (N,)
    places = paths + (SIDE - 1) / 2  # (M, P, 2), counted from the middle of the first pixel
    pixels = places.round()[..., None] + near  # (M, P, 2, N): rows, and columns
    down, across = (pixels - places[..., None]).square().unbind(dim=2)  # (M, P, N) each
    away = (down[..., None] + across[..., None, :]).sqrt_().sub_(width[..., None, None])
    row, column = (pixels + NEAR).clamp(0, side - 1).long().unbind(dim=2)
    pixel = (side * row)[..., None] + column[..., None, :]  # (M, P, N, N)
    field = away.new_ones(len(paths), side * side)
    field.scatter_reduce_(1, pixel.flatten(1), away.flatten(1), "amin")
    framed: Tensor = field.view(-1, 1, side, side)
    return framed[:, :, NEAR:-NEAR, NEAR:-NEAR]


def _bend(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for strokes without corners: a quadratic spline along (M, S + 2, 1, 2)."""
    halfway = (points[:, 1:] + points[:, :-1]) / 2  # (M, S + 1, 1, 2)
    return halfway[:, :-1], points[:, 1:-1], halfway[:, 1:]


def _draw_filled(count: int, device: torch.device) -> Tensor:
    """Draw boxes, ellipses and blobs of cloudy gray, on paper or all over it; some inverted.

    Some are without clouds, some have one gray level only, and some are spots of full ink.
    """
    middle, size = _spread(2, count, 1, device=device) * 4, _share(2, count, 1, device=device) * 14
    x, y = (_pixels(device).T[:, None] - middle) / (size + 2)  # (M, H W) each
    corner = 2 + 6 * _share(count, 1, device=device)  # exponent: 2 is an ellipse, 8 nearly a box
    spot = (x.abs() ** corner + y.abs() ** corner < 1).view(-1, 1, SIDE, SIDE)
    blob = _clouds(count, 4, device) > 0.5
    everywhere = _coin(count, device, 0.2)
    inside = torch.where(_coin(count, device), spot, blob & spot.roll(1, dims=0)) | everywhere
    grain = int(torch.randint(2, SIDE // 2, ()))
    contrast, level = _share(2, count, 1, 1, 1, device=device)
    ink = (level + (_clouds(count, grain, device) - 0.5) * 2 * contrast).clamp(0, 1) * inside
    ink = torch.where(_coin(count, device), ink, 1 - ink)
    is_spot = _coin(count, device) & (size.amin(dim=0) > SPOT).view(-1, 1, 1, 1)
    return torch.where(is_spot, spot, ink)


def _clouds(count: int, grain: int, device: torch.device) -> Tensor:
    """Return smooth noise (M, 1, H, W) from 0 to 1, with `grain` grains on each side."""
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
    """Return the pixels' coordinates (H W, 2), from the middle of the image."""
    place = torch.arange(SIDE, device=device) - (SIDE - 1) / 2
    return torch.cartesian_prod(place, place)


SERIF = 1.2  # from its middle to its end
# Strokes of letters. A point is two figures, x and y. "-" draws a line to the next point; "(point)"
# a curve to the next point that bends towards the one in brackets. A blank lifts the pen.
WAYS = (
    *("08-30-68 15-55", "08-30-68 16-56", "00-08 00-30(60)62(64)34-04 34(64)66(68)38-08"),  # A A B
    *("62(60)40(00)04(08)48(68)66", "00-08 00-20(60)64(68)28-08"),  # C D
    *("60-00-08-68 04-54", "60-00-08 04-54"),  # E F
    *("62(60)40(00)04(08)38(68)64-34", "62(60)40(00)04(08)38(68)65 35-65-68"),  # G
    *("00-08 60-68 04-64", "50-56(58)38(18)16", "20-60 40-46(48)28(08)06"),  # H J
    *("00-08 60-04-68", "00-08-58", "08-00-36-60-68", "08-10-36-50-68"),  # K L M
    *("08-00-68-60", "00-08 00-30(60)62(64)34-04"),  # N P
    *("30(60)64(68)38(08)04(00)30 46-79", "00-08 00-30(60)62(64)34-04 34-68"),  # Q R
    *("00-60 30-38", "00-05(08)38(68)65-60", "00-38-60", "00-28-42-68-80"),  # T U V W
    *("00-68 60-08", "00-34-60 34-38"),  # X Y
    *("11(10)30(60)63-68 64-34(04)06(08)28(58)65", "50-58 52(50)30(00)04(08)38(58)56"),  # a a
    "12(10)30(50)53-56(58)78 53-34(04)06(08)28(48)55",  # a
    *("62(60)30(00)04(08)38(68)66", "60-68 65(63)33(03)05(08)38(68)66"),  # c d
    *("04-64(60)30(00)04(08)38(58)67", "60(20)23-28 03-53"),  # e f
    *("00-08 06(03)33(63)65-68", "33-38 30-31", "43-46(48)28(18)17 40-41"),  # h i j
    *("00-08 53-05-58", "03-08 05(03)23(43)45-48 45(43)63(83)85-88"),  # k m
    *("00-08 03(00)30(60)63-68", "00-08 02(00)30(60)62(65)35(05)03"),  # n p
    *("00-08 04(00)40(50)51", "20-26(28)48(58)57 02-52", "30-38 02-62"),  # r t
    *("00-05(08)28(58)55 50-58", "00-34 60-08", "20-26(28)08"),  # u y J
    # Signs and small drawings that do not look like digits.
    *("04-64 31-37", "03-63 05-65", "20-28 40-48 03-63 05-65"),  # + = #
    *("02(00)30(60)62(63)44(34)35 38-38", "68-12(10)30(50)42-15(08)28(58)64"),  # ? &
    "01(00)10(20)21(22)12(02)01 60-08 47(46)56(66)67(68)58(48)47",  # %
    *("05-28-80", "04-84 62-84-66", "30-68-08-30", "04-30-64-68-08-04"),  # tick arrow hut house
    "32(30)10(00)02(04)38(64)62(60)50(30)32",  # heart
    "04(00)40(80)84(88)48(08)04 22-23 62-63 25(47)65",  # face
)


Point = tuple[float, float]
Stroke = tuple[Point, Point, Point]  # where it begins, what it bends towards, where it ends


def read_letters() -> list[list[Stroke]]:
    """Return STROKES strokes for each way to write a letter, then for each with serifs.

    Coordinates are 0 to 9. A letter with fewer strokes is padded with copies of its first point.
    """
    plain, with_serifs = [read_strokes(way) for way in WAYS], []
    for strokes in plain:
        # A dash at each place at the top (0) or the bottom (8) where exactly one stroke ends.
        ends = [point for stroke in strokes for point in (stroke[0], stroke[2])]
        serifs = [
            ((x - SERIF, y), (x, y), (x + SERIF, y))
            for x, y in dict.fromkeys(ends)
            if y in (0, 8) and ends.count((x, y)) == 1
        ]
        with_serifs.append([*strokes, *serifs])
    return [
        [*strokes, *[(strokes[0][0],) * 3] * (STROKES - len(strokes))]
        for strokes in (*plain, *with_serifs)
    ]


def read_strokes(way: str) -> list[Stroke]:
    """Return the strokes of one string of `WAYS`."""
    strokes: list[Stroke] = []
    for path in way.split():
        x, y = map(float, path[:2])
        for bend, end in re.findall(r"(?:-|\((\d\d)\))(\d\d)", path[2:]):
            last_x, last_y = map(float, end)
            bend_x, bend_y = map(float, bend or ((x + last_x) / 2, (y + last_y) / 2))
            strokes.append(((x, y), (bend_x, bend_y), (last_x, last_y)))
            x, y = last_x, last_y
    return strokes
