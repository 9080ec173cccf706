import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from pipeline.benchmark.table import PARTS, SPEED, csv_of, format_tables
from pipeline.benchmark.timing import (
    Score,
    TimedRow,
    Window,
    count_errors,
    divide_speeds,
    is_settled,
    join_windows,
    measure_answered,
    require_answers,
    run_closed_loop,
)
from pipeline.core.errors import CheckFailedError


def window(answers: int, ms: float = 2.0, split: dict[str, float] | None = None) -> Window:
    return Window(2.0, 64, np.full(answers, ms / 1e3), split=split or {})


def row(*answers: int) -> TimedRow:
    return TimedRow("net", "grpc", 64, 4, tuple(map(window, answers)))


def test_a_windows_speed_counts_the_images_of_its_requests() -> None:
    assert window(100).images_per_second == 100 * 64 / 2


def test_the_fastest_answer_is_the_third_where_there_are_so_many() -> None:
    latencies = np.array([0.009, 0.001, 0.005, 0.002, 0.003])
    assert Window(1, 1, latencies).fastest_ms == pytest.approx(3)
    assert Window(1, 1, latencies[:1]).fastest_ms == pytest.approx(9)


def test_a_row_has_the_median_of_its_windows_and_the_percentiles_of_all_requests() -> None:
    slow = Window(2.0, 64, np.full(1000, 0.1))
    of_both = TimedRow("net", "grpc", 64, 4, (window(3000), slow, window(2000)))
    record = of_both.record()
    assert record["images_per_second"] == {
        "median": 2000 * 32,
        "min": 1000 * 32,
        "max": 3000 * 32,
        "rounds": [3000 * 32, 1000 * 32, 2000 * 32],
    }
    latency = record["latency_ms"]
    assert (latency["p50"], latency["p99"]) == (pytest.approx(2), pytest.approx(100))
    assert (record["requests"], record["concurrency"]) == (6000, 4)


def test_a_row_has_the_median_of_what_the_server_says() -> None:
    windows = [window(9, split={"queue_us": us, "batch": us / 10}) for us in (10, 30, 20)]
    found = TimedRow("net", "grpc", 1, 4, tuple(windows))
    assert found.split() == {"queue_us": 20, "batch": 2}
    assert row(1).split() == {}


def test_a_ratio_is_of_the_medians_and_of_each_pair() -> None:
    found = divide_speeds(row(10, 20, 30), row(40, 25, 30))
    assert found["of_medians"] == pytest.approx(20 / 30)
    assert (found["min"], found["median_of_pairs"], found["max"]) == (0.25, 0.8, 1.0)


def test_a_row_without_any_answer_says_so() -> None:
    assert row(0).record()["latency_ms"] == {}
    assert "nan" not in format_tables([row(0)])


def test_a_percentile_is_claimed_where_ten_requests_lie_beyond_it() -> None:
    assert set(row(19).latency_ms()) == set()
    assert set(row(20).latency_ms()) == {"p50"}
    assert set(row(199).latency_ms()) == {"p50", "p90"}
    assert set(row(1000).latency_ms()) == {"p50", "p90", "p95", "p99"}


def test_windows_together_are_one_of_all_their_requests() -> None:
    both = join_windows([window(300), window(100)])
    assert (both.seconds, len(both.latencies)) == (4.0, 400)
    assert both.images_per_second == 400 * 64 / 4


def test_rows_as_csv_have_perf_analyzers_columns_in_microseconds() -> None:
    split = {"queue_us": 12.0, "compute_infer_us": 34.0, "batch": 8.0}
    rows = [TimedRow("net", "grpc", 64, 4, (window(1000, split=split),)), row(10)]
    first, second = csv.DictReader(io.StringIO(csv_of(rows)))
    assert (first["Concurrency"], first["Inferences/Second"]) == ("4", "32000.0")
    assert (first["Server Queue"], first["Server Compute Infer"]) == ("12", "34")
    assert first["p99 latency"] == "2000"
    assert (second["Server Queue"], second["p50 latency"], second["Accuracy"]) == ("", "", "")
    scored = replace(row(10), rate=123.0, concurrency=0, score=Score(100, 0.99, 1, 1 << 20))
    (third,) = csv.DictReader(io.StringIO(csv_of([scored])))
    assert (third["Concurrency"], third["Request Rate"]) == ("", "123.0")
    assert (third["Accuracy"], third["Differing"], third["Peak Memory"]) == ("0.99", "1", "1048576")


def test_windows_have_settled_when_the_last_three_lie_within_a_tenth_of_their_mean() -> None:
    assert not is_settled([100, 100])
    assert is_settled([1, 100, 109, 91])
    assert not is_settled([100, 100, 131])
    assert row(100, 109, 91).is_settled


def test_the_table_has_scores_the_servers_part_and_says_what_not_to_trust() -> None:
    parts = ("queue_us", "compute_input_us", "compute_infer_us", "compute_output_us", "batch")
    split = dict.fromkeys(parts, 7.0)
    late = replace(window(2000, split=split), late=np.full(2000, 0.001), others=0.3)
    score = Score(100, 0.875, 2, 9 << 20)
    open_row = TimedRow("net", "grpc", 1, 0, (late,), rate=1600.0, score=score)
    text = format_tables([open_row, row(100, 100, 100)]).splitlines()
    assert text[0].split() == ["batch", "asking", *SPEED]
    assert text[1].split()[:4] == ["net,", "grpc", "1", "1,600/s"]
    assert text[1].split()[4:] == [*["64,000"] * 3, "87.50%", "2", "9"]
    assert text[5].split() == ["net,", "grpc", "1", "1,600/s", *["2.00"] * 5]
    assert text[9].split() == ["net,", "grpc", "1", "1,600/s", "7.0", *["7"] * 4]
    assert text[11].startswith("1 of 2 did not settle")
    assert "the client of net, grpc, 1, 1,600/s was late by 1.0 ms" in text[12]
    assert text[13] == "other processes used up to 30% of the machine's cores"
    few = replace(late, latencies=np.full(3, 0.001), late=np.full(3, 0.001))
    assert "1/s was late, which adds to" in format_tables(
        [replace(open_row, windows=(few,), rate=1)]
    )


@pytest.mark.parametrize("name", ["handwriting-throughput", "a-model-with-a-very-long-name-" * 2])
def test_no_table_is_wider_than_100_columns(name: str) -> None:
    split = dict.fromkeys((*PARTS, "batch"), 123456.0)
    windows = tuple(Window(1.0, 64, np.full(n, 9.999), split=split) for n in (1000, 9000, 2000))
    wide = TimedRow(name, "http", 64, 32, windows, score=Score(10_000, 0.9958, 10_000, 9 << 30))
    text = format_tables([wide, replace(wide, rate=100_000.0)])
    *lines, _, _ = text.splitlines()  # the remarks are sentences
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith(name[:14])
    assert len(lines[1].split("  ")[0]) == 28


def test_wrong_or_missing_answers_are_no_measurement() -> None:
    right = Window(1, 1, np.ones(1))
    require_answers((TimedRow("net", "grpc", 1, 1, (right,)),))
    silent = replace(right, latencies=np.ones(0))
    for found in (replace(right, wrong=1), replace(right, failed=1), silent):
        with pytest.raises(CheckFailedError, match="answers were wrong or missing: net, "):
            require_answers((TimedRow("net", "grpc", 1, 1, (found,)),))


def test_a_window_without_an_answer_is_measured_again_for_longer_unless_something_failed() -> None:
    asked: list[float] = []

    def measure(seconds: float) -> Window:
        asked.append(seconds)
        return Window(seconds, 1, np.ones(int(seconds)))

    assert measure_answered(measure, 0.3).seconds == 1.2
    assert asked == [0.3, 0.6, 1.2]
    assert measure_answered(lambda seconds: replace(window(0), failed=1), 0.3).failed == 1


def test_wrong_classes_are_counted_and_a_missing_row_makes_all_wrong() -> None:
    outputs = np.array([[0, 1], [1, 0], [0, 1]])
    assert count_errors(outputs, np.array([1, 0, 0])) == 1
    assert count_errors(outputs[:2], np.array([1, 0, 0])) == 3


def test_a_closed_loop_asks_every_batch_in_turn_and_counts_wrong_answers() -> None:
    batches = [np.zeros((2, 3)), np.ones((2, 3))]
    asked = []

    def predictor(images: np.ndarray) -> np.ndarray:
        asked.append(images[0, 0])
        answers: np.ndarray = np.eye(2)[images[:, 0].astype(int)]
        return answers

    right = run_closed_loop(predictor, batches, [np.zeros(2, int), np.ones(2, int)], 0.05)
    assert right.wrong == 0
    assert 0 < len(right.latencies) < len(asked)  # the warm-up does not count
    assert asked[:4] == [0, 1, 0, 1]
    asked.clear()
    assert run_closed_loop(predictor, batches, [np.ones(2, int)] * 2, 0.05).wrong >= len(asked) - 1
