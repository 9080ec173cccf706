import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline.client.client import Client, Prediction
from pipeline.client.log import PredictionLog, older_log
from pipeline.core.evaluate import predict
from pipeline.data.splits import load_split
from pipeline.export.runtime import onnx_predictor
from pipeline.monitoring.drift import Drift, DriftConfig, compare_log
from pipeline.monitoring.log import Entry, Logged
from pipeline.repository import config_pbtxt
from pipeline.repository.reference_profile import (
    ReferenceProfile,
    confidence_of,
    ink_of,
    read_profile,
)
from tests.conftest import REPOSITORY, Chain, edit_json, error_line, flip_bit

Served = tuple[Chain, dict[str, Any]]
CLOTHES = REPOSITORY / "data" / "fashion-mnist"
SIZES = (1000, 3000, 10_000)


def entry(time: str, label: str, probability: float, is_sure: bool, ink: float) -> Entry:
    return Entry(1, time, "handwriting", "1", None, label, probability, is_sure, ink)


@dataclass(frozen=True)
class Said:
    """What the exported model says of images, ready to be drawn from."""

    labels: np.ndarray  # int64 (N,), of the answers
    confidence: np.ndarray  # float64 (N,)
    ink: np.ndarray  # float64 (N,)

    def of(self, rows: np.ndarray) -> "Said":
        return Said(self.labels[rows], self.confidence[rows], self.ink[rows])

    def mixed(self, other: "Said", rows: np.ndarray) -> "Said":
        """With the first of the other's answers in the rows (N,) that say so."""
        own = (self.labels, self.confidence, self.ink)
        others = (other.labels, other.confidence, other.ink)
        return Said(*(np.where(rows, b[: len(a)], a) for a, b in zip(own, others, strict=True)))


@dataclass(frozen=True)
class Bench:
    """The small chain's model with its profile, and the test images that it is asked about."""

    profile: ReferenceProfile
    ask: Callable[[np.ndarray], Said]
    images: np.ndarray
    truth: np.ndarray
    said: Said

    def drift(self, said: Said) -> Drift:
        threshold = self.profile.min_probability or 0.0
        entries = [
            entry("2026-11-23T12:00:00Z", str(label), sure, sure >= threshold, ink)
            for label, sure, ink in zip(
                *(values.tolist() for values in (said.labels, said.confidence, said.ink)),
                strict=True,
            )
        ]
        return compare_log(self.profile, Logged(entries, {"1"}))


@pytest.fixture(scope="module")
def bench(made: Chain) -> Bench:
    file = made.paths.packaged / "1" / "reference_profile.json"
    profile, predictor = (
        read_profile(file),
        onnx_predictor(made.paths.onnx.read_bytes()),
    )

    def ask(images: np.ndarray) -> Said:
        outputs, ink = predict(predictor, images), ink_of(images)
        assert ink is not None
        return Said(outputs.argmax(axis=1), confidence_of(outputs, "log_probabilities"), ink)

    test = load_split("mnist", made.paths.data("mnist"), "test")
    return Bench(profile, ask, test.images, test.labels, ask(test.images))


def rows(seed: int, size: int, weights: np.ndarray | None = None) -> np.ndarray:
    return np.random.default_rng(seed).choice(10_000, size, p=weights)


@pytest.mark.parametrize("size", SIZES)
def test_twenty_resamplings_of_the_test_split_are_no_drift(bench: Bench, size: int) -> None:
    for seed in range(20):
        found = bench.drift(bench.said.of(rows(seed, size)))
        assert found.drifted == (), f"seed {seed}\n{found}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("digit", range(10))
def test_one_class_doubled_is_drift_of_the_classes(bench: Bench, size: int, digit: int) -> None:
    weights = np.where(bench.truth == digit, 2.0, 1.0)
    for seed in range(3):
        found = bench.drift(bench.said.of(rows(seed, size, weights / weights.sum())))
        assert "classes" in found.drifted, f"seed {seed}\n{found}"
        assert found.checks[0].said.startswith(f"class {digit}: ")


def blurred(images: np.ndarray) -> np.ndarray:
    radius = ImageFilter.GaussianBlur(1)
    return np.stack([np.asarray(Image.fromarray(i[0]).filter(radius))[np.newaxis] for i in images])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [(lambda images: 255 - images, "ink"), (blurred, "confidence")],
    ids=["inverted", "blurred"],
)
def test_inverted_and_blurred_images_are_drift(
    bench: Bench, change: Callable[[np.ndarray], np.ndarray], named: str
) -> None:
    said = bench.ask(change(bench.images))
    for size in SIZES:
        for seed in range(3):
            found = bench.drift(said.of(rows(seed, size)))
            assert named in found.drifted, f"seed {seed}\n{found}"


def test_a_tenth_of_clothes_among_the_digits_is_drift(bench: Bench) -> None:
    if not CLOTHES.is_dir():
        pytest.skip("no data/fashion-mnist here: pipeline data fetch --dataset fashion-mnist")
    clothes = bench.ask(load_split("fashion-mnist", CLOTHES, "test").images)
    for size in SIZES:
        for seed in range(3):
            chosen = rows(seed, size)
            is_cloth = np.random.default_rng(100 + seed).random(size) < 0.1
            found = bench.drift(bench.said.of(chosen).mixed(clothes.of(chosen), is_cloth))
            assert found.drifted, f"seed {seed}\n{found}"


def test_what_is_larger_than_allowed_by_nothing_but_chance_is_no_drift(bench: Bench) -> None:
    strict = DriftConfig(class_share=0, class_least=0, confidence=0, ink=0, unusual_ink=0, unsure=0)
    allowed = DriftConfig()
    said = bench.said.of(rows(0, 10_000))
    found = bench.drift(said)
    entries = [
        entry("", str(label), sure, True, ink)
        for label, sure, ink in zip(said.labels, said.confidence, said.ink, strict=True)
    ]
    # The splits of MNIST do differ, and ten thousand images show it: that is what is allowed.
    assert compare_log(bench.profile, Logged(entries, {"1"}), strict).drifted
    assert not compare_log(bench.profile, Logged(entries, {"1"}), allowed).drifted
    assert all(abs(check.effect) < check.allowed for check in found.checks[1:])


def write_log(path: Path, profile: ReferenceProfile, said: Said, **changes: Any) -> Path:
    log = PredictionLog(path)
    threshold = profile.min_probability or 0.0
    predictions = [
        replace(
            Prediction(str(label), float(sure), (), "1", profile.sha256, bool(sure >= threshold)),
            **changes,
        )
        for label, sure in zip(said.labels, said.confidence, strict=True)
    ]
    pixels = np.rint(said.ink * 255).astype(np.uint8)
    log.add("handwriting", pixels[:, np.newaxis], predictions)
    return path


@pytest.mark.slow
def test_the_command_is_silent_or_exits_3_and_writes_what_the_report_shows(
    chain: Chain, bench: Bench, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log", bench.profile, bench.said.of(rows(0, 1000)))
    result = chain.run("drift", str(log))
    assert result.exit_code == 0, result.output
    assert f"wrote {chain.paths.drift}\nnext: pipeline report\n" in result.stdout
    assert result.stdout.count("  ok\n") == 5
    text = report(chain)
    assert "No drift." in text
    many_sevens = replace(bench.said, labels=np.full(10_000, 7)).of(rows(0, 500))
    write_log(log, bench.profile, many_sevens)
    result = chain.run("--json", "drift", str(log), "--last", "500")
    assert result.exit_code == 3
    assert "classes" in error_line(result)
    record = json.loads(result.stdout)
    assert (record["passed"], record["drifted"], record["images"]) == (False, ["classes"], 500)
    assert "<strong>Drift</strong>: classes." in report(chain)


def report(chain: Chain) -> str:
    assert chain.run("report").exit_code == 0
    text = chain.paths.page.read_text()
    return text[text.index('<section id="drift">') :].partition("</section>")[0]


@pytest.mark.slow
def test_the_report_says_what_to_type_where_nothing_was_watched(chain: Chain) -> None:
    assert "pipeline drift LOG" in report(chain)
    chain.paths.drift.write_text('{"schema": 1, "sha256": "x"}')
    result = chain.run("report")
    assert result.exit_code == 4
    assert "pipeline drift" in error_line(result)


def test_only_the_version_that_is_asked_for_is_held_against_its_profile(
    chain: Chain, bench: Bench, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    write_log(log, bench.profile, bench.said.of(rows(0, 300)))
    write_log(log, bench.profile, bench.said.of(rows(1, 400)), version="9", sha256="cd" * 32)
    with log.open("a") as file:
        file.write('{"schema":1,"time":"2026-11-23T10:00:00Z","lost":12}\n{"schema":1,"ti')
    record = chain.record("drift", str(log))
    assert record["images"] == 300
    assert list(record["others"].values()) == [400]
    assert (record["unreadable"], record["lost"]) == (1, 12)
    said = chain.run("drift", str(log)).stdout
    assert "left out, because of other models: 400 of handwriting version 9" in said
    assert "missing, because not written: 12 predictions" in said


def test_the_older_half_of_a_full_log_is_read_and_what_came_before_a_time_is_left_out(
    chain: Chain, bench: Bench, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log", bench.profile, bench.said.of(rows(0, 300)))
    log.rename(older_log(log))
    write_log(log, bench.profile, bench.said.of(rows(1, 300)))
    assert chain.record("drift", str(log))["images"] == 600
    old = older_log(log).read_text().replace('"time":"20', '"time":"19')
    older_log(log).write_text(old)
    assert chain.record("drift", str(log), "--since", "2000-01-01")["images"] == 300
    assert chain.run("drift", str(log), "--since", "yesterday").exit_code == 2


def test_too_few_predictions_are_no_verdict(chain: Chain, bench: Bench, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", bench.profile, bench.said.of(rows(0, 199)))
    result = chain.run("drift", str(log))
    assert result.exit_code == 1
    assert "too few" in error_line(result)
    assert not chain.paths.drift.exists()


def test_no_log_and_what_is_no_log_are_told_apart(chain: Chain, tmp_path: Path) -> None:
    result = chain.run("drift", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert "--prediction-log" in error_line(result)
    (tmp_path / "text").write_text("hello\n[1]\n" * 300)
    result = chain.run("drift", str(tmp_path / "text"))
    assert result.exit_code == 1
    assert "pipeline query IMAGE --prediction-log FILE" in error_line(result)


def test_a_line_with_what_no_log_holds_is_unreadable(
    chain: Chain, bench: Bench, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log", bench.profile, bench.said.of(rows(0, 300)))
    line = json.loads(log.read_text().splitlines()[0])
    changes: list[dict[str, Any]] = [{"sha256": []}, {"sha256": 7}, {"lost": float("inf")}]
    with log.open("a") as file:
        for change in changes:
            file.write(json.dumps({**line, **change}) + "\n")
    record = chain.record("drift", str(log))
    assert (record["images"], record["unreadable"], record["others"]) == (300, 3, {})


def test_a_package_without_a_version_and_a_version_that_is_not_there_are_named(
    chain: Chain, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text("")
    (chain.paths.packaged / "1").rename(chain.paths.packaged / "gone")
    result = chain.run("drift", str(tmp_path / "log"))
    assert result.exit_code == 1
    assert f"{chain.paths.packaged / '1'} does not exist" in error_line(result)
    config = chain.paths.packaged / config_pbtxt.CONFIG
    message = config_pbtxt.read(config)
    message.ClearField("version_policy")
    config.write_text(config_pbtxt.to_text(message))
    result = chain.run("drift", str(tmp_path / "log"))
    assert result.exit_code == 1
    assert f"{chain.paths.packaged} has no version: run 'pipeline package'" in error_line(result)


def test_the_profile_travels_with_its_version_and_a_change_of_it_is_found(
    chain: Chain, bench: Bench, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log", bench.profile, bench.said.of(rows(0, 1000)))
    profile = chain.paths.packaged / "1" / "reference_profile.json"
    for folder in (profile.parent, chain.paths.export):
        files = json.loads((folder / "manifest.json").read_text())["files"]
        assert profile.name in files
    assert profile.read_bytes() == chain.paths.variant_profile("fp32").read_bytes()
    assert bench.profile.images == 5000
    alone = tmp_path / "profile.json"
    shutil.copy(profile, alone)
    flip_bit(profile)
    assert chain.run("drift", str(log)).exit_code == 4
    shutil.rmtree(chain.paths.repository)
    assert chain.run("drift", str(log), "--reference", str(alone)).exit_code == 0
    alone.write_text('{"schema": 1, "images": 5000}')
    result = chain.run("drift", str(log), "--reference", str(alone))
    assert result.exit_code == 4
    assert "pipeline validate" in error_line(result)


def test_a_version_of_old_has_no_profile_and_is_told_how_to_make_one(
    chain: Chain, bench: Bench, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log", bench.profile, bench.said.of(rows(0, 300)))
    chain.paths.variant_profile("fp32").unlink()
    edit_json(chain.paths.manifest, lambda r: r["files"].pop("reference_profile.json"))
    assert chain.run("package").exit_code == 0
    result = chain.run("drift", str(log))
    assert result.exit_code == 1
    assert "Run 'pipeline validate'" in error_line(result)
    assert chain.run("drift", str(log), "--model-version", "1").exit_code == 0
    assert chain.run("drift", str(log), "--model-version", "7").exit_code == 1


@pytest.mark.server
def test_what_a_server_is_asked_is_watched_from_the_client_to_the_verdict(
    served: Served, bench: Bench, tmp_path: Path
) -> None:
    chain, server = served
    log, asked = tmp_path / "log", bench.images[rows(4, 1000)]
    with Client(f"grpc://127.0.0.1:{server['grpc_port']}", prediction_log=log) as client:
        client.classify(asked, top=1)
        result = chain.run("drift", str(log))
        assert result.exit_code == 0, result.output
        client.infer(255 - asked)
    result = chain.run("drift", str(log), "--last", "1000")
    assert result.exit_code == 3, result.output
    assert result.stdout.count("  DRIFT\n") >= 3
