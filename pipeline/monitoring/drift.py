"""Comparison of a prediction log with the model's reference profile.

Tests whether counts differ from the reference's by more than is allowed and by more than chance.

The null hypothesis of each test is a true shift of at most `allowed`. The p-value is the
probability, under it, of a shift at least as large as the observed one. So a harmless difference
raises no alarm, however many images there are. Needs only numpy.
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
from pipeline.repository.reference_profile import ReferenceProfile, count_bins
from pipeline.repository.release import find_profile

LISTED = 3  # other models, or unknown classes, that a message names at most
ARCSINE, SMIRNOV = "arcsine z", "Kolmogorov-Smirnov lambda"


@dataclass(frozen=True)
class DriftConfig:
    """Thresholds above which a difference counts as drift. Shares are from 0 to 1."""

    alpha: float = 0.05  # largest probability of a false alarm, over all checks together
    class_share: float = 0.10  # allowed change of a class's share, relative to that share
    class_least: float = 0.005  # allowed change of a class's share in any case, absolute
    confidence: float = 0.10  # allowed Kolmogorov's D (0 to 1) of the confidence
    ink: float = 0.15  # allowed D of ink; the two halves of MNIST's test split differ by 0.13
    unusual_ink: float = 0.015  # allowed change of the share in the reference's tails
    tail: float = 0.005  # share of the reference's images in each tail
    unsure: float = 0.02  # allowed change of the share of "not sure"
    least: int = 200  # number of predictions below which no test is made


@dataclass(frozen=True)
class DriftCheck:
    """One property of the predictions, and whether it drifted."""

    name: str
    test: str
    said: str  # text: where the largest difference is
    effect: float
    allowed: float
    statistic: float
    p: float  # 0 to 1, adjusted for the number of checks
    drifted: bool

    @property
    def chance(self) -> str:
        """The p-value as text."""
        return f"{self.p:.2g}" if self.p else "<1e-300"

    def __str__(self) -> str:
        return (
            f"{self.name:<11} {self.said:<44} {self.effect:>+7.3f} {self.allowed:>7.3f} "
            f"{self.statistic:>9.2f} {self.chance:>8}  {'DRIFT' if self.drifted else 'ok'}"
        )


@dataclass(frozen=True)
class Drift:
    """Result of the comparison of a log with the reference profile from the model's validation."""

    log: str
    name: str
    versions: tuple[str, ...]  # under which the model file was served
    sha256: str
    reference: str  # path of the profile
    images: int
    first: str  # time of the first prediction, in UTC; `last` as well
    last: str
    others: dict[str, int]  # model -> its predictions, which were left out
    unreadable: int  # lines that were left out
    lost: int  # predictions that could not be written, as the log states
    alpha: float
    checks: tuple[DriftCheck, ...]
    unchecked: tuple[str, ...]  # checks for which the profile or the log has no data
    class_counts: tuple[int, ...]
    confidence_counts: tuple[int, ...]
    ink_counts: tuple[int, ...] | None
    profile: ReferenceProfile

    @property
    def drifted(self) -> tuple[str, ...]:
        return tuple(check.name for check in self.checks if check.drifted)

    def record(self) -> dict[str, Any]:
        """Return the result as values that JSON can store, with the time and the machine."""
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
    """Compare the log with the reference profile of the selected version, and write drift.json.

    `reference` (a file) or `version` chooses another profile; `since` and `last` (a number of
    predictions) leave earlier predictions out. The record goes to exported/<name>/drift.json.
    Raises PipelineError if there is no profile, or if the log has fewer than `config.least`
    predictions of the profile's model file.
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
    """Raise CheckFailedError if any check drifted."""
    if drift.drifted:
        raise CheckFailedError(
            f"{drift.name} drifted: {', '.join(drift.drifted)}. Look at what it is asked (the "
            "camera, the form, who asks); train on such images if they are to stay"
        )


def compare_log(
    profile: ReferenceProfile, logged: Logged, config: DriftConfig = DriftConfig()
) -> Drift:
    """Compare predictions of one model file with its reference profile.

    Raises PipelineError if there is a class that the profile does not have.
    """
    entries, images = logged.entries, len(logged.entries)
    labels = Counter(entry.label for entry in entries)
    if strange := labels.keys() - set(profile.classes):
        raise PipelineError(
            f"predictions of {', '.join(sorted(strange)[:LISTED])}, classes that {profile.name} "
            "has not: the log or the profile is another model's"
        )
    classes = tuple(labels[label] for label in profile.classes)
    confidence = count_bins(np.array([e.probability for e in entries]), profile.confidence_edges)
    inks = [entry.ink for entry in entries if entry.ink is not None]
    has_ink = profile.ink_counts is not None and len(inks) == images
    ink = count_bins(np.array(inks), profile.ink_edges) if has_ink else None
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
    """Difference of a share or a distribution from the reference, with its test."""

    effect: float  # signed: the change of a share, or Kolmogorov's D (-1 to 1)
    allowed: float  # largest effect that is not drift
    statistic: float  # z, or Kolmogorov's lambda, of the part beyond `allowed`
    p: float  # 0 to 1
    at: int  # index of the class, or of the upper edge, where it is largest


def share_shift(known: int, of: int, found: int, images: int, allowed: float) -> Shift:
    """Test whether the share `found / images` differs from `known / of` by more than `allowed`.

    Compares the arcsines of the shares' square roots, whose variance is 1/(4n) for any share
    (Anscombe 1948; Cohen's h is twice their difference), so z is normal for small shares as well.
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
    """Return the most significant shift of a class's share, from counts (K,) of both sides.

    A class's share may change by `relative` times itself, or by `least` if that is larger. The
    p-value has Bonferroni's correction for K classes.
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
    """Test for a difference of two distributions, from their counts (E,) in the same bins.

    This is the two-sample Kolmogorov-Smirnov test of D minus `allowed`, with Stephens's correction
    for few images. Bins make it less sensitive, never more: D is computed only at their edges.
    """
    of, images = int(known.sum()), int(found.sum())
    apart = found.cumsum() / images - known.cumsum() / of  # (E,)
    at = int(np.abs(apart).argmax())
    root = math.sqrt(of * images / (of + images))
    statistic = max(0.0, abs(float(apart[at])) - allowed) * (root + 0.12 + 0.11 / root)
    return Shift(float(apart[at]), allowed, statistic, kolmogorov(statistic), at + 1)


def kolmogorov(statistic: float) -> float:
    """Return the probability that Kolmogorov's statistic is at least this large by chance."""
    if statistic < 0.2:  # the series does not converge here; to 12 digits, the result is 1
        return 1.0
    terms = (-2.0 * (-1.0) ** k * math.exp(-2 * (k * statistic) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, sum(terms)))


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values, by name, for the number of tests (Holm 1979)."""
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(chances, key=lambda name: chances[name])):
        largest = max(largest, min(1.0, (len(chances) - place) * chances[name]))
        adjusted[name] = largest
    return adjusted


# Counts of predictions by class, by confidence, by ink (None: unknown), and of those not sure.
Counted = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, int]
Found = tuple[Shift, str, str]  # with the test's name, and a text that says where the difference is


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
    """Test the share in the reference's tails.

    A few unusual images do not move the whole distribution, so the test for "ink" misses them.
    """
    counts, of, images = np.array(before), sum(before), sum(now)
    low = int((counts.cumsum() <= config.tail * of).sum())
    high = len(counts) - int((counts[::-1].cumsum() <= config.tail * of).sum())
    known, found = (sum(c[:low]) + sum(c[high:]) for c in (before, now))
    shift = share_shift(known, of, found, images, config.unusual_ink)
    bounds = f"ink outside {edges[low]:g} to {edges[high]:g}"
    return shift, ARCSINE, f"{bounds}: {known / of:.1%} -> {found / images:.1%}"
