"""The report's section on speed: the export's benchmark in its runtimes and on a server."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.benchmark.table import MEBIBYTE, PARTS
from pipeline.benchmark.timing import PERCENTILES
from pipeline.benchmark.workers import YARDSTICK
from pipeline.core.files import read_json
from pipeline.core.paths import Paths
from pipeline.report import figures

CEILING = "no-op"
MEASURE = "pipeline benchmark --what all"
AGAIN = f"run '{MEASURE}' again"
HOST = "{measured_at:.10}, {machine[processor]} with {machine[cores]} cores"
WAYS = {"grpc": "Triton, gRPC", "http": "Triton, HTTP"}


LABELS = ("model", "protocol", "images per request", "concurrency or rate")
SPEED = ("images/s", "least", "most", *(f"p{part}" for part in PERCENTILES))
SCORE = ("accuracy", "differ", "peak memory")
SPLIT = ("queue", "input", "infer", "output", "batch formed")


Table = tuple[tuple[str, ...], ...]  # the cells of the headers, then of each row


@dataclass(frozen=True)
class Speeds:
    """Contents of the section on the export's speed."""

    table: Table
    server: Table  # the server's part of its requests
    figures: tuple[Markup, ...]
    measured: tuple[tuple[str, str], ...]  # what was measured; the date and the machine
    remarks: tuple[str, ...]


def read_speeds(paths: Paths, digest: str) -> Speeds | None:
    """Read the measurements of the model.onnx with this digest; None if there are none."""
    files = {"in process": paths.inference, "served": paths.serving}
    records = {what: read_json(file, AGAIN) for what, file in files.items() if file.exists()}
    records = {what: record for what, record in records.items() if record.get("sha256") == digest}
    rows = [row for record in records.values() for row in record["rows"]]
    shown = [row for row in rows if row["name"] != YARDSTICK]
    if not shown:
        return None
    ours = [row for row in shown if row["name"] != CEILING]
    ceilings = {  # images per second of the no-op model, measured in the same way
        _setup(row): row["images_per_second"]["median"] for row in shown if row["name"] == CEILING
    }
    labels = [_label(row) for row in ours]
    speeds = [row["images_per_second"] for row in ours]
    latencies = [row["latency_ms"] for row in ours]
    charts = (
        figures.draw_throughput(labels, speeds, [ceilings.get(_setup(row)) for row in ours]),
        figures.draw_latencies(labels, latencies, [bool(row.get("rate")) for row in ours]),
    )
    return Speeds(
        table=_drop_empty((LABELS + SPEED + SCORE, *map(_format_speed, shown))),
        server=_drop_empty(
            (LABELS + SPLIT, *(_format_split(row) for row in shown if row["server"]))
        ),
        figures=tuple(map(Markup, charts)),
        measured=tuple((what, HOST.format_map(record)) for what, record in records.items()),
        remarks=_collect_remarks(shown),
    )


def _setup(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["way"], row["batch"], row["concurrency"]


def _format_asking(row: Mapping[str, Any]) -> str:
    return f"{row['rate']:,.0f}/s" if row.get("rate") else str(row["concurrency"])


def _label(row: Mapping[str, Any]) -> str:
    """Return the row's label in a figure: where it ran, images per request, and concurrency."""
    if row["way"] not in WAYS:
        return f"{row['name']}: {row['batch']}"
    profile = f", {row['name'].rpartition('-')[2]}" if row["name"].endswith("-throughput") else ""
    return f"{WAYS[row['way']]}{profile}: {row['batch']}, {_format_asking(row)}"


def _format_labels(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["name"], row["way"], str(row["batch"]), _format_asking(row)


def _format_speed(row: Mapping[str, Any]) -> tuple[str, ...]:
    accuracy, peak = row.get("accuracy"), row.get("peak_bytes")
    return (
        *_format_labels(row),
        *(f"{row['images_per_second'][part]:,.0f}" for part in ("median", "min", "max")),
        *(_format_number(row["latency_ms"].get(f"p{part}"), 2) for part in PERCENTILES),
        "" if accuracy is None else f"{accuracy:.2%}",
        str(row.get("differing", "")),
        "" if peak is None else f"{peak / MEBIBYTE:,.0f} MiB",
    )


def _format_split(row: Mapping[str, Any]) -> tuple[str, ...]:
    parts = (f"{row['server'][part] / 1e3:.2f}" for part in PARTS)
    return *_format_labels(row), *parts, _format_number(row["server"].get("batch"), 1)


def _drop_empty(table: Table) -> Table:
    """Drop the columns in which no row has a value."""
    columns = [column for column in zip(*table, strict=True) if any(column[1:])]
    return tuple(zip(*columns, strict=True))


def _format_number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _collect_remarks(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    restless = sum(not row.get("settled", True) for row in rows)
    others = max(row.get("others", 0.0) for row in rows)
    remarks = []
    if restless:
        remarks.append(f"{restless} of {len(rows)} rows did not settle")
    if any(row.get("behind") for row in rows):
        remarks.append("the client of an open loop was late")
    if others > 0.01:
        remarks.append(f"other processes used up to {others:.0%} of the machine's cores")
    return tuple(remarks)
