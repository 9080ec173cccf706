"""What the report shows of a benchmark."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.benchmark.timing import Score, TimedRow, Window
from pipeline.core.files import write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.report.speeds import LABELS, SCORE, SPEED, Speeds, read_speeds
from tools.readme import render_macro

PARTS = ("queue_us", "compute_input_us", "compute_infer_us", "compute_output_us")
SPLIT = {**dict.fromkeys(PARTS, 1500.0), "batch": 4.0}


def row(name: str, way: str, requests: int = 1000, concurrency: int = 8) -> TimedRow:
    split = SPLIT if way != "in process" else {}
    windows = tuple(
        Window(1.0, 8, np.full(requests + n, 0.002), split=split, others=0.25) for n in range(3)
    )
    return TimedRow(name, way, 8, concurrency, windows, score=Score(10_000, 0.9958, 3, 50 << 20))


def record(what: str, *rows: TimedRow) -> dict[str, Any]:
    ratios = {"single_of_noop": 0.5, "batch64_of_in_process": 0.5}
    shared = {"sha256": "d1", "threads": 2, "command": "c", "ratios": ratios}
    return {"what": what, **machine(), **shared, "rows": [each.record() for each in rows]}


@pytest.fixture
def measured(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path)
    paths.export.mkdir(parents=True)
    opened = replace(row("handwriting", "http"), rate=1600.0, concurrency=0)
    served = (row("yardstick", "numpy"), row("handwriting", "http"), row("no-op", "http", 4000))
    write_json(paths.inference, record("infer", row("ONNX Runtime fp32, 1 thread", "in process")))
    write_json(paths.serving, record("serve", *served, opened))
    return paths


def test_all_rows_but_the_yardsticks_are_in_one_table(measured: Paths) -> None:
    shown = read_speeds(measured, "d1")
    assert isinstance(shown, Speeds)
    assert [(cells[0], cells[3]) for cells in shown.table[1:]] == [
        ("ONNX Runtime fp32, 1 thread", "8"),
        ("handwriting", "8"),
        ("no-op", "8"),
        ("handwriting", "1,600/s"),
    ]
    assert shown.table[0] == (*LABELS, *SPEED, *SCORE)
    cells = dict(zip(shown.table[0], shown.table[2], strict=True))
    assert (cells["images/s"], cells["p99"]) == ("8,008", "2.00")
    assert (cells["accuracy"], cells["differ"], cells["peak memory"]) == ("99.58%", "3", "50 MiB")
    assert [cells[0] for cells in shown.server[1:]] == ["handwriting", "no-op", "handwriting"]
    cells = dict(zip(shown.server[0], shown.server[1], strict=True))
    assert (cells["queue"], cells["batch formed"]) == ("1.50", "4.0")
    assert [what for what, _ in shown.measured] == ["in process", "served"]
    assert shown.remarks == ("other processes used up to 25% of the machine's cores",)


def test_a_table_has_no_column_without_values(measured: Paths) -> None:
    rows = [replace(row(name, "http"), score=None) for name in ("handwriting", "no-op")]
    write_json(measured.serving, record("serve", *rows))
    measured.inference.unlink()
    shown = read_speeds(measured, "d1")
    assert isinstance(shown, Speeds)
    assert shown.table[0] == (*LABELS, *SPEED)
    assert shown.server[0][:5] == (*LABELS, "queue")


def test_the_figures_have_each_row_of_ours_and_the_ceiling_as_a_mark(measured: Paths) -> None:
    shown = read_speeds(measured, "d1")
    assert isinstance(shown, Speeds)
    for figure in shown.figures:
        for label in ("ONNX Runtime fp32, 1 thread: 8", "Triton, HTTP: 8, 1,600/s"):
            assert label in figure
        assert "no-op" not in figure
        assert "<script" not in figure
    assert "empty model" in shown.figures[0]
    assert "open loop" in shown.figures[1]


def test_a_benchmark_of_another_file_is_not_shown(measured: Paths) -> None:
    assert read_speeds(measured, "d2") is None
    write_json(measured.inference, {**record("infer"), "sha256": "d2"})
    shown = read_speeds(measured, "d1")
    assert isinstance(shown, Speeds)
    assert [what for what, _ in shown.measured] == ["served"]


def test_the_readmes_table_names_the_rate_of_an_open_loop_and_no_yardstick() -> None:
    opened = replace(row("handwriting", "http"), rate=1600.0, concurrency=0)
    text = render_macro("serving", record("serve", row("yardstick", "numpy"), opened))
    assert (
        "| handwriting, http | 8 | open loop, 1,600/s | 8,008 (8,000 to 8,016) | 2.0 ms |" in text
    )
    assert "yardstick" not in text


def test_the_proof_of_comparing_is_a_sentence() -> None:
    worse = {"row": "handwriting, http, batch 64, concurrency 1", "change": -0.15}
    text = render_macro(
        "compare",
        {
            **machine(),
            "command": "make prove-compare",
            "share": 0.2,
            "slowdown": {"worse": [worse, {**worse, "change": -0.12}]},
            "loss": {"worse": [{"row": "eager", "change": -0.011}]},
            "same": [{"exit": 0}] * 10,
        },
    )
    assert "takes 20% longer is found in 2 rows (at most 15% slower: handwriting, http" in text
    assert "lose 1.10% of the test images in 1; 10 comparisons in a row" in text
    assert text.endswith("raised 0 alarms.")
