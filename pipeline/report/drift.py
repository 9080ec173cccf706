"""The report's section on drift: each check of the last prediction log, and its figures."""

from dataclasses import dataclass

from markupsafe import Markup

from pipeline.core.errors import CorruptError
from pipeline.core.files import read_json
from pipeline.core.paths import Paths
from pipeline.monitoring.drift import DriftCheck
from pipeline.report import figures

AGAIN = "run 'pipeline drift LOG' again"


@dataclass(frozen=True)
class Watched:
    """A prediction log that was compared with the model's reference profile."""

    sha256: str  # of the model file
    versions: tuple[str, ...]
    images: int
    first: str
    last: str
    reference_images: int
    images_from: str
    alpha: float
    checks: tuple[DriftCheck, ...]
    figures: tuple[Markup, ...]

    @property
    def drifted(self) -> tuple[str, ...]:
        return tuple(check.name for check in self.checks if check.drifted)


def watched(paths: Paths) -> Watched | None:
    """Return the last result of `pipeline drift`, or None if it never ran.

    Raises CorruptError if the file is not a valid record of drift.
    """
    if not paths.drift.exists():
        return None
    record = read_json(paths.drift, AGAIN)
    try:
        profile = record["profile"]
        counts = [both["class_counts"] for both in (profile, record)]
        rates = [[count / sum(of_all) for count in of_all] for of_all in counts]
        drawn = [figures.rate_chart(profile["classes"], *rates)]
        for what in ("confidence", "ink"):
            counts = [both[f"{what}_counts"] for both in (profile, record)]
            if None not in counts:
                drawn.append(figures.below_chart(what, profile[f"{what}_edges"], *counts))
        return Watched(
            sha256=str(record["sha256"]),
            versions=tuple(record["versions"]),
            images=int(record["images"]),
            first=str(record["first"]),
            last=str(record["last"]),
            reference_images=int(profile["images"]),
            images_from=str(profile["images_from"]),
            alpha=float(record["alpha"]),
            checks=tuple(DriftCheck(**check) for check in record["checks"]),
            figures=tuple(map(Markup, drawn)),
        )
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CorruptError(f"{paths.drift} is no record of drift: {AGAIN}") from error
