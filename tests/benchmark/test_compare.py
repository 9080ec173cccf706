"""Two measurements held against each other."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.benchmark.compare import (
    Comparison,
    compare_records,
    confirm,
    read_measurements,
    require_no_worse,
)
from pipeline.core.errors import CheckFailedError, PipelineError
from tests.conftest import Chain, error_line

Rng = np.random.Generator
ROWS = 48


def measured(rng: Rng, machine: float = 1.0, noise: float = 0.03, **of_row: float) -> Any:
    """A record as a machine of that speed would make it; rows may be faster or slower."""
    rounds = machine * rng.lognormal(0, 0.05, 7)  # what all rows of a round share

    def row(name: str, speed: float) -> dict[str, Any]:
        speeds = speed * of_row.get(name, 1.0) * rounds * rng.lognormal(0, noise, 7)
        return {
            "name": name,
            "way": "in process",
            "batch": 1,
            "concurrency": 1,
            "images_per_second": {"rounds": list(speeds)},
            "fastest_ms": {"rounds": list(1e3 / speeds)},
            "others": 0.0,
        }

    return {
        "what": "infer",
        "name": "handwriting",
        "rows": [row("yardstick", 9000), *(row(f"row{n}", 1000.0 + n) for n in range(ROWS))],
        "scores": {"row0": {"accuracy": 0.99}},
    }


def verdicts(found: Comparison) -> dict[str, str]:
    return {one.row.split(",")[0]: one.verdict for one in found.changes if one.verdict != "same"}


def test_a_row_that_is_a_fifth_slower_is_found_on_a_machine_of_another_speed() -> None:
    rng = np.random.default_rng(0)
    found = compare_records(measured(rng), measured(rng, machine=0.6, row7=0.8))
    assert verdicts(found) == {"row7": "worse"}
    with pytest.raises(CheckFailedError, match=r"2 of 97 got worse: worse +speed .*row7"):
        require_no_worse(found)


def test_rounds_that_a_busy_machine_slowed_down_do_not_count() -> None:
    rng = np.random.default_rng(6)
    before, after = measured(rng), measured(rng, row7=0.8)
    for record in (before, after):
        for row in record["rows"][1:]:
            for values in (row["images_per_second"]["rounds"], row["fastest_ms"]["rounds"]):
                for turn in rng.choice(7, 3, replace=False):
                    values[turn] *= 0.1 if values is row["images_per_second"]["rounds"] else 10
    assert verdicts(compare_records(before, after)) == {"row7": "worse"}


def test_what_others_took_of_the_machine_is_no_slowdown_of_ours() -> None:
    rng = np.random.default_rng(7)
    before, after = measured(rng), measured(rng, row7=0.8)
    for row in after["rows"]:
        row["others"] = 0.4
    found = compare_records(before, after)
    assert not verdicts(found)
    assert found.seen > 0.4
    assert "the smallest change" in str(found)


def test_latencies_alone_may_tell_and_records_of_old_have_none() -> None:
    rng = np.random.default_rng(8)
    before, after = measured(rng), measured(rng)
    fastest = after["rows"][4]["fastest_ms"]
    fastest["rounds"] = [1.3 * ms for ms in fastest["rounds"]]
    (worse,) = compare_records(before, after).worse
    assert (worse.what, worse.row.split(",")[0]) == ("latency", "row3")
    for row in before["rows"]:
        del row["fastest_ms"]
    assert not compare_records(before, after).worse


def test_a_row_that_settled_early_is_held_against_the_same_rounds_of_the_yardstick() -> None:
    rng = np.random.default_rng(9)
    before, after = measured(rng), measured(rng)
    del after["rows"][5]["images_per_second"]["rounds"][5:]
    assert not compare_records(before, after).worse
    del after["rows"][5]["images_per_second"]["rounds"][2:]
    with pytest.raises(PipelineError, match="2 rounds are too few"):
        compare_records(before, after)


def test_an_open_loop_is_not_compared_since_its_speed_was_asked_for() -> None:
    rng = np.random.default_rng(10)
    before, after = measured(rng), measured(rng, row2=0.5)
    for record in (before, after):
        record["rows"][3] |= {"rate": 500.0, "concurrency": 0}
    assert not compare_records(before, after).worse


def test_what_is_faster_is_said_and_raises_nothing() -> None:
    rng = np.random.default_rng(1)
    found = compare_records(measured(rng), measured(rng, row3=1.5))
    assert verdicts(found) == {"row3": "better"}
    require_no_worse(found)


@pytest.mark.slow
def test_measurements_of_the_same_raise_no_alarm() -> None:
    rng = np.random.default_rng(2)
    for noise in (0.01, 0.05, 0.2):
        for _ in range(20):
            before = measured(rng, noise=noise)
            assert not compare_records(before, measured(rng, machine=1.3, noise=noise)).worse


def test_what_was_slower_once_and_is_not_again_raises_no_alarm() -> None:
    rng = np.random.default_rng(11)
    before = measured(rng)
    slow, other = (compare_records(before, measured(rng, **{row: 0.7})) for row in ("row7", "row8"))
    assert slow.is_doubtful
    assert verdicts(slow) == {"row7": "worse"}
    assert verdicts(confirm(slow, compare_records(before, measured(rng)))) == {}
    assert verdicts(confirm(slow, other)) == {}  # another row by chance


def test_what_is_slower_again_is_found_even_where_the_second_noise_hides_it() -> None:
    rng = np.random.default_rng(12)
    before = measured(rng)
    slow = compare_records(before, measured(rng, row7=0.7))
    noisy = compare_records(before, measured(rng, row7=0.7, noise=0.2))
    assert verdicts(noisy) == {}
    found = confirm(slow, noisy)
    assert verdicts(found) == {"row7": "worse"}
    with pytest.raises(CheckFailedError, match="row7"):
        require_no_worse(found)


def test_an_accuracy_leaves_no_doubt_and_stays_what_it_was() -> None:
    rng = np.random.default_rng(13)
    before, after = measured(rng), measured(rng)
    after["scores"]["row0"]["accuracy"] = 0.98
    found = compare_records(before, after)
    assert not found.is_doubtful
    assert verdicts(confirm(found, found)) == {"row0": "worse"}


def test_a_loss_of_accuracy_is_found_however_small_the_noise() -> None:
    rng = np.random.default_rng(3)
    before, after = measured(rng), measured(rng)
    after["scores"]["row0"]["accuracy"] = 0.9894
    assert verdicts(compare_records(before, after)) == {"row0": "worse"}
    after["scores"]["row0"]["accuracy"] = 0.9896  # within the threshold
    assert not verdicts(compare_records(before, after))


def test_rows_that_only_one_has_are_named() -> None:
    rng = np.random.default_rng(4)
    before, after = measured(rng), measured(rng)
    del before["rows"][-1], after["rows"][1]
    found = compare_records(before, after)
    assert len(found.changes) == 2 * (ROWS - 2) + 1
    assert "only before: row0," in str(found)
    assert f"only now: row{ROWS - 1}," in str(found)
    require_no_worse(found)


def test_an_accuracy_that_only_one_has_is_named() -> None:
    rng = np.random.default_rng(11)
    before, after = measured(rng), measured(rng)
    del after["scores"]
    found = compare_records(before, after)
    assert found.only_before == ("accuracy of row0",)
    assert "only before: accuracy of row0" in str(found)
    assert compare_records(after, before).only_after == ("accuracy of row0",)


def test_where_no_row_of_the_model_is_in_both_nothing_was_compared() -> None:
    rng = np.random.default_rng(12)
    before, after = measured(rng), measured(rng)
    for n, (old, new) in enumerate(zip(before["rows"][1:], after["rows"][1:], strict=True)):
        # Beside it, a model that computes nothing and ONNX Runtime are the same for any model.
        old["name"], new["name"] = ("no-op", "no-op") if n else ("ONNX Runtime", "ONNX Runtime")
        old["batch"] = new["batch"] = n
    for record, name in ((before, "one"), (after, "other")):
        record["rows"].append({**record["rows"][-1], "name": name})
    with pytest.raises(PipelineError, match="no row of the model in common"):
        require_no_worse(compare_records(before, after))


SOUND = measured(np.random.default_rng(13))
NO_SPEED = {"images_per_second": {"rounds": [math.nan] * 7}}


@pytest.mark.parametrize(
    "record",
    [
        {"what": "serve", "rows": []},
        {"what": "infer"},
        {"what": "infer", "rows": [{"name": "row1"}]},
        {"what": "infer", "rows": []},
        {"rows": 3},
        {"what": "infer", "rows": [1]},
        {**SOUND, "rows": [*SOUND["rows"], 1]},
        {**SOUND, "rows": [*SOUND["rows"][:-1], {**SOUND["rows"][-1], "others": "many"}]},
        {**SOUND, "scores": {"row0": {}}},
        {**SOUND, "scores": {"row0": {"accuracy": math.nan}}},
        {**SOUND, "scores": ["row0"]},
        {**SOUND, "rows": [SOUND["rows"][0], {**SOUND["rows"][1], **NO_SPEED}]},
    ],
)
def test_a_file_that_is_no_such_measurement_is_refused(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    file = tmp_path / "before.json"
    file.write_text(json.dumps(record))
    with pytest.raises(PipelineError, match="give the JSON that 'pipeline benchmark' wrote"):
        read_measurements(file, ["infer"], "handwriting")


@pytest.mark.parametrize("what", ["infer", "serve"])
def test_a_measurement_of_another_model_is_refused_before_anything_is_measured(
    empty: Chain, what: str
) -> None:
    file = empty.root / "before.json"
    file.write_text(json.dumps({**SOUND, "what": what, "sha256": "of another file"}))
    empty.paths.named("quick").export.mkdir(parents=True)
    empty.paths.named("quick").manifest.touch()
    result = empty.run("benchmark", "--what", what, "--name", "quick", "--compare", str(file))
    assert result.exit_code == 1
    said = f"{file} measures the model 'handwriting', not 'quick': give --name"
    assert said in error_line(result)


def test_a_measurement_of_all_has_one_of_each(tmp_path: Path) -> None:
    record = measured(np.random.default_rng(5))
    file = tmp_path / "all.json"
    file.write_text(json.dumps({"what": "all", "infer": record}))
    assert read_measurements(file, ["infer"], "handwriting") == {"infer": record}
