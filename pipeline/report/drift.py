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
class DriftSection:
    """Contents of the section: a prediction log, compared with the model's reference profile."""

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


def read_drift(paths: Paths) -> DriftSection | None:
    """Read the last result of `pipeline drift`, or None if it never ran.

    Raises CorruptError if the file is not a valid record of drift.
    """
    if not paths.drift.exists():
        return None
    record = read_json(paths.drift, AGAIN)
    try:
        profile = record["profile"]
        counts = [both["class_counts"] for both in (profile, record)]
        rates = [[count / sum(of_all) for count in of_all] for of_all in counts]
        charts = [figures.draw_rates(profile["classes"], *rates)]
        for what in ("confidence", "ink"):
            counts = [both[f"{what}_counts"] for both in (profile, record)]
            if None not in counts:
                charts.append(figures.draw_shares(what, profile[f"{what}_edges"], *counts))
        return DriftSection(
            **{name: record[name] for name in ("sha256", "images", "first", "last", "alpha")},
            versions=tuple(record["versions"]),
            reference_images=profile["images"],
            images_from=profile["images_from"],
            checks=tuple(DriftCheck(**check) for check in record["checks"]),
            figures=tuple(map(Markup, charts)),
        )
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CorruptError(f"{paths.drift} is not a record of drift: {AGAIN}") from error
