import json
import re
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.core.files import sha256
from pipeline.core.paths import Paths
from pipeline.training.recipes import TrainConfig
from pipeline.validation.card import render_card
from tests.conftest import Chain

NET = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
"""


def records(paths: Paths) -> tuple[dict[str, Any], dict[str, Any]]:
    return json.loads(paths.manifest.read_text()), json.loads(paths.validation.read_text())


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    record = yaml.safe_load(front)
    assert isinstance(record, dict)
    return record


def run_example(card: str, folder: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the card's lines of Python leave behind, when they run beside the files."""
    monkeypatch.chdir(folder)
    found = re.search("```python\n(.*?)```", card, re.DOTALL)
    assert found
    names: dict[str, Any] = {}
    exec(found[1], names)
    return names


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """Anybody's module, exported and proven on images that nobody labelled."""
    chain = Chain(tmp_path_factory.mktemp("theirs"))
    (chain.root / "card_nets.py").write_text(NET)
    images = np.random.default_rng(0).random((40, 3, 4, 4)).astype(np.float32)
    np.savez(chain.root / "images.npz", images=images)
    given = ["--module", "card_nets:make", "--images", str(chain.root / "images.npz")]
    for command in (["export", *given, "--name", "small"], ["validate", "--name", "small"]):
        result = chain.run(*command)
        assert result.exit_code == 0, result.output
    return Paths(chain.root, name="small")


def test_the_card_is_a_file_of_the_proof_and_follows_from_the_records(made: Chain) -> None:
    manifest, validation = records(made.paths)
    card = made.paths.card.read_text()
    assert manifest["files"]["MODEL_CARD.md"] == sha256(made.paths.card)
    assert card == render_card(manifest, validation)
    for name, digest in manifest["files"].items():
        assert (f"| `{name}` | `{digest}` |" in card) == (name != "MODEL_CARD.md")


def test_the_front_matter_is_what_the_hub_reads(made: Chain) -> None:
    manifest, validation = records(made.paths)
    front = front_matter(made.paths.card.read_text())
    assert front["license"] == "unknown"  # no one else can choose it
    assert (front["library_name"], front["pipeline_tag"]) == ("onnx", "image-classification")
    assert front["datasets"] == ["ylecun/mnist"]
    assert front["metrics"] == ["accuracy"]
    (model,) = front["model-index"]
    (result,) = model["results"]
    assert model["name"] == manifest["name"]
    assert result["dataset"] == {"name": "mnist", "type": "ylecun/mnist", "split": "test"}
    assert [metric["value"] for metric in result["metrics"]] == [
        found["accuracy"] for found in validation["variants"]
    ]


def test_every_section_of_the_layout_is_there_and_nothing_is_left_open(made: Chain) -> None:
    card = made.paths.card.read_text()
    assert re.findall("^## (.*)", card, re.M) == [
        *("Model Details", "Uses", "How to Get Started", "Training Details", "Evaluation"),
        *("Limitations", "Technical Specifications", "Files"),
    ]
    assert not re.search(r"\bNone\b|Undefined|[{}%]}|\[More Information Needed]", card)
    assert str(made.root) not in card
    for table in re.findall(r"(?:^\|.*\n)+", card, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_row_of_the_evaluation_is_what_the_proof_found(made: Chain) -> None:
    manifest, validation = records(made.paths)
    fp32 = validation["variants"][0]
    fp16 = {**fp32, "precision": "fp16", "flipped": 1234, "mcnemar_p": 0.03125}
    fp16 |= {"max_error": None, "ratio": None, "safety_factor": None, "images_per_second": {}}
    validation["variants"].append({**fp16, "accuracy": 0.99999, "size": 167_237})
    card = render_card({**manifest, "precisions": ["fp32", "fp16"]}, validation)
    wanted = "| fp16 | > 99.99 % | 1,234 | 0.031 | not finite | unknown | unknown | 167 kB |"
    assert f"{wanted} unknown | unknown |\n" in card
    assert "fp16 may lose 0.02 points of accuracy" in card
    assert "int8 may lose" not in card
    assert front_matter(card)["tags"] == ["onnx", "pytorch", "fp16"]


@pytest.mark.slow
def test_the_example_runs(
    made: Chain, theirs: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = run_example(made.paths.card.read_text(), made.paths.export, monkeypatch)
    assert digits["images"].shape == (1, 1, 28, 28)
    assert digits["images"].dtype == np.uint8
    others = run_example(theirs.card.read_text(), theirs.export, monkeypatch)
    assert others["images"].shape == (1, 3, 4, 4)
    for names in (digits, others):
        assert names["probabilities"].sum() == pytest.approx(1, abs=1e-4)
    assert capsys.readouterr().out.startswith("[")


def test_what_is_not_known_of_a_module_is_not_made_up(theirs: Paths) -> None:
    card = theirs.card.read_text()
    front = front_matter(card)
    assert front["license"] == "unknown"
    assert not front.keys() & {"datasets", "metrics", "model-index"}
    assert "How the module was trained, and on what, is unknown." in card
    assert "| variant | class kept |" in card
    assert "no labels, so the accuracy is unknown" in card
    assert "- **Module:** `card_nets:make`" in card
    assert "input | `images`: float32 [batch, 3, 4, 4]" in card
    assert str(theirs.root) not in card


def test_the_card_of_a_file_from_elsewhere_says_so(theirs: Paths) -> None:
    manifest, validation = records(theirs)
    card = render_card({**manifest, "is_given": True, "versions": {"torch": "none"}}, validation)
    assert "**Exported:** by another tool" in card
    assert f"| torch | {validation['versions']['torch']} (of the proof) |" in card


def test_labelled_images_of_a_module_have_an_accuracy_but_no_data_set(theirs: Paths) -> None:
    manifest, validation = records(theirs)
    front = front_matter(render_card(manifest, {**validation, "is_labelled": True}))
    assert "datasets" not in front
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "a user's images", "type": "unknown"}


def test_a_local_folder_is_not_named(made: Chain) -> None:
    manifest, validation = records(made.paths)
    manifest["training"]["dataset"] = "folder:/somewhere/private/letters"
    card = render_card(manifest, validation)
    assert "private" not in card
    assert "folder:" not in card
    assert "datasets" not in front_matter(card)
    assert "a local folder of pictures" in card


def test_another_data_set_is_called_by_its_name(made: Chain) -> None:
    manifest, validation = records(made.paths)
    manifest["training"]["dataset"] = "kmnist"
    card = render_card(manifest, validation)
    assert front_matter(card)["datasets"] == ["kmnist"]
    assert "0 is paper" not in card
    assert "neither cropped nor centred" in card


def test_names_from_strangers_stay_text(made: Chain) -> None:
    manifest, validation = records(made.paths)
    strange = ["a|b", "``tick`", "two\nlines", "# no heading", "", *map(str, range(200))]
    manifest["classes"] = strange
    manifest["images"]["name"] = 'input"; import os  #'
    card = render_card(manifest, validation)
    assert r"`a\|b`, ``` ``tick` ```, `two lines`, `# no heading`" in card
    assert "and 105 more, in `manifest.json`" in card
    assert '{"input\\"; import os  #": images}' in card
    assert front_matter(card)["license"] == "unknown"


def test_the_license_of_weights_is_left_to_whoever_has_the_pictures(made: Chain) -> None:
    manifest, validation = records(made.paths)
    digits = render_card(manifest, validation)
    assert "not stated for the weights" in digits
    assert "CC BY-SA 3.0" in digits
    training = {**manifest["training"], "dataset": "folder:letters"}
    folder = render_card({**manifest, "training": training}, validation)
    assert (
        "- **License:** not stated: it depends on the license of the pictures; you decide" in folder
    )
    assert "Apache" not in folder


def test_the_card_refers_to_measured_photos_only_for_the_recipe_and_data_that_were(
    made: Chain,
) -> None:
    manifest, validation = records(made.paths)
    for change, is_measured in (
        ({}, True),
        ({"epochs": 0.1}, False),
        ({"network": "net", "channels": [8]}, False),
    ):
        settings = {**TrainConfig().record()["settings"], **change}
        training = {**manifest["training"], "settings": settings}
        card = render_card({**manifest, "training": training}, validation)
        assert ("`docs/results.md`" in card) == is_measured
        assert ("It was not tested on any of them" in card) != is_measured


def test_the_card_of_a_small_set_says_that_there_were_too_few_images(made: Chain) -> None:
    manifest, validation = records(made.paths)
    small = {"min_probability": None, "notes": ["too few images to tell"]}
    card = render_card({**manifest, **small}, validation)
    assert "- Too few images to tell.\n" in card
    assert "min_probability" not in card
