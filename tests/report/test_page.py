import io
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from inspect import getmembers
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.files import sha256, write_bytes, write_json
from pipeline.data.splits import Split, load_split
from pipeline.report import figures, page
from pipeline.report.answers import Answers, collect_answers
from pipeline.report.evidence import WORST, EvidenceSection, read_evidence
from pipeline.repository.golden import unpack_golden
from pipeline.training.runs import Predictions, load_predictions, save_predictions
from pipeline.validation.agreement import AgreementRow, Table
from tests.browser import PHONE, Sheet, chromium
from tests.conftest import (
    FEW,
    REPOSITORY,
    Chain,
    Edit,
    edit_json,
    error_line,
    flip_bit,
    short_proofs,
)

DRAWN: dict[bytes, str] = {}  # figures, by the function that drew each and its arguments


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures of the same values once: nearly every page here has those of the small chain."""

    def once(draw: Callable[..., Any]) -> Callable[..., str]:
        def drawn(*arguments: Any) -> str:
            key = pickle.dumps((draw.__name__, arguments))
            if key not in DRAWN:
                DRAWN[key] = draw(*arguments)
            return DRAWN[key]

        return drawn

    for name, draw in getmembers(figures, callable):
        if name.startswith("draw_"):
            monkeypatch.setattr(figures, name, once(draw))


def written(chain: Chain, *options: str) -> str:
    result = chain.run("report", *options)
    assert result.exit_code == 0, result.output
    assert f"wrote {chain.paths.page}" in result.stdout
    return chain.paths.page.read_text()


def proven(chain: Chain) -> None:
    """Put an agreement beside the export, as a proof would."""
    figure = json.loads((REPOSITORY / "tools" / "results" / "agreement.json").read_text())
    write_json(chain.paths.agreement, {k: v for k, v in figure.items() if k != "schema"})


def answered(chain: Chain, classes: list[str]) -> None:
    """Give the run made-up answers over `classes`."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(classes), 600)
    logits = rng.normal(size=(600, len(classes))) + 4 * np.eye(len(classes))[labels]
    outputs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    digest = save_predictions(chain.paths, outputs, labels)
    changes = {"classes": classes, "predictions_sha256": digest}
    edit_json(chain.paths.summary, lambda record: record.update(changes))


def test_the_page_shows_all_that_the_run_and_its_export_have(chain: Chain) -> None:
    text = written(chain)
    summary = json.loads(chain.paths.summary.read_text())
    for name in ("curves", "confusion", "mistakes", "calibration", "classes", "distortion"):
        assert f'<section id="{name}">' in text
    assert text.count("<svg ") == 5
    assert text.count("<li>\n<div") == 50 + WORST
    for key in ("test_loss", "uncalibrated_loss", "test_calibration_error", "uncalibrated_error"):
        assert f"{summary[key]:.5f}" in text
    assert f"{sha256(chain.paths.weights)}  runs/handwriting/model.safetensors" in text
    assert f"{sha256(chain.paths.onnx)}  exported/handwriting/model.onnx" in text
    assert "This recipe does not distort" in text
    assert f'<time datetime="{summary["finished_at"]}">{summary["finished_at"][:10]}</time>' in text
    assert f"{sha256(chain.paths.onnx)[:16]}</code> <small>of model.onnx" in text
    assert "<strong>Validated, but not on a server.</strong>" in text
    terms = re.findall(r"<dfn>(.*?)</dfn>", text)
    assert len(terms) == len(set(terms))
    assert {"test split", "nats", "temperature", "not sure", "eager", "probes", "margin"} <= {
        term.lower() for term in terms
    }


def test_the_page_is_self_contained_and_runs_nothing(chain: Chain) -> None:
    text = written(chain)
    assert not re.search(r"<(script|link rel=.stylesheet|iframe|object|embed|base)", text)
    sources = re.findall(r"\b(?:src|href|xlink:href|url)\s*[=(]\s*[\"']?([^\"')\s>]*)", text)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "default-src 'none'" in text
    assert not re.search(r"\bon[a-z]+=", text)


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(chain: Chain) -> None:
    text = written(chain)
    DRAWN.clear()
    assert written(chain) == text


@pytest.mark.slow
def test_names_from_strangers_are_text(chain: Chain) -> None:
    answered(chain, ["<script>alert(1)</script>", '"><img src=x onerror=y>', "T-shirt/top"])
    text = written(chain)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "T-shirt/top" in text


@pytest.mark.slow
def test_many_classes_make_a_small_matrix(chain: Chain) -> None:
    answered(chain, [f"class {index}" for index in range(47)])
    text = written(chain)
    assert '<table class="matrix many">' in text
    assert text.count('class="right"') == 47
    with chromium() as browser:
        shown = browser.new_page()
        shown.set_viewport_size(PHONE)  # type: ignore[arg-type]  # its type is private
        shown.goto(chain.paths.page.resolve().as_uri())
        matrix = shown.locator(".scroll:has(.many)")
        assert matrix.evaluate("box => box.scrollWidth - box.clientWidth") == 0


@pytest.fixture(scope="module")
def collected(made: Chain) -> page.Page:
    """The content of the small chain's page, to be changed and rendered."""
    return page.collect(made.paths)


def test_a_run_without_mistakes_says_so(collected: page.Page) -> None:
    outputs, labels = np.log(np.full((4, 10), 0.01) + 0.9 * np.eye(10)[:4]), np.arange(4)
    answers = collect_answers(Predictions(outputs, labels), collected.summary, None)
    text = page.render(replace(collected, answers=answers))
    assert "<h2>No mistakes</h2>" in text
    assert "Every test image was classified correctly." in text
    assert "0 worst" not in text


def test_a_threshold_near_1_is_shown_with_all_its_digits(collected: page.Page) -> None:
    assert isinstance(collected.answers, Answers)
    refused = {"min_probability": 0.999955, "total": 0.1, "right": 0.1, "wrong": None}
    text = page.render(replace(collected, answers=replace(collected.answers, refused=refused)))
    assert "<dfn>not sure</dfn> below 99.9955 %" in text


def test_what_could_not_be_fitted_and_what_an_older_run_lacks_is_said(collected: page.Page) -> None:
    summary = {**collected.summary, "notes": ["too few images to tell"], "finished_at": ""}
    text = page.render(replace(collected, summary=summary))
    assert '<p class="note">Too few images to tell.</p>' in text
    assert "the date was not recorded" in text


def test_pictures_of_a_folder_are_shown_as_they_are(collected: page.Page) -> None:
    assert '<body class="ink">' in page.render(collected)  # MNIST's are white on black
    summary = {**collected.summary, "dataset": "folder:shapes"}
    assert "<body>" in page.render(replace(collected, summary=summary))


def test_the_verdict_says_what_was_validated(collected: page.Page) -> None:
    rows = [AgreementRow(name, 0.9, n, 1.0, None) for n, name in enumerate(("eager", "Triton"))]
    table = Table("handwriting", 1, None, 100, "test", tuple(rows))
    for changes, verdict in (
        (
            {"evidence": page.Note("Nothing was validated")},
            "<strong>Not validated.</strong> Nothing was validated.",
        ),
        ({}, "<strong>Validated, but not on a server.</strong>"),
        (
            {"agreement": table},
            "class for all but 1 of 100 test images.",
        ),
    ):
        assert verdict in page.render(replace(collected, **changes))


def test_counts_of_1_2_and_3_have_different_tints() -> None:
    labels = np.array([0, 0, 1, 1, 1, 2])
    outputs = np.log(np.full((6, 3), 0.1) + 0.7 * np.eye(3)[[1, 1, 2, 2, 2, 0]])
    summary = {"classes": ["a", "b", "c"], "temperature": 1.0}
    matrix = collect_answers(Predictions(outputs, labels), summary, None).matrix
    tints = dict(cell for row in matrix for cell in row)
    assert tints[0] == 0
    assert tints[1] + 0.1 < tints[2] < tints[3] - 0.1 < 0.6


@pytest.mark.slow
def test_worst_mistakes_on_the_page_are_those_of_the_predictions(chain: Chain) -> None:
    summary = json.loads(chain.paths.summary.read_text())
    predictions = load_predictions(chain.paths, summary["predictions_sha256"])
    collected = page.collect(chain.paths).answers
    assert isinstance(collected, Answers)
    truths = predictions.log_probabilities[np.arange(10_000), predictions.labels]
    first = collected.mistakes[0]
    wrong = predictions.log_probabilities.argmax(axis=1) != predictions.labels
    assert first["index"] == np.flatnonzero(wrong)[truths[wrong].argmin()]
    assert first["truth"] == str(predictions.labels[first["index"]])
    assert first["truth_probability"] == pytest.approx(np.exp(truths[wrong].min()))
    assert collected.wrong == wrong.sum()
    assert (10_000 - collected.wrong) / 10_000 == summary["test_accuracy"]
    raw = predictions.remove_temperature(summary["temperature"])
    loss = -raw[np.arange(10_000), predictions.labels].mean()
    assert loss == pytest.approx(summary["uncalibrated_loss"], rel=1e-4)


@pytest.mark.slow
def test_a_recipe_that_distorts_shows_how(chain: Chain) -> None:
    config = chain.paths.run_config
    edit_json(config, lambda record: record["settings"].update(rotate=0.3))
    text = written(chain)
    assert text.count('<div class="strip">') == page.DIGITS
    assert text.count(", distorted, draw ") == page.DIGITS * page.DRAWS
    assert "(the recipe has 0)" in text


def test_without_an_export_or_data_the_page_says_what_makes_them(chain: Chain) -> None:
    shutil.rmtree(chain.paths.exported)
    shutil.rmtree(chain.root / "data")
    result = chain.run("report")
    assert result.exit_code == 0, result.output
    assert "next: pipeline export" in result.stdout
    text = chain.paths.page.read_text()
    assert "This run has not been exported yet" in text
    assert "Pictures are left out" in text
    assert "pipeline data fetch" in text
    assert "<img" not in text


@pytest.mark.slow
def test_another_run_is_not_shown_with_this_ones_export(chain: Chain) -> None:
    proven(chain)
    edit_json(chain.paths.manifest, lambda record: record.update(weights_sha256="0" * 64))
    text = written(chain)
    assert "is an export of other weights" in text
    assert "Triton gRPC" not in text


@pytest.mark.slow
def test_a_proof_of_this_export_is_shown(chain: Chain) -> None:
    proven(chain)
    assert "The last validation was of another model.onnx" in written(chain)
    edit_json(chain.paths.agreement, lambda record: record.update(sha256=sha256(chain.paths.onnx)))
    text = written(chain)
    assert "Triton gRPC" in text
    assert '<p class="verdict good"><strong>Validated.</strong> ONNX Runtime, Triton HTTP' in text


def proof_of(chain: Chain) -> tuple[EvidenceSection, dict[str, Any], dict[str, np.ndarray]]:
    """What the page shows of the proof, and the records that it is from."""
    shown = page.collect(chain.paths).evidence
    assert isinstance(shown, EvidenceSection)
    with np.load(chain.paths.evidence) as arrays:
        return shown, json.loads(chain.paths.validation.read_text()), dict(arrays)


def reproved(chain: Chain, arrays: dict[str, np.ndarray]) -> None:
    """Put other evidence beside the export, as a proof would."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # the stub takes an option
    digest = write_bytes(chain.paths.evidence, buffer.getvalue())
    listed = {chain.paths.evidence.name: digest}
    edit_json(chain.paths.manifest, lambda record: record["files"].update(listed))


def revalidated(chain: Chain, edit: Edit) -> None:
    """Change the validation record, and the manifest's digest of it."""
    edit_json(chain.paths.validation, edit)
    listed = {chain.paths.validation.name: sha256(chain.paths.validation)}
    edit_json(chain.paths.manifest, lambda record: record["files"].update(listed))


@pytest.mark.slow
def test_the_proof_has_a_row_for_each_variant(chain: Chain) -> None:
    validation = json.loads(chain.paths.validation.read_text())
    (fp32,) = validation["variants"]
    text = written(chain)
    assert f">{fp32['max_error']:.2g}</td>" in text
    assert f">{fp32['size'] / 1000:,.0f} kB</td>" in text
    for speed in fp32["images_per_second"].values():
        assert f">{speed:,.0f}</td>" in text
    assert f"fp32 {fp32['max_error']:.2g}</text>" in text  # in the figure


@pytest.mark.slow
def test_the_worst_images_have_the_largest_errors_for_their_margins(chain: Chain) -> None:
    _, _, arrays = proof_of(chain)
    test = load_split("mnist", chain.paths.data("mnist"), "test")
    asked = Split(test.images[:FEW], test.labels[:FEW], test.classes)
    shown = read_evidence(chain.paths, json.loads(chain.paths.manifest.read_text()), asked)
    assert shown
    ((precision, worst),) = shown.worst
    images = len(arrays["labels"])
    shares = arrays["errors_fp32"][:images] / arrays["margins"][:images]
    assert precision == "fp32"
    assert [one["index"] for one in worst] == list(np.argsort(-shares)[:WORST])
    assert all(one["picture"] and one["predicted"] == one["reference"] for one in worst)
    assert worst[0]["margin"] == arrays["margins"][worst[0]["index"]]
    assert "flips to" not in written(chain)


@pytest.mark.slow
def test_an_image_that_flips_says_to_what(chain: Chain) -> None:
    shown, _, arrays = proof_of(chain)
    first = shown.worst[0][1][0]
    index = first["index"]
    arrays["said_fp32"][index] = (arrays["reference"][index] + 1) % 10
    arrays["margins"][index] = 0  # the reference is between two classes
    reproved(chain, arrays)
    flipped = (int(first["reference"]) + 1) % 10
    assert f'<div class="said">flips to {flipped}</div>' in written(chain)


@pytest.mark.slow
def test_probes_are_not_among_the_worst_images(chain: Chain) -> None:
    shown, validation, arrays = proof_of(chain)
    arrays["errors_fp32"][-validation["probes"] :] = 100
    reproved(chain, arrays)
    assert proof_of(chain)[0].worst == shown.worst


def test_an_export_without_a_proof_says_what_makes_it(chain: Chain) -> None:
    manifest = json.loads(chain.paths.manifest.read_text())
    for path in (chain.paths.validation, chain.paths.evidence):
        path.unlink()
        del manifest["files"][path.name]
    write_json(chain.paths.manifest, manifest)
    text = written(chain)
    assert "have not been validated yet: <code>pipeline validate</code>" in text
    assert "<strong>Not validated.</strong>" in text
    assert "has not been validated on a server yet" in text


def test_without_an_export_the_proof_says_so_once(chain: Chain) -> None:
    shutil.rmtree(chain.paths.exported)
    _, _, proof = written(chain).partition('<section id="proof">')
    section, _, _ = proof.partition("</section>")
    assert section.count("This run has not been exported yet") == 1


def test_changed_evidence_is_refused_with_4(chain: Chain) -> None:
    flip_bit(chain.paths.evidence)
    result = chain.run("report")
    assert result.exit_code == 4
    assert "evidence.npz does not match its digest" in error_line(result)


def test_a_proof_of_other_bytes_is_refused_with_4(chain: Chain) -> None:
    revalidated(chain, lambda record: record["variants"][0].update(sha256="0" * 64))
    result = chain.run("report")
    assert result.exit_code == 4
    assert "is of other files: run 'pipeline validate' again" in error_line(result)


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.pop("variants"),
        lambda record: record.update(images=17),
        lambda record: record["variants"][0].update(precision="fp64"),
    ],
)
def test_a_proof_that_its_evidence_does_not_fit_is_refused_with_4(chain: Chain, edit: Edit) -> None:
    revalidated(chain, edit)
    result = chain.run("report")
    assert result.exit_code == 4
    assert "do not belong together: run 'pipeline validate' again" in error_line(result)


def test_evidence_that_is_none_is_refused_with_4(chain: Chain) -> None:
    digest = write_bytes(chain.paths.evidence, b"no archive")
    listed = {chain.paths.evidence.name: digest}
    edit_json(chain.paths.manifest, lambda record: record["files"].update(listed))
    result = chain.run("report")
    assert result.exit_code == 4
    assert "evidence.npz is not an evidence file" in error_line(result)


@pytest.mark.slow
def test_all_variants_pass_each_with_its_golden_set_and_the_page_sets_them_beside_fp32(
    chain: Chain,
) -> None:
    chain.record("export", "--precision", "fp32,fp16,int8,exact")
    with short_proofs(2_000):  # of 500, one that changes its class is more than int8 may lose
        record = chain.record("validate")
    assert [one["precision"] for one in record["variants"]] == ["fp32", "fp16", "int8", "exact"]
    widest = []
    for precision in ("fp32", "fp16", "int8"):
        path = chain.paths.variant_golden(precision)
        widest.append(unpack_golden(path.read_bytes(), "it").bounds.max())
    assert widest[0] < widest[1] < widest[2]
    packaged = chain.record("package")["variants"]
    assert [one["name"] for one in packaged] == [
        *("handwriting", "handwriting-fp16", "handwriting-int8", "handwriting-exact")
    ]
    shown, _, arrays = proof_of(chain)
    assert [row["precision"] for row in shown.rows] == ["fp32", "fp16", "int8", "exact"]
    assert arrays["errors_fp32"].max() < arrays["errors_fp16"].max() < arrays["errors_int8"].max()
    text = written(chain)
    assert text.count("<li>\n<div") == 50 + 4 * WORST
    for precision in ("fp32", "fp16", "int8"):
        assert f"<h3>{precision}: errors that come closest to the margin</h3>" in text


def test_a_run_of_old_without_predictions_still_has_a_page(chain: Chain) -> None:
    edit_json(chain.paths.summary, lambda record: record.pop("predictions_sha256"))
    chain.paths.predictions.unlink()
    text = written(chain)
    assert "was made before runs kept their predictions" in text
    assert "<code>pipeline train --run handwriting</code>" in text


def test_changed_predictions_are_refused_with_4(chain: Chain) -> None:
    flip_bit(chain.paths.predictions, 1000)
    result = chain.run("report")
    assert result.exit_code == 4
    assert "predictions.npz does not match its digest" in error_line(result)


def test_without_a_run_one_line_says_which_command_to_type(chain: Chain) -> None:
    shutil.rmtree(chain.paths.run_folder)
    result = chain.run("report")
    assert result.exit_code == 1
    assert "'pipeline train --run handwriting' trains it" in error_line(result)
    chain.paths.run_folder.mkdir()
    assert "--resume" in error_line(chain.run("report"))


@pytest.mark.slow
def test_training_anew_sets_the_finished_run_aside_and_only_the_last_one(chain: Chain) -> None:
    written(chain)
    paths = chain.paths
    results = (paths.weights, paths.summary, paths.predictions, paths.page, paths.run_config)
    before = {file.name: sha256(file) for file in results}
    short = ("train", "--recipe", "quick", "--epochs", "0.01")
    result = chain.run(*short)
    assert result.exit_code == 0
    assert f"is kept in {paths.previous}" in result.stderr
    assert not paths.page.exists()
    assert {name: sha256(paths.previous / name) for name in before} == before
    second = sha256(paths.weights)
    assert chain.run(*short, "--seed", "1").exit_code == 0
    assert sha256(paths.previous / paths.weights.name) == second
    assert not (paths.previous / "previous").exists()


@pytest.mark.slow
def test_chromium_opens_the_page_without_a_network_a_complaint_or_a_table_that_is_too_wide(
    chain: Chain, tmp_path: Path
) -> None:
    proven(chain)
    edit_json(chain.paths.run_config, lambda record: record["settings"].update(shear=0.3))
    names = [f"a long name of class {number}" for number in range(10)]
    edit_json(chain.paths.summary, lambda record: record.update(classes=names))
    model = {"sha256": sha256(chain.paths.onnx)}
    serving = json.loads((REPOSITORY / "tools" / "results" / "serving.json").read_text())
    write_json(chain.paths.serving, {**serving, **model})
    edit_json(chain.paths.agreement, lambda record: record.update(model))
    written(chain)
    bad = tmp_path / "bad.html"  # the check can fail
    text = chain.paths.page.read_text()
    bad.write_text(text.replace("</main>", "<script>let x;</script></main>"))
    console: list[str] = []
    with chromium() as browser:
        page = browser.new_page()
        page.on("console", lambda message: console.append(message.text))
        for size in (PHONE, {"width": 1280, "height": 800}):
            page.set_viewport_size(size)  # type: ignore[arg-type]  # its type is private
            page.goto(chain.paths.page.resolve().as_uri())
            widths = page.evaluate("""() => [...document.querySelectorAll("table")].map(
                (table) => table.getBoundingClientRect().right)""")
            assert len(widths) > 8
            assert max(widths) <= size["width"]
            assert Sheet(page).findings() == []
        assert page.locator("svg").count() == 7
        assert console == []
        page.goto(bad.resolve().as_uri())
        assert "Content Security Policy" in " ".join(console)


@pytest.mark.slow
def test_the_report_says_how_often_wrong_answers_are_refused(chain: Chain) -> None:
    assert "An answer is <dfn>not sure</dfn> below" in written(chain)
    edit_json(chain.paths.summary, lambda record: record.pop("min_probability"))
    assert "not sure" not in written(chain)  # a run of old


@pytest.mark.slow
def test_report_shows_the_last_agreement(chain: Chain) -> None:
    nothing = chain.run("report")
    assert nothing.exit_code == 0
    assert f"next: pipeline validate {chain.paths.repository}" in nothing.stdout
    proven(chain)
    record = chain.record("report")
    assert [row["name"] for row in record["rows"]][:2] == ["eager PyTorch", "ONNX Runtime"]
    assert "Triton gRPC" in chain.run("report").stdout


def test_the_table_alone_needs_no_page(chain: Chain) -> None:
    missing = chain.run("report", "--table")
    assert missing.exit_code == 1
    assert "pipeline validate exported/model_repository" in error_line(missing)
    proven(chain)
    assert "Triton gRPC" in chain.run("report", "--table").stdout
    assert not chain.paths.page.exists()
