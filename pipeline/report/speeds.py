"""What the report shows of a benchmark: how fast an export is in its runtimes and on a server."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.benchmark.table import MEBIBYTE, PARTS
from pipeline.benchmark.timing import PERCENTILES
from pipeline.benchmark.workers import YARDSTICK
from pipeline.core.files import read_json
from pipeline.core.paths import Paths
from pipeline.report import figures as speed_figures

CEILING = "no-op"
MEASURE = "pipeline benchmark --what all"
MEND = f"run '{MEASURE}' again"
WAYS = {"grpc": "Triton, gRPC", "http": "Triton, HTTP"}


@dataclass(frozen=True)
class SpeedRow:
    """A row of the table, as text."""

    name: str
    way: str
    batch: int
    asking: str  # how many at once, or how many arrive
    cells: tuple[str, ...]


HEADERS = (
    *("images/s", "least", "most"),
    *(f"p{part}" for part in PERCENTILES),
    *("queue", "input", "infer", "output", "batch formed"),
    *("accuracy", "differ", "peak memory"),
)


@dataclass(frozen=True)
class Speeds:
    """What was measured of the export that the report is of."""

    headers: tuple[str, ...]
    rows: tuple[SpeedRow, ...]
    figures: tuple[Markup, ...]
    measured: tuple[tuple[str, str], ...]  # what, and when and on what
    remarks: tuple[str, ...]


def speeds(paths: Paths, digest: str) -> Speeds | None:
    """What was measured of the model.onnx with this digest; None where nothing was."""
    files = {"in process": paths.inference, "served": paths.serving}
    records = {what: _record(file, digest) for what, file in files.items() if file.exists()}
    known = {what: record for what, record in records.items() if record}
    rows = [row for record in known.values() for row in record["rows"]]
    shown = [row for row in rows if row["name"] != YARDSTICK]
    if not shown:
        return None
    return Speeds(
        headers=HEADERS,
        rows=tuple(map(_row, shown)),
        figures=(
            Markup(speed_figures.throughput([_bar(row, shown) for row in shown if _is_ours(row)])),
            Markup(speed_figures.latencies([_span(row) for row in shown if _is_ours(row)])),
        ),
        measured=tuple((what, _when(record)) for what, record in known.items()),
        remarks=_remarks(shown),
    )


def _record(file: Path, digest: str) -> dict[str, Any] | None:
    """A benchmark's record, where it is of that file."""
    record = read_json(file, MEND)
    return record if record.get("sha256") == digest else None


def _when(record: Mapping[str, Any]) -> str:
    host = record["machine"]
    return f"{record['measured_at'][:10]}, {host['processor']} with {host['cores']} cores"


def _is_ours(row: Mapping[str, Any]) -> bool:
    return bool(row["name"] != CEILING)


def _asking(row: Mapping[str, Any]) -> str:
    return f"{row['rate']:,.0f}/s" if row.get("rate") else str(row["concurrency"])


def _label(row: Mapping[str, Any]) -> str:
    """What a figure calls the row."""
    way = WAYS.get(row["way"], "")
    profile = f", {row['name'].rpartition('-')[2]}" if row["name"].endswith("-throughput") else ""
    whom = f"{way}{profile}" if way else row["name"]
    at_once = f", {_asking(row)}{'' if row.get('rate') else ' at once'}" if way else ""
    return f"{whom}: {row['batch']}{at_once}"


def _bar(row: Mapping[str, Any], every: list[dict[str, Any]]) -> speed_figures.Bar:
    speed = row["images_per_second"]
    keys = ("way", "batch", "concurrency")
    ceilings = [
        other["images_per_second"]["median"]
        for other in every
        if not _is_ours(other) and not row.get("rate") and all(other[k] == row[k] for k in keys)
    ]
    ceiling = ceilings[0] if ceilings else None
    return speed_figures.Bar(_label(row), speed["median"], speed["min"], speed["max"], ceiling)


def _span(row: Mapping[str, Any]) -> speed_figures.Span:
    return speed_figures.Span(_label(row), row["latency_ms"], bool(row.get("rate")))


def _row(row: Mapping[str, Any]) -> SpeedRow:
    speed, split = row["images_per_second"], row["server"]
    accuracy, peak = row.get("accuracy"), row.get("peak_bytes")
    cells = (
        *(f"{speed[part]:,.0f}" for part in ("median", "min", "max")),
        *(_number(row["latency_ms"].get(f"p{part}"), 2) for part in PERCENTILES),
        *(_number(split[part] / 1e3 if split else None, 2) for part in PARTS),
        _number(split.get("batch"), 1),
        "" if accuracy is None else f"{accuracy:.2%}",
        str(row.get("differing", "")),
        "" if peak is None else f"{peak / MEBIBYTE:,.0f} MiB",
    )
    return SpeedRow(row["name"], row["way"], row["batch"], _asking(row), cells)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _remarks(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    restless = sum(not row.get("settled", True) for row in rows)
    others = max(row.get("others", 0.0) for row in rows)
    remarks = []
    if restless:
        remarks.append(f"{restless} of {len(rows)} rows did not settle")
    if any(row.get("behind") for row in rows):
        remarks.append("the client of an open loop fell behind")
    if others > 0.01:
        remarks.append(f"others took up to {others:.0%} of the machine's cores")
    return tuple(remarks)
