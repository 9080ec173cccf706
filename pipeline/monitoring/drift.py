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

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.files import write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.monitoring.log import Logged, read_log
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
    drifted: bool = False

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
        title = (
            f"{self.images:,} predictions of {self.name} version {version}, {self.first} to "
            f"{self.last}, against {self.profile.images:,} images of {self.profile.images_from}"
        )
        columns = f"{'effect':>7} {'allowed':>7} {'statistic':>9} {'p':>8}"
        header = f"{'':<11} {'largest difference':<44} {columns}"
        rule = f"drift: larger than allowed, and unlikely by chance (p below {self.alpha:g})"
        notes = [f"{name}: not checked" for name in self.unchecked]
        if self.others:
            others = [f"{count:,} of {model}" for model, count in self.others.items()]
            more = " and others" if len(others) > LISTED else ""
            notes.append(f"left out, because of other models: {', '.join(others[:LISTED])}{more}")
        if self.unreadable:
            notes.append(f"left out, because not readable: {self.unreadable:,} lines")
        if self.lost:
            notes.append(f"missing, because not written: {self.lost:,} predictions")
        return Lines(title, header, *self.checks, rule, *notes)


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
        others = [f"{count:,} of {model}" for model, count in logged.others.most_common(LISTED)]
        other = f". It also has {', '.join(others)}: use --name, --model-version" if others else ""
        raise PipelineError(
            f"{log} has {len(logged.entries):,} predictions of {profile.name} with sha256 "
            f"{profile.sha256[:12]}: too few, at least {config.least} are needed{other}"
        )
    drift = replace(compare_log(profile, logged, config), log=str(log), reference=str(where))
    write_json(paths.drift, drift.record())
    return drift


def require_none(drift: Drift) -> None:
    """Raise CheckFailedError if any check drifted."""
    if drift.drifted:
        names = ", ".join(drift.drifted)
        raise CheckFailedError(f"{drift.name} drifted: {names}. Find the cause, or train it again")


def compare_log(
    profile: ReferenceProfile, logged: Logged, config: DriftConfig = DriftConfig()
) -> Drift:
    """Compare predictions of one model file with its reference profile.

    Raises PipelineError if there is a class that the profile does not have.
    """
    entries, images = logged.entries, len(logged.entries)
    labels = Counter(profile.group_of(entry.label) for entry in entries)
    if unknown := labels.keys() - set(profile.classes):
        names = ", ".join(sorted(unknown)[:LISTED])
        raise PipelineError(f"the log is of another model: {profile.name} has no class {names}")
    inks = [entry.ink for entry in entries if entry.ink is not None]
    has_ink = profile.ink_counts is not None and len(inks) == images
    sure = [entry.is_sure for entry in entries]
    confidences = np.array([entry.probability for entry in entries])
    now = replace(  # as the reference profile counts
        profile,
        images=images,
        class_counts=tuple(labels[label] for label in profile.classes),
        confidence_counts=count_bins(confidences, profile.confidence_edges),
        ink_counts=count_bins(np.array(inks), profile.ink_edges) if has_ink else None,
        unsure=None if None in sure else sure.count(False),
    )
    checks = _run_checks(profile, now, config)
    chances = holm({check.name: check.p for check in checks})
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
            replace(check, p=chances[check.name], drifted=chances[check.name] < config.alpha)
            for check in checks
        ),
        unchecked=tuple(name for name in ("ink", "not sure") if name not in chances),
        class_counts=now.class_counts,
        confidence_counts=now.confidence_counts,
        ink_counts=now.ink_counts,
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

    def as_check(self, name: str, test: str, said: str) -> DriftCheck:
        """Return the check before the adjustment of its p-value."""
        return DriftCheck(name, test, said, self.effect, self.allowed, self.statistic, self.p)


def share_shift(before: int, of: int, now: int, images: int, allowed: float) -> Shift:
    """Test whether the share `now / images` differs from `before / of` by more than `allowed`.

    Compares the arcsines of the shares' square roots, whose variance is 1/(4n) for any share
    (Anscombe 1948; Cohen's h is twice their difference), so z is normal for small shares as well.
    """
    old, new = (before + 3 / 8) / (of + 3 / 4), (now + 3 / 8) / (images + 3 / 4)
    edge = min(1.0, old + allowed) if new > old else max(0.0, old - allowed)
    beyond = abs(_arcsine(new) - _arcsine(old)) - abs(_arcsine(edge) - _arcsine(old))
    z = beyond / math.sqrt(1 / images + 1 / of)
    return Shift(now / images - before / of, allowed, z, math.erfc(z / math.sqrt(2)) / 2, 0)


def _arcsine(share: float) -> float:
    return 2 * math.asin(math.sqrt(share))


def largest_share_shift(before: np.ndarray, now: np.ndarray, rate: float, least: float) -> Shift:
    """Return the most significant shift of a class's share, from counts (K,) of both sides.

    A class's share may change by `rate` times itself, or by `least` if that is larger. The
    p-value has Bonferroni's correction for K classes.
    """
    of, images = int(before.sum()), int(now.sum())
    shifts = [
        share_shift(old, of, new, images, max(least, rate * old / of))
        for old, new in zip(before.tolist(), now.tolist(), strict=True)
    ]
    at = min(range(len(shifts)), key=lambda index: (shifts[index].p, -abs(shifts[index].effect)))
    return replace(shifts[at], p=min(1.0, len(shifts) * shifts[at].p), at=at)


def distribution_shift(before: np.ndarray, now: np.ndarray, allowed: float) -> Shift:
    """Test for a difference of two distributions, from their counts (E,) in the same bins.

    This is the two-sample Kolmogorov-Smirnov test of D minus `allowed`, with Stephens's correction
    for few images. Bins make it less sensitive, never more: D is computed only at their edges.
    """
    of, images = int(before.sum()), int(now.sum())
    differences = now.cumsum() / images - before.cumsum() / of  # (E,)
    at = int(np.abs(differences).argmax())
    effect, root = float(differences[at]), math.sqrt(of * images / (of + images))
    statistic = max(0.0, abs(effect) - allowed) * (root + 0.12 + 0.11 / root)
    return Shift(effect, allowed, statistic, kolmogorov(statistic), at + 1)


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


Counts = tuple[int, ...]  # of predictions, by class or by bin
Edges = tuple[float, ...]  # of bins


def _run_checks(
    before: ReferenceProfile, now: ReferenceProfile, config: DriftConfig
) -> list[DriftCheck]:
    """Return the checks for which both have data, before Holm's adjustment."""
    counts = np.array(before.class_counts), np.array(now.class_counts)
    shift = largest_share_shift(*counts, config.class_share, config.class_least)
    at, of, images = shift.at, before.images, now.images
    change = _format_change(before.class_counts[at] / of, now.class_counts[at] / images)
    edges, pair = before.confidence_edges, (before.confidence_counts, now.confidence_counts)
    checks = [
        shift.as_check("classes", ARCSINE, f"class {before.classes[at]}: {change}"),
        _compare_bins("confidence", edges, *pair, config.confidence),
    ]
    if before.ink_counts is not None and now.ink_counts is not None:
        edges, pair = before.ink_edges, (before.ink_counts, now.ink_counts)
        checks.append(_compare_bins("ink", edges, *pair, config.ink))
        checks.append(_compare_tails(edges, *pair, config))
    if before.unsure is not None and now.unsure is not None:
        shift = share_shift(before.unsure, of, now.unsure, images, config.unsure)
        change = _format_change(before.unsure / of, now.unsure / images)
        checks.append(shift.as_check("not sure", ARCSINE, change))
    return checks


def _format_change(before: float, now: float) -> str:
    return f"{before:.1%} -> {now:.1%}"


def _compare_bins(name: str, edges: Edges, before: Counts, now: Counts, limit: float) -> DriftCheck:
    shift = distribution_shift(np.array(before), np.array(now), limit)
    change = _format_change(*(sum(counts[: shift.at]) / sum(counts) for counts in (before, now)))
    return shift.as_check(name, SMIRNOV, f"{name} below {edges[shift.at]:.6g}: {change}")


def _compare_tails(edges: Edges, before: Counts, now: Counts, config: DriftConfig) -> DriftCheck:
    """Test the share in the reference's tails.

    A few unusual images do not move the whole distribution, so the test for "ink" misses them.
    """
    counts, of, images = np.array(before), sum(before), sum(now)
    low = int((counts.cumsum() <= config.tail * of).sum())
    high = len(counts) - int((counts[::-1].cumsum() <= config.tail * of).sum())
    old, new = (sum(c[:low]) + sum(c[high:]) for c in (before, now))
    shift = share_shift(old, of, new, images, config.unusual_ink)
    change = f"{edges[low]:g} to {edges[high]:g}: {_format_change(old / of, new / images)}"
    return shift.as_check("unusual ink", ARCSINE, f"ink outside {change}")
