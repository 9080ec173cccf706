"""A prediction log held against the model's reference profile."""

# Shape letters: N images, K classes, E bins.

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import triton
from pipeline.errors import CheckFailedError, PipelineError
from pipeline.files import check_manifest, write_json
from pipeline.logged import Logged, read_log
from pipeline.machine import machine
from pipeline.paths import Paths
from pipeline.reference_profile import REMAKE, ReferenceProfile, binned, unpacked
from pipeline.significance import (
    Shift,
    distribution_shift,
    holm,
    largest_share_shift,
    share_shift,
)

LISTED = 3  # other models that are named


@dataclass(frozen=True)
class DriftConfig:
    """From where on a difference is drift."""

    alpha: float = 0.05  # how probable a false alarm may be, over all checks together
    class_share: float = 0.10  # of a class's own rate, by which it may change
    class_least: float = 0.005  # and by so much in any case
    confidence: float = 0.10  # Kolmogorov's D: images whose confidence is not as it was
    ink: float = 0.15  # the same of ink; MNIST's two halves of the test split differ by 0.13
    unsure: float = 0.02  # change of the share of "not sure"
    least: int = 200  # predictions; fewer say too little


@dataclass(frozen=True)
class Check:
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
    checks: tuple[Check, ...]
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
        return "\n".join([said, head, *map(str, self.checks), *self._notes()])

    def _notes(self) -> list[str]:
        notes = [f"{name}: not checked" for name in self.unchecked]
        named = list(self.others.items())[:LISTED]
        if self.others:
            more = " and others" if len(self.others) > LISTED else ""
            listed = ", ".join(f"{count:,} of {model}" for model, count in named)
            notes.append(f"left out, as this profile is not theirs: {listed}{more}")
        if self.unreadable:
            notes.append(f"left out: {self.unreadable:,} lines that cannot be read")
        if self.lost:
            notes.append(f"the log lacks {self.lost:,} predictions that could not be written")
        return notes


def watch(
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
    where, profile = _profile(paths, reference, version)
    logged = read_log(log, profile.name, profile.sha256, since)
    if last:
        logged.entries = logged.entries[-last:]
    if len(logged.entries) < config.least:
        raise PipelineError(_too_few(log, profile, logged, config.least))
    found = replace(compare(profile, logged, config), log=str(log), reference=str(where))
    write_json(paths.drift, found.record())
    return found


def require_none(found: Drift) -> None:
    """Raise CheckFailedError where something drifted."""
    if found.drifted:
        raise CheckFailedError(
            f"{found.name} does not get, or does not say, what it did when it was proven: "
            f"{', '.join(found.drifted)}. Look at what it is asked (the camera, the form, who "
            "asks); train on such images if they are to stay"
        )


def compare(
    profile: ReferenceProfile, logged: Logged, config: DriftConfig = DriftConfig()
) -> Drift:
    """Hold predictions of one model file against its profile."""
    classes, entries = {label: at for at, label in enumerate(profile.classes)}, logged.entries
    known = [entry for entry in entries if entry.label in classes]
    if len(known) < len(entries):
        raise PipelineError(
            f"{len(entries) - len(known)} predictions are of classes that {profile.name} has not: "
            "the log or the profile is another model's"
        )
    labels = np.array([classes[entry.label] for entry in entries])
    inks = [entry.ink for entry in entries if entry.ink is not None]
    has_ink = profile.ink_counts is not None and len(inks) == len(entries)
    counts = np.bincount(labels, minlength=len(classes))
    sure = np.array([entry.probability for entry in entries])
    confidence = np.array(binned(sure, profile.confidence_edges))
    ink = np.array(binned(np.array(inks), profile.ink_edges)) if has_ink else None
    unsure = sum(not entry.is_sure for entry in entries)
    shifts = _shifts(profile, counts, confidence, ink, unsure, config)
    chances = holm({name: shift.p for name, (shift, _, _) in shifts.items()})
    checks = tuple(
        _check(name, *found, chances[name], config.alpha) for name, found in shifts.items()
    )
    return Drift(
        log="",
        name=profile.name,
        versions=tuple(sorted(logged.versions)),
        sha256=profile.sha256,
        reference="",
        images=len(entries),
        first=min(entry.time for entry in entries),
        last=max(entry.time for entry in entries),
        others={str(model): count for model, count in logged.others.most_common()},
        unreadable=logged.unreadable,
        lost=logged.lost,
        alpha=config.alpha,
        checks=checks,
        unchecked=tuple(name for name in ("ink", "not sure") if name not in shifts),
        class_counts=tuple(map(int, counts)),
        confidence_counts=tuple(map(int, confidence)),
        ink_counts=None if ink is None else tuple(map(int, ink)),
        profile=profile,
    )


Found = tuple[Shift, str, str]  # with the test's name, and where the difference is, in words


def _shifts(
    profile: ReferenceProfile,
    counts: np.ndarray,
    confidence: np.ndarray,
    ink: np.ndarray | None,
    unsure: int,
    config: DriftConfig,
) -> dict[str, Found]:
    images, before = int(counts.sum()), np.array(profile.class_counts)
    shift = largest_share_shift(before, counts, config.class_share, config.class_least)
    shares = f"{before[shift.at] / profile.images:.1%} -> {counts[shift.at] / images:.1%}"
    z = "arcsine z"
    found = {"classes": (shift, z, f"class {profile.classes[shift.at]}: {shares}")}
    smirnov = "Kolmogorov-Smirnov"
    known = np.array(profile.confidence_counts)
    shift = distribution_shift(known, confidence, config.confidence)
    edge = f"confidence below {profile.confidence_edges[shift.at]:.6g}"
    found["confidence"] = (shift, smirnov, f"{edge}: {_below(known, confidence, shift.at)}")
    if ink is not None:
        known = np.array(profile.ink_counts)
        shift = distribution_shift(known, ink, config.ink)
        edge = f"ink below {profile.ink_edges[shift.at]:.3f}"
        found["ink"] = (shift, smirnov, f"{edge}: {_below(known, ink, shift.at)}")
    if profile.unsure is not None:
        shift = share_shift(profile.unsure, profile.images, unsure, images, config.unsure)
        said = f"{profile.unsure / profile.images:.1%} -> {unsure / images:.1%}"
        found["not sure"] = (shift, z, said)
    return found


def _below(known: np.ndarray, found: np.ndarray, at: int) -> str:
    return f"{known[:at].sum() / known.sum():.1%} -> {found[:at].sum() / found.sum():.1%}"


def _check(name: str, shift: Shift, test: str, said: str, p: float, alpha: float) -> Check:
    return Check(name, test, said, shift.effect, shift.allowed, shift.statistic, p, p < alpha)


def _profile(
    paths: Paths, reference: Path | None, version: int | None
) -> tuple[Path, ReferenceProfile]:
    """The profile to hold against, and where it lies."""
    if reference:
        try:
            return reference, unpacked(reference.read_bytes(), str(reference))
        except OSError as error:
            raise PipelineError(f"no {reference}: {REMAKE}") from error
    config = paths.packaged / triton.CONFIG
    if not config.exists():
        folder = paths.export
        if version or not paths.manifest.exists():
            raise PipelineError(
                f"no {paths.packaged} here: package the model, or name the profile that travels "
                "in its version's folder with --reference"
            )
    else:
        folder = paths.packaged / str(version or _selected(triton.read(config), paths.packaged))
        if not folder.is_dir():
            raise PipelineError(
                f"no version {version} at {paths.packaged}: see 'pipeline versions'"
            )
    manifest, path = check_manifest(folder, REMAKE), folder / paths.variant_profile("fp32").name
    if path.name not in manifest["files"]:
        raise PipelineError(
            f"{folder} has no reference profile, it was made before there was one. 'pipeline "
            f"validate' makes one, {paths.variant_profile('fp32')}: give it with --reference, or "
            "run 'pipeline package' for a version that has it"
        )
    return path, unpacked(path.read_bytes(), str(path))


def _selected(config: triton.ModelConfig, packaged: Path) -> int:
    """The version that Triton loads."""
    there = [int(entry.name) for entry in packaged.glob("[1-9]*") if entry.name.isdigit()]
    return max(triton.selected(config) or there)


def _too_few(log: Path, profile: ReferenceProfile, logged: Logged, least: int) -> str:
    others = ", ".join(f"{count:,} of {model}" for model, count in logged.others.most_common(3))
    also = f" It has {others}: choose with --name, --model-version." if others else ""
    return (
        f"{log} has {len(logged.entries):,} predictions of {profile.name} with sha256 "
        f"{profile.sha256[:12]}, fewer than {least}: too few to tell drift from chance.{also}"
    )
