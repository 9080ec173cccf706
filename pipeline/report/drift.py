"""The report's section on drift: the last comparison of a prediction log, and its figures."""

from dataclasses import dataclass

from markupsafe import Markup

from pipeline.core.errors import CorruptError
from pipeline.core.files import read_record
from pipeline.core.paths import Paths
from pipeline.monitoring.drift import Drift
from pipeline.report import figures

AGAIN = "run 'pipeline drift LOG' again"


@dataclass(frozen=True)
class DriftSection:
    """Contents of the section."""

    drift: Drift
    figures: tuple[Markup, ...]


def read_drift(paths: Paths) -> DriftSection | None:
    """Read the last result of `pipeline drift`, or None if it never ran.

    Raises CorruptError if the file is not a valid record of drift.
    """
    if not paths.drift.exists():
        return None
    drift = read_record(paths.drift, Drift, AGAIN)
    profile, before_and_now = drift.profile, (drift.profile, drift)
    try:
        rates = [[count / both.images for count in both.class_counts] for both in before_and_now]
        charts = [figures.draw_rates(profile.classes, *rates)]
        for what in ("confidence", "ink"):
            counts = [getattr(both, f"{what}_counts") for both in before_and_now]
            if None not in counts:
                edges = getattr(profile, f"{what}_edges")
                charts.append(figures.draw_shares(what, edges, *counts))
    except (ValueError, ArithmeticError) as error:
        raise CorruptError(f"{paths.drift} is not a record of drift: {AGAIN}") from error
    return DriftSection(drift, tuple(map(Markup, charts)))
