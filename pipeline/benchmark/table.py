"""Output of a benchmark's rows: as tables of text, and as CSV with perf_analyzer's columns."""

import csv
import io
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.benchmark.timing import LAST, PERCENTILES, WITHIN, TimedRow
from pipeline.core.errors import PipelineError
from pipeline.core.text import Lines, columns

PARTS = ("queue_us", "compute_input_us", "compute_infer_us", "compute_output_us")
OUTSIDE_PARTS = ("send_us", "network_us", "recv_us")
MEBIBYTE = 1 << 20
WIDEST = 28  # columns of a row's name; the middle of a longer name is left out
ASKED = ("batch", "asking")
SPEED = ("images/s", "least", "most", "accuracy", "differ", "MiB")
UNSCORED = ("inferences/s", "least", "most", "failed")
LATENCY = ("avg ms", *(f"p{part} ms" for part in PERCENTILES))
SPLIT = ("formed", "queue us", "input us", "infer us", "output us")
OUTSIDE = ("send us", "network us", "receive us")
MOST_REASONS = 3  # for failed requests, of each row


def format_tables(rows: Sequence[TimedRow]) -> str:
    """Format speeds, latencies and their parts of each row, and remarks on doubtful rows.

    Without any score, the speeds have the failed requests instead. No line is wider than 100
    columns.
    """
    speeds, latencies, splits, outside = [], [], [], []
    is_scored = any(row.score for row in rows)
    for row in rows:
        label, latency, split, score = _label(row), row.latency_ms(), row.split(), row.score
        client, average = row.client(), row.average_ms
        images = [f"{speed:,.0f}" for speed in (row.speed, min(row.speeds), max(row.speeds))]
        if score:
            memory = f"{score.peak_bytes / MEBIBYTE:,.0f}"
            images += [f"{score.accuracy:.2%}", f"{score.differing}", memory]
        elif not is_scored:
            images += [f"{row.joined.failed:,}"]
        speeds.append([*label, *images])
        percentiles = _format_percentiles(latency, 1, ".2f")
        latencies.append([*label, "" if average is None else f"{average:.2f}", *percentiles])
        if client:
            times = {name: f"{us:,.0f}" for name, us in {**split, **client}.items()}
            outside.append([*label, *(times.get(part, "") for part in OUTSIDE_PARTS)])
        if split:
            parts = (f"{split[part]:,.0f}" for part in PARTS)
            splits.append([*label, f"{split['batch']:.1f}", *parts])
    lines = [columns(("", *ASKED, *(SPEED if is_scored else UNSCORED)), speeds), ""]
    lines += [columns(("latency", *ASKED, *LATENCY), latencies), ""]
    if splits:
        lines += [columns(("in the server, each request", *ASKED, *SPLIT), splits), ""]
    if outside:
        lines += [columns(("outside it, each request", *ASKED, *OUTSIDE), outside), ""]
    return Lines(*lines, *_collect_remarks(rows))


def _format_percentiles(latency_ms: Mapping[str, float], factor: float, how: str) -> list[str]:
    """Format the percentiles times `factor`; those that are not known are empty."""
    values = [latency_ms.get(f"p{part}") for part in PERCENTILES]
    return ["" if ms is None else f"{factor * ms:{how}}" for ms in values]


def _label(row: TimedRow) -> list[str]:
    """Return a row's name, images per request, and concurrency or requests per second."""
    name = f"{row.name}, {row.way}" if row.way in ("grpc", "http") else row.name
    if len(name) > WIDEST:
        name = f"{name[: WIDEST // 2]}...{name[3 - WIDEST // 2 :]}"
    return [name, str(row.batch), f"{row.rate:,.0f}/s" if row.rate else str(row.concurrency)]


def _collect_remarks(rows: Sequence[TimedRow]) -> list[str]:
    """Return remarks on rows that are not reliable."""
    restless = [", ".join(_label(row)) for row in rows if not row.is_settled]
    remarks = []
    if restless:
        count, listed = f"{len(restless)} of {len(rows)}", "; ".join(restless)
        remarks.append(f"{count} did not settle within {WITHIN:.0%} in {LAST} windows: {listed}")
    for row in rows:
        reasons = Counter(fault.reason for fault in row.joined.faults)
        remarks += [
            f"{', '.join(_label(row))}: {count:,} requests failed: {reason}"
            for reason, count in reasons.most_common(MOST_REASONS)
        ]
        if row.is_behind:
            # At the highest percentile for which there are enough requests.
            late = [f" by {ms:.1f} ms ({part})" for part, ms in row.late_ms().items()][-1:]
            name = ", ".join(_label(row))
            remarks.append(f"the client of {name} was late{''.join(late)}, which adds to latencies")
    if others := max((row.others for row in rows), default=0.0):  # 0: not measured
        remarks.append(f"other processes used up to {others:.0%} of the machine's cores")
    return remarks


# perf_analyzer's column names where it has one.
CSV = (
    *("Model", "Way", "Batch", "Concurrency", "Request Rate", "Inferences/Second"),
    *("Client Send", "Network+Server Send/Recv", "Server Queue", "Server Compute Input"),
    *("Server Compute Infer", "Server Compute Output", "Client Recv"),
    *("p50 latency", "p90 latency", "p95 latency", "p99 latency", "Avg latency"),
    *("Accuracy", "Differing", "Peak Memory", "Failed"),
)


def require_writable(file: Path) -> None:
    """Raise PipelineError unless the CSV can be written; call it before minutes of measuring."""
    try:
        if file.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        message = f"cannot write {file} ({error.strerror}): choose another --csv"
        raise PipelineError(message) from error


def csv_of(rows: Sequence[TimedRow]) -> str:
    """Return the rows as CSV, in perf_analyzer's columns and units (microseconds)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV)
    for row in rows:
        times, latency, score = {**row.split(), **row.client()}, row.latency_ms(), row.score
        average = row.average_ms
        asking = ("", f"{row.rate:.1f}") if row.rate else (row.concurrency, "")
        cells = [row.name, row.way, row.batch, *asking, f"{row.speed:.1f}"]
        parts = (*OUTSIDE_PARTS[:2], *PARTS, *OUTSIDE_PARTS[2:])
        cells += [f"{times[part]:.0f}" if part in times else "" for part in parts]
        cells += _format_percentiles(latency, 1e3, ".0f")
        cells.append("" if average is None else f"{1e3 * average:.0f}")
        cells += [score.accuracy, score.differing, score.peak_bytes] if score else [""] * 3
        cells.append(str(row.joined.failed))
        writer.writerow(cells)
    return text.getvalue()
