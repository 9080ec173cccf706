"""Anybody's module: from its factory to a served answer, and everything that is wrong with one."""

import json
import os
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from pipeline.client.client import Client
from pipeline.core.errors import PipelineError
from pipeline.export import graph
from pipeline.export.sample import Sample, pack_sample, read_sample
from pipeline.export.subject import detect_kind, subject_of_module, weights_digest
from pipeline.images.read import prepare_picture
from pipeline.validation.reference import reference_predictor
from tests import networks
from tests.conftest import (
    CAST,
    REPOSITORY,
    Chain,
    error_line,
    link_server_environment,
    short_proofs,
    small,
)

SAMPLE = networks.residual_sample()
LABELS = np.zeros(0) if SAMPLE.labels is None else SAMPLE.labels  # they are there


PAGE = (REPOSITORY / "docs" / "own-networks.md").read_text()


@pytest.fixture
def project(tmp_path: Path) -> Chain:
    """A folder with images and nothing else; the module lies beside the tests."""
    np.savez(tmp_path / "images.npz", images=SAMPLE.images, labels=LABELS)
    return Chain(tmp_path)


def options(project: Chain, factory: str = "residual", file: str = "images.npz") -> list[str]:
    return ["--module", f"tests.networks:{factory}", "--images", str(project.root / file)]


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Somebody's module with all its variants, exported and proven. Read it."""
    root = tmp_path_factory.mktemp("proven")
    np.savez(root / "images.npz", images=SAMPLE.images, labels=LABELS)
    chain = Chain(root)
    named = ["--name", "residual"]
    picture = ["--picture", "resize=36,color=rgb"]
    chain.record("export", *options(chain), *named, *picture, "--precision", "fp32,fp16")
    with short_proofs():
        chain.record("validate", *named)
    return chain


@pytest.mark.slow
def test_the_signature_is_that_of_the_sample(proven: Chain) -> None:
    manifest = json.loads((proven.root / "exported/residual/manifest.json").read_text())
    assert manifest["images"] == {"name": "images", "dtype": "uint8", "shape": [3, 32, 32]}
    assert manifest["outputs"] == {"name": "logits", "dtype": "float32", "shape": [5]}
    assert manifest["module"] == "tests.networks:residual"
    assert manifest["classes"] == list("01234")
    wanted = "resize=36,color=rgb,shape=3x32x32,dtype=uint8"
    assert manifest["pictures"] == wanted
    found = graph.read_signature(
        graph.parse((proven.root / "exported/residual/model.onnx").read_bytes(), "it"), "it"
    )
    assert found.images.shape == (3, 32, 32)


@pytest.mark.slow
def test_a_module_has_no_run_to_report_on_but_a_card(proven: Chain) -> None:
    result = proven.run("report", "--name", "residual")
    assert result.exit_code == 1
    assert "exported/residual/MODEL_CARD.md" in error_line(result)
    card = (proven.root / "exported/residual/MODEL_CARD.md").read_text()
    assert str(proven.root) not in card
    assert "prepare pictures by the rule `resize=36,color=rgb,shape=3x32x32" in card


@pytest.fixture
def served_module(proven: Chain, tmp_path: Path) -> Iterator[Chain]:
    chain = Chain(tmp_path / "project")
    shutil.copytree(proven.root, chain.root)
    link_server_environment(chain)
    yield chain
    chain.run("serve", "stop")


@pytest.mark.server
@pytest.mark.slow
def test_somebodys_module_goes_all_the_way_to_a_served_and_proven_answer(
    served_module: Chain,
) -> None:
    chain = served_module
    names = [one["name"] for one in chain.record("package", "--name", "residual")["variants"]]
    assert names == ["residual", "residual-fp16"]
    tables = chain.record("validate", str(chain.root / "exported/model_repository"))["models"]
    for table in tables:
        assert [row["differing"] for row in table["rows"]] == [0, 0, 0, 0]
    server = chain.record("serve", "--detach", "--port", "auto")
    with Client(f"grpc://127.0.0.1:{server['grpc_port']}", "residual") as client:
        predictions = client.classify(SAMPLE.images[:9])
        picture = SAMPLE.images[0].transpose(1, 2, 0)
        prepared = prepare_picture(picture, pictures=client.pictures())
        assert client.classify(picture) == client.classify(prepared.image)
    module = networks.residual().eval()
    chances = torch.softmax(module(torch.from_numpy(SAMPLE.images[:9])), dim=1)
    assert [int(one.label) for one in predictions] == chances.argmax(dim=1).tolist()
    for one, row in zip(predictions, chances, strict=True):
        assert one.probability == pytest.approx(row.max().item(), abs=1e-4)
        assert sum(chance for _, chance in one.top) <= 1 + 1e-6


def plain_export(module: nn.Module, path: Path) -> None:
    """What most people do: torch.onnx.export straight onto a path."""
    path.parent.mkdir(exist_ok=True)
    example = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    torch.onnx.export(
        module.eval(),
        (example,),
        path,
        dynamo=True,
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        verbose=False,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
def test_a_file_of_the_docs_torch_onnx_export_is_proven_once_it_is_scrubbed(
    project: Chain, short_proof: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    monkeypatch.syspath_prepend(project.root)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL):
        Path(name).write_text(code)
    torch.manual_seed(0)
    torch.save(runpy.run_path("nets.py")["Network"]().state_dict(), "weights.pt")
    images = np.random.default_rng(0).uniform(-0.5, 0.5, (40, 3, 32, 32)).astype(np.float32)
    np.savez("test.npz", images=images)
    runpy.run_path("export.py")
    (command,) = re.findall(r"\$ pipeline (validate --onnx .*)", PAGE)
    asked = [*shlex.split(command.replace("mine", "plain")), "--picture", "resize=32,mean=0.5"]
    refused = project.run(*(word for word in asked if word != "--scrub"))
    assert refused.exit_code == 3
    assert "external data" in error_line(refused)
    assert "--scrub" in error_line(refused)
    assert project.record(*asked)["passed"] is True
    manifest = json.loads(Path("exported/plain/manifest.json").read_text())
    assert manifest["pictures"] == "resize=32,mean=0.5,shape=3x32x32,dtype=float32"
    assert sorted(os.listdir(project.root / "exported" / "plain")) == [
        *("MODEL_CARD.md", "evidence.npz", "golden.npz", "images.npz"),
        *("manifest.json", "model.onnx", "reference_profile.json", "validation.json"),
    ]
    assert project.record("validate", "--name", "plain")["passed"] is True
    assert project.record("package", "--name", "plain")["version"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
def test_a_plain_export_with_a_wrong_reshape_is_refused_and_its_rows_can_be_replayed(
    project: Chain, short_proof: None
) -> None:
    path = project.root / "theirs" / "wrong.onnx"
    plain_export(networks.mixing(), path)
    asked = ["validate", "--onnx", str(path), "--scrub", "--name", "wrong"]
    result = project.run(*asked, *options(project))
    assert result.exit_code == 3
    assert "a row's answer depends on its batch or place" in error_line(result)
    exported = project.root / "exported" / "wrong"
    assert os.listdir(exported) == ["failed"]
    worst = str(exported / "failed" / "worst.npz")
    again = project.run(*asked, "--module", "tests.networks:residual", "--replay", worst)
    assert again.exit_code == 3
    assert "10 of 10 rows" in error_line(again)
    assert project.run("package", "--name", "wrong").exit_code == 1


def test_the_help_says_what_a_file_of_torch_onnx_export_needs(project: Chain) -> None:
    text = re.sub(r"\s+", " ", project.run("validate", "--help").output)
    assert "torch.onnx.export needs --scrub here, and at its export dynamic_shapes" in text


def test_a_file_of_work_without_end_is_refused_before_it_is_loaded(project: Chain) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["n"], ["a0"]),
        *(helper.make_node("MatMul", [f"a{i}"] * 2, [f"a{i + 1}"]) for i in range(14)),
    ]
    large = numpy_helper.from_array(np.array([8000, 8000]), "n")
    path = project.root / "work.onnx"
    path.write_bytes(small(nodes=[CAST, *nodes], tensors=[large]).SerializeToString())
    for scrubbed in ([], ["--scrub"]):
        result = project.run("validate", "--onnx", str(path), *options(project), *scrubbed)
        assert result.exit_code == 3
        assert "MatMul a1 has the most, 515,072,000,000" in error_line(result)


@pytest.mark.slow
def test_a_module_with_a_planted_bug_is_refused(project: Chain, short_proof: None) -> None:
    named = ["--name", "mixing"]
    assert project.run("export", *options(project, "mixing"), *named).exit_code == 0
    result = project.run("validate", *named)
    assert result.exit_code == 3
    assert "a row's answer depends on its batch or place" in error_line(result)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("unseeded", "makes other weights each time"),
        ("failing", "ValueError: no weights here"),
        ("no_module", "returns a int, not a torch.nn.Module"),
        ("missing", "has no attribute 'missing'"),
        *(
            (factory, "computes as in training even after .eval()")
            for factory in ("stubborn", "moving", "batchwise")
        ),
        ("stubborn", "(Stubborn, stem, norm, first, second): with batch statistics an answer"),
        ("batchwise", "(norm): with batch statistics an answer depends on the other images"),
        ("of_floats", "Save them as for its training, such as images.astype(np.float32) / 255"),
        ("flat", "does not take images of uint8 150 x 3 x 32 x 32"),
    ],
)
def test_a_factory_that_makes_no_module_of_its_own_is_named(
    project: Chain, factory: str, said: str
) -> None:
    result = project.run("export", *options(project, factory), "--name", "it")
    assert result.exit_code == 1
    assert said in error_line(result)
    assert not (project.root / "exported").exists()


def test_what_is_missing_on_the_command_line_is_wrong_usage(project: Chain) -> None:
    for arguments in (
        ["export", "--module", "tests.networks:residual", "--name", "it"],
        ["export", *options(project)],
        ["export", "--images", "x.npz"],
        ["validate", "--onnx", "x.onnx"],
        ["validate", "--images", "x.npz"],
    ):
        assert project.run(*arguments).exit_code == 2
    taken = project.run("export", *options(project), "--name", "handwriting")
    assert taken.exit_code == 1
    assert "is reserved" in error_line(taken)


def test_a_factory_may_return_its_module_in_training_mode(project: Chain) -> None:
    assert networks.residual().training
    subject = subject_of_module("tests.networks:residual", SAMPLE, project.root)
    assert not any(part.training for part in subject.model.modules())


@pytest.mark.parametrize(
    ("factory", "outputs"),
    [
        ("several", r"'hidden' \(2, 5, 1\), 'logits' \(2, 5\)"),
        ("model_output", r"'hidden' \(2, 5, 1\), 'logits' \(2, 5\)"),
        ("several_in_a_tuple", r"0 \(2, 5, 1\), 1 \(2, 5\)"),
    ],
)
def test_a_module_of_several_outputs_is_refused_with_the_wrapper_that_solves_it(
    project: Chain, factory: str, outputs: str
) -> None:
    with pytest.raises(PipelineError, match=outputs) as raised:
        subject_of_module(f"tests.networks:{factory}", SAMPLE, project.root)
    first, *wrapper = str(raised.value).splitlines()
    assert first.endswith("Let the factory return OneOutput(network):")
    assert len(wrapper) == 3
    assert all(line.strip().replace("[1]", "['logits']") in PAGE for line in wrapper)
    lines = ["import torch, tests.networks", *wrapper, "def make():"]
    lines += [f"    return OneOutput(tests.networks.{factory}())"]
    text = textwrap.dedent("\n".join(wrapper))
    file = project.root / f"wrapped_{factory}.py"
    file.write_text("\n".join([lines[0], text, *lines[-2:]]))
    subject = subject_of_module(f"{file.stem}:make", SAMPLE, project.root)
    assert subject.outputs.shape == (5,)


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("nets.py:make", "give 'nets:make'"),
        ("nets/small.py:make", "give 'nets.small:make'"),
        ("./nets.py:make", "give 'nets:make'"),
        ("/srv/me/nets.py:make", "give 'nets:make', with /srv/me in PYTHONPATH"),
        ("../nets.py:make", "give 'nets:make', with .. in PYTHONPATH"),
    ],
)
def test_a_file_as_a_module_is_refused_with_the_modules_name(
    project: Chain, given: str, fix: str
) -> None:
    named = ["--images", str(project.root / "images.npz"), "--name", "it"]
    result = project.run("export", "--module", given, *named)
    assert result.exit_code == 1
    assert error_line(result) == f"'{given}' names a file: {fix}"


def test_float64_images_become_float32_and_that_is_said(project: Chain) -> None:
    doubles = np.random.default_rng(0).normal(size=(9, 12))
    np.savez(project.root / "flat.npz", images=doubles, calibration=doubles[::-1])
    sample = read_sample(project.root / "flat.npz")
    np.testing.assert_array_equal(sample.images, doubles.astype(np.float32))
    assert sample.calibration.dtype == np.float32
    arguments = [*options(project, "missing", "flat.npz"), "--name", "it"]
    result = project.run("export", *arguments)
    assert result.stderr.count("flat.npz becomes float32") == 1
    np.savez(project.root / "large.npz", images=np.full((9, 12), 1e300))
    with pytest.raises(PipelineError, match="not finite in float32"):
        read_sample(project.root / "large.npz")
    with pytest.raises(PipelineError, match=r"float64, which is not served: call .float\(\) on it"):
        subject_of_module("tests.networks:double", sample, project.root)


@pytest.mark.parametrize(
    ("picture", "problem"),
    [
        ("size=32", "give resize, color, mean, std as KEY=VALUE"),
        ("resize=8", "resize must be N or HEIGHTxWIDTH, from 32x32 to 4096 pixels"),
        ("color=gray", "color must be rgb or bgr"),
        ("mean=0.5", "the network takes uint8 and normalizes by itself"),
    ],
)
def test_a_wrong_picture_rule_is_wrong_usage(project: Chain, picture: str, problem: str) -> None:
    asked = ["export", *options(project), "--name", "it", "--picture", picture]
    result = project.run(*asked)
    assert result.exit_code == 2
    assert f"Invalid value for '--picture': {problem}" in result.stderr
    assert project.run("export", "--picture", picture).exit_code == 2


def test_a_picture_rule_that_cannot_have_made_the_images_is_refused(project: Chain) -> None:
    images = np.random.default_rng(0).normal(size=(9, 3, 8, 8)).astype(np.float32)
    np.savez(project.root / "normal.npz", images=images)
    asked = ["export", *options(project, file="normal.npz"), "--name", "it", "--picture"]
    refused = project.run(*asked, "mean=0.5")
    assert refused.exit_code == 2
    assert "--picture makes -0.5 to 0.5 of pictures, --images has -" in refused.stderr
    assert "mean and std that" not in project.run(*asked, "mean=0.5,std=0.05").stderr


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": SAMPLE.images[:, :2]}, "does not take images of uint8 150 x 2 x 32 x 32"),
        ({"images": SAMPLE.images[:1]}, "at least 2 images"),
        ({"images": SAMPLE.images.astype(np.complex64)}, "complex64"),
        ({"images": SAMPLE.images, "labels": LABELS[:9]}, "not 150 whole numbers"),
        ({"images": SAMPLE.images, "labels": LABELS + 1}, "labels are 1 to 5, but"),
        ({"pictures": SAMPLE.images, "labels": LABELS}, "no array called images"),
    ],
)
def test_images_that_cannot_be_the_modules_are_refused_in_words(
    project: Chain, arrays: dict[str, np.ndarray], said: str
) -> None:
    np.savez(project.root / "odd.npz", **arrays)  # type: ignore[arg-type]  # the stub's option
    result = project.run("export", *options(project, file="odd.npz"), "--name", "it")
    assert result.exit_code == 1
    assert said in error_line(result)


@pytest.mark.slow
def test_a_module_of_floats_has_an_fp16_variant_too(project: Chain, short_proof: None) -> None:
    images = np.random.default_rng(0).normal(size=(120, 12)).astype(np.float32)
    np.savez(project.root / "flat.npz", images=images)
    named = [*options(project, "flat", "flat.npz"), "--name", "flat", "--precision", "fp16"]
    assert len(project.record("export", *named)["variants"]) == 2
    assert project.record("validate", "--name", "flat")["passed"] is True


@pytest.mark.slow
def test_a_module_that_is_not_finite_proves_nothing_and_says_so(project: Chain) -> None:
    images = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32)
    np.savez(project.root / "flat.npz", images=images)
    named = ["--name", "flat"]
    assert project.run("export", *options(project, "masked", "flat.npz"), *named).exit_code == 0
    result = project.run("validate", *named)
    assert result.exit_code == 3
    assert "answers row 0 in float64 with values that are not finite" in error_line(result)


def test_names_of_classes_are_of_one_line_each_and_not_the_same_twice(project: Chain) -> None:
    asked = ["export", *options(project), "--name", "it", "--classes"]
    for classes in ("a,b,c,c,d", "a,b,,c,d", "a\n0 errors,b,c,d,e", "a,b\u2028z,c,d,e"):
        result = project.run(*asked, classes)
        assert result.exit_code == 1
        assert "are repeated, empty or have control characters" in error_line(result)


@pytest.mark.slow
def test_images_of_another_kind_are_not_replayed(proven: Chain) -> None:
    np.savez(proven.root / "other.npz", images=SAMPLE.images.astype(np.float32))
    replayed = str(proven.root / "other.npz")
    result = proven.run("validate", "--name", "residual", "--replay", replayed)
    assert result.exit_code == 1
    assert "the images are float32 (3, 32, 32), but the module takes images (uint8" in error_line(
        result
    )


def test_nothing_in_a_file_of_images_is_unpickled(project: Chain) -> None:
    np.savez(project.root / "evil.npz", images=np.array([{"a": 1}], dtype=object))
    result = project.run("export", *options(project, file="evil.npz"), "--name", "it")
    assert result.exit_code == 1
    assert "cannot read" in error_line(result)


def test_labels_may_come_in_a_file_of_their_own(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", SAMPLE.images)
    np.save(tmp_path / "labels.npy", LABELS)
    np.savetxt(tmp_path / "labels.txt", LABELS, fmt="%d")
    for name in ("labels.npy", "labels.txt"):
        sample = read_sample(tmp_path / "images.npy", tmp_path / name)
        assert sample.labels is not None
        assert np.array_equal(sample.labels, LABELS)
    (tmp_path / "labels.txt").write_text("cat\n")
    with pytest.raises(PipelineError, match="could not convert string 'cat'"):
        read_sample(tmp_path / "images.npy", tmp_path / "labels.txt")


def test_a_sample_is_kept_whole_but_for_the_calibration_images_that_are_not_used(
    tmp_path: Path,
) -> None:
    other = Sample(SAMPLE.images, None, SAMPLE.images[::-1].copy())
    (tmp_path / "kept.npz").write_bytes(pack_sample(other, 7))
    kept = read_sample(tmp_path / "kept.npz")
    assert np.array_equal(kept.images, SAMPLE.images)
    assert kept.labels is None
    assert np.array_equal(kept.calibration, SAMPLE.images[::-1][:7])


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        (np.log([[0.2, 0.8], [0.5, 0.5]]), "log_probabilities"),
        (np.array([[0.2, 0.8], [0.5, 0.5]]), "probabilities"),
        (np.array([[2.0, -8.0], [0.5, 0.5]]), "logits"),
        (np.array([[-2.0, -8.0], [-0.5, -0.5]]), "logits"),
    ],
)
def test_outputs_are_called_what_they_are(outputs: np.ndarray, kind: str) -> None:
    assert detect_kind(outputs) == kind


class HalfWay(nn.Module):
    """A module that insists on float32, and on half precision in between."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(3.0)
        self.line = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x.float() / 3).half().to(torch.float32) + torch.ones(4, dtype=torch.float32)
        outputs: torch.Tensor = self.line(x * self.scale).float()
        return outputs


@pytest.mark.slow
def test_the_reference_is_float64_whatever_the_module_casts_to() -> None:
    module = HalfWay()
    images = np.arange(12, dtype=np.uint8).reshape(3, 4)
    weight, bias = module.line.weight.double(), module.line.bias.double()
    exact = (torch.from_numpy(images).double() / 3 + 1) * 3 @ weight.t() + bias
    outputs = reference_predictor(module)(images)
    assert outputs.dtype == np.float64
    assert np.abs(outputs - exact.detach().numpy()).max() < 1e-12
    assert module.line.weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_a_module_of_flat_floats_is_a_subject_too(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
    subject = subject_of_module("tests.networks:flat", Sample(images, None, images), tmp_path)
    assert subject.images.shape == (12,)
    assert subject.kind == "log_probabilities"
    assert weights_digest(subject.model) == subject.weights_sha256
