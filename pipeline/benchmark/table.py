"""Rows of a benchmark for people: as one table of text, and as CSV in perf_analyzer's columns."""

import csv
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.benchmark.timing import LAST, PERCENTILES, WITHIN, Row
from pipeline.core.errors import PipelineError
from pipeline.core.text import Lines

PARTS = ("queue_us", "compute_input_us", "compute_infer_us", "compute_output_us")
MEBIBYTE = 1 << 20
HEADER = (
    f"{'':<29} {'':<10} {'batch':>5} {'asking':>8} {'images/s':>8} {'least':>8} {'most':>8} "
    f"{'p50 ms':>7} {'p90 ms':>7} {'p95 ms':>7} {'p99 ms':>7} {'formed':>6} {'accuracy':>8} "
    f"{'differ':>6} {'MiB':>5}"
)
SPLIT = f"{'of it in the server, us a request':<56} " + " ".join(
    f"{part:>8}" for part in ("queue", "input", "infer", "output")
)


def table(rows: Sequence[Row]) -> str:
    """All rows, what the server says of its part, and what to know before one believes them."""
    served = [f"{_asked(row)} {_split(row)}" for row in rows if row.split()]
    lines = [HEADER, *map(line, rows), *([SPLIT, *served] if served else []), *_remarks(rows)]
    return Lines(*lines)


def line(row: Row) -> str:
    """A row of the table."""
    latency = row.latency_ms()
    shown = " ".join(_shown(latency.get(f"p{part}"), 7, 2) for part in PERCENTILES)
    score = row.score
    return (
        f"{_asked(row)} {row.speed:>8,.0f} {min(row.speeds):>8,.0f} {max(row.speeds):>8,.0f} "
        f"{shown} {_shown(row.split().get('batch'), 6, 1)} "
        f"{f'{score.accuracy:.2%}' if score else '':>8} "
        f"{f'{score.differing}' if score else '':>6} "
        f"{f'{score.peak_bytes / MEBIBYTE:,.0f}' if score else '':>5}"
    )


def _asked(row: Row) -> str:
    asking = f"{row.rate:,.0f}/s" if row.rate else str(row.concurrency)
    return f"{row.name:<29} {row.way:<10} {row.batch:>5} {asking:>8}"


def _split(row: Row) -> str:
    return " ".join(f"{row.split()[part]:>8,.0f}" for part in PARTS)


def _shown(value: float | None, width: int, digits: int) -> str:
    """A number, or nothing where it could not be claimed."""
    return f"{'':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def _remarks(rows: Sequence[Row]) -> list[str]:
    restless = [_named(row) for row in rows if not row.is_settled]
    remarks = []
    if restless:
        remarks.append(
            f"{len(restless)} of {len(rows)} did not settle (last {LAST} windows within "
            f"{WITHIN:.0%}): {'; '.join(restless)}"
        )
    remarks += [
        f"the client of {_named(row)} fell behind{_by(row)}: its figures tell of the client as well"
        for row in rows
        if row.is_behind
    ]
    others = max((row.others for row in rows), default=0.0)
    remarks.append(f"others took up to {others:.0%} of the machine's cores meanwhile")
    return remarks


def _by(row: Row) -> str:
    """By how much, in the highest percentile that so many requests allow to claim."""
    known = row.late_ms()
    return f" by {known[max(known)]:.1f} ms ({max(known)})" if known else ""


def _named(row: Row) -> str:
    return " ".join(_asked(row).split())


# perf_analyzer's names, where it has one; what it measures and we do not is left out.
CSV = (
    *("Model", "Way", "Batch", "Concurrency", "Request Rate", "Inferences/Second"),
    *("Server Queue", "Server Compute Input", "Server Compute Infer", "Server Compute Output"),
    *("p50 latency", "p90 latency", "p95 latency", "p99 latency"),
    *("Accuracy", "Differing", "Peak Memory"),
)


def require_place(file: Path) -> None:
    """Raise PipelineError where the CSV could not be written after minutes of measuring."""
    try:
        if file.is_dir():
            raise IsADirectoryError(0, "a folder lies there")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise PipelineError(
            f"cannot write {file} ({error.strerror}): name another file with --csv"
        ) from error


def csv_of(rows: Sequence[Row]) -> str:
    """The rows as CSV, in perf_analyzer's columns and units: microseconds."""
    text = io.StringIO()
    written = csv.writer(text, lineterminator="\n")
    written.writerow(CSV)
    for row in rows:
        split, latency, score = row.split(), row.latency_ms(), row.score
        asking = ("", f"{row.rate:.1f}") if row.rate else (row.concurrency, "")
        known = [latency.get(f"p{part}") for part in PERCENTILES]
        written.writerow(
            [
                *(row.name, row.way, row.batch, *asking, f"{row.speed:.1f}"),
                *(f"{split[part]:.0f}" if part in split else "" for part in PARTS),
                *("" if ms is None else f"{ms * 1e3:.0f}" for ms in known),
                *((score.accuracy, score.differing, score.peak_bytes) if score else ("", "", "")),
            ]
        )
    return text.getvalue()
