"""Whether counts differ from a reference's by more than is allowed, and not by chance.

Each test takes for granted that a shift up to `allowed` may be there, so that its p-value says how
probable so large a one is where the true shift is no larger than allowed: of however many images,
a harmless difference raises no alarm. Needs numpy only.
"""

# Shape letters: K classes, E bins.

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shift:
    """How far something lies from its reference."""

    effect: float  # of a share its change, signed; of a distribution Kolmogorov's D, 0 to 1
    allowed: float  # up to which it is none
    statistic: float  # z, or Kolmogorov's lambda, of what lies beyond
    p: float  # 0 to 1
    at: int  # the class or the upper edge where it is seen best


def share_shift(known: int, of: int, found: int, images: int, allowed: float) -> Shift:
    """How far the share `found` of `images` lies from `known` of `of`, beyond `allowed`.

    Shares are compared as arcsines of their roots, whose variance is 1/(4n) whatever they are
    (Anscombe 1948; twice that is Cohen's h), so that z is normal for small shares as well.
    """
    before, now = (known + 3 / 8) / (of + 3 / 4), (found + 3 / 8) / (images + 3 / 4)
    edge = min(1.0, before + allowed) if now > before else max(0.0, before - allowed)
    beyond = abs(_arcsine(now) - _arcsine(before)) - abs(_arcsine(edge) - _arcsine(before))
    z = beyond / math.sqrt(1 / images + 1 / of)
    return Shift(found / images - known / of, allowed, z, math.erfc(z / math.sqrt(2)) / 2, 0)


def _arcsine(share: float) -> float:
    return 2 * math.asin(math.sqrt(share))


def largest_share_shift(
    known: np.ndarray, found: np.ndarray, relative: float, least: float
) -> Shift:
    """The shift of the class whose share moved most significantly, from counts (K,) of each.

    Allowed is `relative` of the class's own share, at least `least`; the p-value is Bonferroni's
    for looking at K classes.
    """
    of, images = int(known.sum()), int(found.sum())
    shifts = [
        share_shift(int(before), of, int(now), images, max(least, relative * int(before) / of))
        for before, now in zip(known, found, strict=True)
    ]
    at = min(range(len(shifts)), key=lambda index: (shifts[index].p, -abs(shifts[index].effect)))
    worst = shifts[at]
    return Shift(worst.effect, worst.allowed, worst.statistic, min(1.0, len(shifts) * worst.p), at)


def distribution_shift(known: np.ndarray, found: np.ndarray, allowed: float) -> Shift:
    """The largest difference of two distributions, from their counts (E,) in the same bins.

    The two-sample test of Kolmogorov and Smirnov, of D less what is allowed, with Stephens's
    correction for few images. Bins make it milder, never sharper: D is looked for at edges only.
    """
    of, images = int(known.sum()), int(found.sum())
    apart = found.cumsum() / images - known.cumsum() / of  # (E,)
    at = int(np.abs(apart).argmax())
    root = math.sqrt(of * images / (of + images))
    statistic = max(0.0, abs(float(apart[at])) - allowed) * (root + 0.12 + 0.11 / root)
    return Shift(float(apart[at]), allowed, statistic, kolmogorov(statistic), at + 1)


def kolmogorov(statistic: float) -> float:
    """How probable it is that Kolmogorov's statistic comes out so large or larger by chance."""
    if statistic < 0.2:  # the series converges no more, and it is 1 to 12 digits
        return 1.0
    terms = (-2.0 * (-1.0) ** k * math.exp(-2 * (k * statistic) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, sum(terms)))


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """P-values by name, adjusted for there being several of them (Holm 1979)."""
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(chances, key=lambda name: chances[name])):
        largest = max(largest, min(1.0, (len(chances) - place) * chances[name]))
        adjusted[name] = largest
    return adjusted
