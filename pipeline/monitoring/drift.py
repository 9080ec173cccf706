"""A prediction log held against the model's reference profile.

Whether counts differ from a reference's by more than is allowed, and not by chance.

Each test takes for granted that a shift up to `allowed` may be there, so that its p-value says how
probable so large a one is where the true shift is no larger than allowed: of however many images,
a harmless difference raises no alarm. Needs numpy only.
"""

# Shape letters: N images, K classes, E bins.

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.client.log import Logged, read_log
from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.files import write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.repository.reference_profile import ReferenceProfile, binned
from pipeline.repository.release import find_profile

LISTED = 3  # other models, or strange classes, that are named
ARCSINE, SMIRNOV = "arcsine z", "Kolmogorov-Smirnov lambda"


@dataclass(frozen=True)
class DriftConfig:
    """From where on a difference is drift."""

    alpha: float = 0.05  # how probable a false alarm may be, over all checks together
    class_share: float = 0.10  # of a class's own rate, by which it may change
    class_least: float = 0.005  # and by so much in any case
    confidence: float = 0.10  # Kolmogorov's D: images whose confidence is not as it was
    ink: float = 0.15  # the same of ink; MNIST's two halves of the test split differ by 0.13
    unusual_ink: float = 0.015  # change of the share that lies in the reference's tails
    tail: float = 0.005  # of the reference's images, at either end
    unsure: float = 0.02  # change of the share of "not sure"
    least: int = 200  # predictions; fewer say too little


@dataclass(frozen=True)
class DriftCheck:
    """One property of the predictions, and whether it drifted."""

    name: str
    test: str
    said: str  # where the largest difference is, in words
    effect: float
    allowed: float
    statistic: float
    p: float  # adjusted for there being several checks
    drifted: bool

    @property
    def chance(self) -> str:
        """P as text."""
        return f"{self.p:.2g}" if self.p else "<1e-300"

    def __str__(self) -> str:
        return (
            f"{self.name:<11} {self.said:<44} {self.effect:>+7.3f} {self.allowed:>7.3f} "
            f"{self.statistic:>9.2f} {self.chance:>8}  {'DRIFT' if self.drifted else 'ok'}"
        )


@dataclass(frozen=True)
class Drift:
    """What a log says of a model, held against what the model was when it was proven."""

    log: str
    name: str
    versions: tuple[str, ...]  # in which the model file was served
    sha256: str
    reference: str  # where the profile lies
    images: int
    first: str  # time of the first prediction, UTC
    last: str
    others: dict[str, int]  # predictions of other models, which were left out
    unreadable: int  # lines
    lost: int  # predictions that the log says it lacks
    alpha: float
    checks: tuple[DriftCheck, ...]
    unchecked: tuple[str, ...]  # what the profile or the log says nothing of
    class_counts: tuple[int, ...]
    confidence_counts: tuple[int, ...]
    ink_counts: tuple[int, ...] | None
    profile: ReferenceProfile

    @property
    def drifted(self) -> tuple[str, ...]:
        return tuple(check.name for check in self.checks if check.drifted)

    def record(self) -> dict[str, Any]:
        """The result as JSON would have it, with when it was looked at."""
        return {"passed": not self.drifted, "drifted": self.drifted, **asdict(self), **machine()}

    def __str__(self) -> str:
        version = ", ".join(sorted(self.versions))
        head = (
            f"{'':<11} {'where it differs most':<44} {'effect':>7} {'allowed':>7} "
            f"{'statistic':>9} {'p':>8}"
        )
        said = (
            f"{self.images:,} predictions of {self.name} version {version}, {self.first} to "
            f"{self.last}, against {self.profile.images:,} images of {self.profile.images_from}"
        )
        rule = (
            f"drift is what lies beyond the allowed by more than chance explains: p below "
            f"{self.alpha:g}"
        )
        notes = [f"{name}: not checked" for name in self.unchecked]
        if self.others:
            named = list(self.others.items())[:LISTED]
            listed = ", ".join(f"{count:,} of {model}" for model, count in named)
            more = " and others" if len(self.others) > LISTED else ""
            notes.append(f"left out, as this profile is not theirs: {listed}{more}")
        if self.unreadable:
            notes.append(f"left out: {self.unreadable:,} lines that cannot be read")
        if self.lost:
            notes.append(f"the log lacks {self.lost:,} predictions that could not be written")
        return Lines(said, head, *self.checks, rule, *notes)


def watch_log(
    paths: Paths,
    log: Path,
    *,
    reference: Path | None = None,
    version: int | None = None,
    since: datetime | None = None,
    last: int | None = None,
    config: DriftConfig = DriftConfig(),
) -> Drift:
    """Hold the log against the profile of the packaged version that is selected, or another's.

    Written to exported/<name>/drift.json. Raises PipelineError where there is no profile, or
    where the log has too few predictions of the model file that it belongs to.
    """
    where, profile = find_profile(paths, reference, version)
    logged = read_log(log, profile.name, profile.sha256, since)
    if last:
        logged.entries = logged.entries[-last:]
    if len(logged.entries) < config.least:
        others = ", ".join(f"{count:,} of {model}" for model, count in logged.others.most_common(3))
        also = f" It has {others}: choose with --name, --model-version." if others else ""
        raise PipelineError(
            f"{log} has {len(logged.entries):,} predictions of {profile.name} with sha256 "
            f"{profile.sha256[:12]}: too few, {config.least} tell drift from chance.{also}"
        )
    drift = replace(compare_log(profile, logged, config), log=str(log), reference=str(where))
    write_json(paths.drift, drift.record())
    return drift


def require_none(drift: Drift) -> None:
    """Raise CheckFailedError where something drifted."""
    if drift.drifted:
        raise CheckFailedError(
            f"{drift.name} drifted: {', '.join(drift.drifted)}. Look at what it is asked (the "
            "camera, the form, who asks); train on such images if they are to stay"
        )


def compare_log(
    profile: ReferenceProfile, logged: Logged, config: DriftConfig = DriftConfig()
) -> Drift:
    """Hold predictions of one model file against its profile.

    Raises PipelineError for a class that the profile does not know.
    """
    entries, images = logged.entries, len(logged.entries)
    labels = Counter(entry.label for entry in entries)
    if strange := labels.keys() - set(profile.classes):
        raise PipelineError(
            f"predictions of {', '.join(sorted(strange)[:LISTED])}, classes that {profile.name} "
            "has not: the log or the profile is another model's"
        )
    classes = tuple(labels[label] for label in profile.classes)
    confidence = binned(np.array([e.probability for e in entries]), profile.confidence_edges)
    inks = [entry.ink for entry in entries if entry.ink is not None]
    has_ink = profile.ink_counts is not None and len(inks) == images
    ink = binned(np.array(inks), profile.ink_edges) if has_ink else None
    unsure = sum(not entry.is_sure for entry in entries)
    shifts = _shifts(profile, (classes, confidence, ink, unsure), config)
    chances = holm({name: shift.p for name, (shift, _, _) in shifts.items()})
    return Drift(
        log="",
        name=profile.name,
        versions=tuple(sorted(logged.versions)),
        sha256=profile.sha256,
        reference="",
        images=images,
        first=min(entry.time for entry in entries),
        last=max(entry.time for entry in entries),
        others={str(model): count for model, count in logged.others.most_common()},
        unreadable=logged.unreadable,
        lost=logged.lost,
        alpha=config.alpha,
        checks=tuple(
            DriftCheck(
                name,
                test,
                words,
                shift.effect,
                shift.allowed,
                shift.statistic,
                chances[name],
                chances[name] < config.alpha,
            )
            for name, (shift, test, words) in shifts.items()
        ),
        unchecked=tuple(name for name in ("ink", "not sure") if name not in shifts),
        class_counts=classes,
        confidence_counts=confidence,
        ink_counts=ink,
        profile=profile,
    )


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


# Predictions by class, by confidence, by ink (None: unknown), and how many were not sure.
Counted = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, int]
Found = tuple[Shift, str, str]  # with the test's name, and where the difference is, in words


def _shifts(profile: ReferenceProfile, now: Counted, config: DriftConfig) -> dict[str, Found]:
    classes, confidence, ink, unsure = now
    images = sum(classes)
    before, counts = np.array(profile.class_counts), np.array(classes)
    shift = largest_share_shift(before, counts, config.class_share, config.class_least)
    shares = f"{before[shift.at] / profile.images:.1%} -> {counts[shift.at] / images:.1%}"
    found = {"classes": (shift, ARCSINE, f"class {profile.classes[shift.at]}: {shares}")}
    found["confidence"] = _distribution(
        *("confidence", profile.confidence_edges, profile.confidence_counts),
        *(confidence, config.confidence),
    )
    if profile.ink_counts is not None and ink is not None:
        found["ink"] = _distribution("ink", profile.ink_edges, profile.ink_counts, ink, config.ink)
        found["unusual ink"] = _unusual(profile.ink_edges, profile.ink_counts, ink, config)
    if profile.unsure is not None:
        shift = share_shift(profile.unsure, profile.images, unsure, images, config.unsure)
        said = f"{profile.unsure / profile.images:.1%} -> {unsure / images:.1%}"
        found["not sure"] = (shift, ARCSINE, said)
    return found


def _distribution(
    name: str,
    edges: tuple[float, ...],
    before: tuple[int, ...],
    now: tuple[int, ...],
    allowed: float,
) -> Found:
    shift = distribution_shift(np.array(before), np.array(now), allowed)
    shares = [sum(counts[: shift.at]) / sum(counts) for counts in (before, now)]
    said = f"{name} below {edges[shift.at]:.6g}: {shares[0]:.1%} -> {shares[1]:.1%}"
    return shift, SMIRNOV, said


def _unusual(
    edges: tuple[float, ...], before: tuple[int, ...], now: tuple[int, ...], config: DriftConfig
) -> Found:
    """The share in the reference's tails: a few strange images move no whole distribution."""
    counts, of, images = np.array(before), sum(before), sum(now)
    low = int((counts.cumsum() <= config.tail * of).sum())
    high = len(counts) - int((counts[::-1].cumsum() <= config.tail * of).sum())
    known, found = (sum(c[:low]) + sum(c[high:]) for c in (before, now))
    shift = share_shift(known, of, found, images, config.unusual_ink)
    bounds = f"ink outside {edges[low]:g} to {edges[high]:g}"
    return shift, ARCSINE, f"{bounds}: {known / of:.1%} -> {found / images:.1%}"
