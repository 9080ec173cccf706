"""Broken exports, each of which has to be refused with the reason in words."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn

from pipeline.core.errors import CheckFailedError
from pipeline.core.paths import Paths
from pipeline.core.signature import IMAGES
from pipeline.data.splits import load_split
from pipeline.export.export import (
    check_onnx,
    export_program,
    read_third_party_onnx,
    signature_of,
    to_onnx,
)
from pipeline.export.sample import Sample
from pipeline.export.subject import subject_of_run
from pipeline.export.targets import ExportConfig
from pipeline.export.variants import to_fp16, to_int8
from pipeline.training.networks import Cnn
from pipeline.validation.check_file import FileTrial, try_file
from pipeline.validation.compare import Criterion
from tests import networks
from tests.conftest import Chain, error_line, small
from tests.networks import onnx_of

# Of so few images one or two may be lost.
CRITERION = Criterion(
    batch_sizes=(1, 3, 64),
    largest_batch=16,
    threads=(1,),
    lost_accuracy=(("fp16", 0.003), ("int8", 0.006)),
)


Sabotage = Callable[[Cnn], nn.Module]


@dataclass(frozen=True)
class Bench:
    """A trained network, its sound export, and the trial that any file of it has to pass."""

    trial: FileTrial
    sound: bytes
    calibration: np.ndarray
    exports: dict[Sabotage, bytes] = field(default_factory=dict)

    @property
    def network(self) -> Cnn:
        model = copy.deepcopy(self.trial.subject.model)
        assert isinstance(model, Cnn)
        return model

    def broken(self, sabotage: Sabotage) -> bytes:
        """The export of a network that was broken before; each is exported once."""
        if sabotage not in self.exports:
            self.exports[sabotage] = onnx_of(sabotage(self.network))
        return self.exports[sabotage]

    def judge(self, content: bytes, precision: str = "fp32", is_ours: bool = True) -> None:
        """Everything that `pipeline validate` asks of a file."""
        check_onnx(content, signature_of(self.trial.subject, ExportConfig()))
        made = {"fp32": self.sound} if is_ours and precision == "fp32" else {}
        try_file(self.trial, precision, content, made)


@pytest.fixture(scope="module")
def bench(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    subject = subject_of_run(made.paths)
    test = load_split("mnist", made.paths.data("mnist"), "test")
    calibration = load_split("mnist", made.paths.data("mnist"), "train").images[:128]
    sample = Sample(test.images[:400], test.labels[:400], calibration)
    paths = Paths(tmp_path_factory.mktemp("sabotage"))
    trial = FileTrial(paths, subject, sample, CRITERION, "cpu", lambda line: None, "")
    return Bench(trial, onnx_of(subject.model), calibration)


@pytest.fixture
def no_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the first run in a process of its own, which finds nothing wrong with a network.

    Files that were edited have it, and the tests of what only it refuses.
    """
    monkeypatch.setattr("pipeline.validation.check_file.require_first_run", lambda content: None)


@pytest.mark.slow
def test_the_sound_export_passes(bench: Bench) -> None:
    bench.judge(bench.sound)


class Wrapped(nn.Module):
    """A network whose images or answers are tampered with on the way."""

    def __init__(
        self,
        network: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda images: images,
        after: Callable[[Tensor], Tensor] = lambda outputs: outputs,
    ) -> None:
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.network(self.before(images)))


class Mixing(nn.Module):
    """A network whose features are reshaped so that rows mix."""

    def __init__(self, network: Cnn) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        network = self.network
        x = network.features((images / 255.0 - network.mean) / network.std)
        x = torch.cat([network.maximum(x), network.mean_pool(x)], dim=1)  # (B, 2 d, 1, 1)
        x = x.flatten().view(x.shape[1], -1).t()
        return torch.log_softmax(network.classifier(x) / network.temperature, dim=1)


def dropout_left_on(network: Cnn) -> nn.Module:
    network.features.append(nn.Dropout(0.5))
    return network.train()


def wrong_mean(network: Cnn) -> nn.Module:
    network.mean += 0.05
    return network


def wrong_scale(network: Cnn) -> nn.Module:
    network.std *= 1.05
    return network


def unfitted_temperature(network: Cnn) -> nn.Module:
    network.temperature.fill_(1.25)
    return network


def largest_weight_by_a_hundredth(network: Cnn) -> nn.Module:
    weight = network.classifier.weight.data.view(-1)
    weight[weight.abs().argmax()] *= 1.01
    return network


def smallest_weight_by_a_hundredth(network: Cnn) -> nn.Module:
    weight = network.classifier.weight.data.view(-1)
    weight[weight.abs().argmin()] *= 1.01
    return network


def swapped_labels(network: Cnn) -> nn.Module:
    for parameter in (network.classifier.weight.data, network.classifier.bias.data):
        parameter[[3, 5]] = parameter[[5, 3]]
    return network


NETWORKS: list[tuple[Sabotage, str]] = [
    (dropout_left_on, r"random operators: Dropout; call \.eval\(\) before the export"),
    (wrong_mean, r"mean is 0\.1807 instead of 0\.1307"),
    (wrong_scale, r"std is 0\.3235\d* instead of 0\.3081"),
    (unfitted_temperature, r"temperature is 1\.25 instead of"),
    (largest_weight_by_a_hundredth, "classifier.weight differs in 1 of 960 values"),
    (smallest_weight_by_a_hundredth, "classifier.weight differs in 1 of 960 values"),
    (swapped_labels, "labels are swapped: it answers 5 for 3, 3 for 5"),
    (lambda n: Wrapped(n, lambda images: 255 - images), "the ink is inverted"),
    (lambda n: Wrapped(n, lambda images: images.transpose(2, 3)), "images are transposed"),
    (lambda n: Wrapped(n, lambda images: images.flip(3)), "mirrored from left to right"),
    (lambda n: Wrapped(n, lambda images: images.flip(2)), "upside down"),
    (lambda n: Wrapped(n, after=torch.exp), "answers probabilities, not their logarithms"),
    (lambda n: Wrapped(n, after=lambda y: 3 + y), "the final log-softmax is missing"),
    (lambda n: Wrapped(n, after=lambda y: y - y.mean(0)), "something normalizes over the batch"),
    (lambda n: Wrapped(n, after=lambda y: torch.softmax(3 + y.exp(), 1)), "differs by"),
    (Mixing, "a row's answer depends on its batch or place: a reshape mixes rows"),
]


@pytest.mark.usefixtures("no_first_run")
@pytest.mark.slow
@pytest.mark.parametrize(("sabotage", "said"), NETWORKS)
def test_a_network_that_was_broken_before_export_is_refused(
    bench: Bench, sabotage: Sabotage, said: str
) -> None:
    with pytest.raises(CheckFailedError, match=said):
        bench.judge(bench.broken(sabotage))


@pytest.mark.usefixtures("no_first_run")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "said"),
    [(s, said) for s, said in NETWORKS if s is not smallest_weight_by_a_hundredth],
)
def test_it_is_refused_as_well_where_something_else_exported_it(
    bench: Bench, sabotage: Sabotage, said: str
) -> None:
    with pytest.raises(CheckFailedError, match=said):
        bench.judge(bench.broken(sabotage), is_ours=False)


def edited(content: bytes, edit: Callable[[onnx.ModelProto], object]) -> bytes:
    model = onnx.load_model_from_string(content)
    edit(model)
    return model.SerializeToString()


def flip_the_last_bit_of_a_weight(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "classifier.weight")
    values = numpy_helper.to_array(weight).copy()
    values.view(np.uint32).flat[7] ^= 1
    weight.raw_data = values.tobytes()


def fix_the_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def leave_the_norm_in_training_mode(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    for attribute in node.attribute:
        if attribute.name == "training_mode":
            node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute("training_mode", 1))


def take_floats(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def keep_a_custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node[3].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def ask_for_eight_gigabytes(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(
        helper.make_tensor("huge_shape", TensorProto.INT64, [2], [2**15, 2**16])
    )
    model.graph.node.append(helper.make_node("ConstantOfShape", ["huge_shape"], ["huge"]))


def import_another_opset(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("", 7))


def import_what_no_node_uses(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def let_a_client_override_a_weight(model: onnx.ModelProto) -> None:
    weight = model.graph.initializer[0]
    model.graph.input.append(
        helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
    )


def call_a_node_after_its_source(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = PATH


def keep_a_source_path_in_a_string(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([PATH], object), "origin"))


def multiply_large_matrices(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([8000, 8000]), "large"))
    nodes = [helper.make_node("ConstantOfShape", ["large"], ["product0"])]
    nodes += [
        helper.make_node("MatMul", [f"product{i}"] * 2, [f"product{i + 1}"]) for i in range(14)
    ]
    model.graph.node.extend(nodes)


PATH = "/home" + "/alice/secret-project/train.py:33"
WORK = "2 images take [0-9,]+ multiply-adds, .* are allowed; MatMul product1 has the most"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (flip_the_last_bit_of_a_weight, "classifier.weight differs in 1 of 960 values"),
        (leave_the_norm_in_training_mode, "a batch normalization in training mode"),
        (fix_the_batch, "dimension 0 of images is 2, not"),
        (take_floats, "float32|not a valid ONNX model"),
        (keep_a_custom_operator, "operators of domain com.example"),
        (ask_for_eight_gigabytes, r"huge \(ConstantOfShape\) takes 8589934592 bytes"),
        (import_another_opset, "the standard domain imported as 18 and 7"),
        (import_what_no_node_uses, "imports that no node uses, com.example"),
        (let_a_client_override_a_weight, "weights that a client may override"),
        (call_a_node_after_its_source, f"source paths in the name '{PATH}'"),
        (keep_a_source_path_in_a_string, "a source path in the data of origin"),
        (multiply_large_matrices, WORK),
    ],
)
def test_a_file_that_was_edited_after_export_is_refused(
    bench: Bench, edit: Callable[[onnx.ModelProto], object], said: str
) -> None:
    with pytest.raises(CheckFailedError, match=said):
        bench.judge(edited(bench.sound, edit))


class TakesFloats(nn.Module):
    """A network whose client has to scale its pixels."""

    def __init__(self, network: Cnn) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return torch.log_softmax(self.network.logits(images), dim=1)


@pytest.mark.slow
def test_a_file_that_takes_floats_is_refused(bench: Bench) -> None:
    images = replace(IMAGES, dtype="float32")
    subject = replace(bench.trial.subject, images=images, model=TakesFloats(bench.network))
    content = to_onnx(
        export_program(subject.model, images), signature_of(subject, ExportConfig()), {}
    )
    with pytest.raises(
        CheckFailedError, match=r"takes images \(float32 .*should be one that takes images \(uint8"
    ):
        bench.judge(content)


@pytest.mark.parametrize("place", ["symlink", "hard link", "up"])
def test_data_in_another_file_is_refused_however_it_lies_there(tmp_path: Path, place: str) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(16))
    folder = tmp_path / "model"
    folder.mkdir()
    location = "../secret.bin" if place == "up" else "weights.bin"
    if place == "symlink":
        (folder / location).symlink_to(secret)
    elif place == "hard link":
        (folder / location).hardlink_to(secret)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    path = folder / "model.onnx"
    path.write_bytes(small(tensors=[weight]).SerializeToString())
    with pytest.raises(CheckFailedError, match=f"external data: w in '{re.escape(location)}'"):
        read_third_party_onnx(path)
    with pytest.raises(CheckFailedError, match="the data of w in"):
        read_third_party_onnx(path, scrub=True)


def twice_a_producer(content: bytes) -> bytes:
    """The file after a name of its producer that the last one hides from who parses it."""
    hidden = onnx.ModelProto(producer_name=PATH)
    return hidden.SerializeToString() + content


def with_a_field_of_a_later_format(content: bytes) -> bytes:
    return content + b"\xfa\x7f" + bytes([len(PATH)]) + PATH.encode()


@pytest.mark.parametrize("tamper", [twice_a_producer, with_a_field_of_a_later_format])
def test_bytes_outside_of_the_graph_are_refused_and_scrubbed(
    tamper: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    model = small()
    model.producer_name = "sound"
    path = tmp_path / "model.onnx"
    path.write_bytes(tamper(model.SerializeToString()))
    with pytest.raises(CheckFailedError, match="not part of its graph: '--scrub' leaves"):
        read_third_party_onnx(path)
    assert PATH.encode() not in read_third_party_onnx(path, scrub=True)


@pytest.mark.parametrize("key", ["k", PATH])
def test_metadata_that_shows_a_source_path_is_refused_and_scrubbed(
    key: str, tmp_path: Path
) -> None:
    model = small()
    model.metadata_props.add(key=key, value=PATH)
    model.metadata_props.add(key="classes", value="10")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckFailedError, match="source paths in metadata"):
        read_third_party_onnx(path)
    content = read_third_party_onnx(path, scrub=True)
    assert b"alice" not in content
    assert b"classes" in content


@pytest.mark.slow
def test_a_given_file_has_its_first_run_in_a_process_of_its_own_and_our_export_has_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bytes] = []
    monkeypatch.setattr("pipeline.validation.check_file.require_first_run", tried.append)
    bench.judge(bench.sound)
    assert not tried
    bench.judge(bench.sound, is_ours=False)
    other = edited(bench.sound, flip_the_last_bit_of_a_weight)
    with pytest.raises(CheckFailedError):
        bench.judge(other)
    assert tried == [bench.sound, other]


@pytest.mark.usefixtures("no_first_run")
@pytest.mark.slow
def test_int8_that_was_calibrated_on_blank_images_is_refused(bench: Bench) -> None:
    blank = np.zeros_like(bench.calibration)
    with pytest.raises(CheckFailedError, match=r"accuracy falls by \d+\.\d\d points against fp32"):
        bench.judge(to_int8(bench.sound, 9, blank), "int8")


@pytest.mark.slow
def test_int8_without_any_image_to_calibrate_on_is_refused(bench: Bench) -> None:
    with pytest.raises(CheckFailedError, match="int8 needs images for its calibration"):
        to_int8(bench.sound, 9, bench.calibration[:0])


@pytest.mark.usefixtures("no_first_run")
@pytest.mark.slow
def test_int8_that_finds_its_ranges_in_each_batch_is_refused(bench: Bench, tmp_path: Path) -> None:
    source, target = tmp_path / "fp32.onnx", tmp_path / "dynamic.onnx"
    source.write_bytes(edited(bench.sound, lambda model: model.graph.ClearField("value_info")))
    quantize_dynamic(source, target)
    model = onnx.load_model(target)
    del model.opset_import[1:]
    model.ir_version = 9
    with pytest.raises(CheckFailedError, match="depends on its batch or place"):
        bench.judge(model.SerializeToString(), "int8")


@pytest.mark.slow
def test_half_precision_that_passes_itself_off_as_fp32_is_refused(bench: Bench) -> None:
    with pytest.raises(CheckFailedError, match="times eager float32's, 8 times is allowed"):
        bench.judge(to_fp16(bench.sound, 9), is_ours=False)


def negate_at(*sizes: int) -> Callable[[onnx.ModelProto], None]:
    """Make an edit after which a file answers batches of these sizes with the opposite."""

    def edit(model: onnx.ModelProto) -> None:
        image, answer = model.graph.input[0].name, model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = ["right" if name == answer else name for name in node.output]
        constants: dict[str, np.ndarray] = {
            "sizes": np.array(sizes, np.int64),
            "axis": np.array([0], np.int64),
            "plus": np.array([1], np.float32),
            "minus": np.array([-1], np.float32),
        }
        for name, value in constants.items():
            model.graph.initializer.append(numpy_helper.from_array(value, name))
        steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
            ("Shape", [image], "shape", {"start": 0, "end": 1}),
            ("Equal", ["shape", "sizes"], "hits", {}),
            ("Cast", ["hits"], "counted", {"to": TensorProto.FLOAT}),
            ("ReduceMax", ["counted", "axis"], "hit", {"keepdims": 1}),
            ("Cast", ["hit"], "is_hit", {"to": TensorProto.BOOL}),
            ("Where", ["is_hit", "minus", "plus"], "sign", {}),
            ("Mul", ["right", "sign"], answer, {}),
        ]
        for operator, taken, given, attributes in steps:
            model.graph.node.append(helper.make_node(operator, taken, [given], **attributes))

    return edit


@pytest.mark.usefixtures("no_first_run")
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(40, 44, 52), (255,)])
def test_a_file_that_is_wrong_at_some_batch_sizes_is_refused(
    bench: Bench, sizes: tuple[int, ...]
) -> None:
    every_size = replace(bench.trial, criterion=replace(CRITERION, largest_batch=256))
    with pytest.raises(CheckFailedError, match=f"batch size {sizes[0]}, 1 thread"):
        replace(bench, trial=every_size).judge(
            edited(bench.sound, negate_at(*sizes)), is_ours=False
        )


def negate_copies(model: onnx.ModelProto) -> None:
    """Answer a batch of copies of one image with the opposite."""
    image, answer = model.graph.input[0].name, model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["right" if name == answer else name for name in node.output]
    constants: dict[str, np.ndarray] = {
        "axis": np.array([0], np.int64),
        "all": np.array([0, 1, 2, 3], np.int64),
        "one": np.array([1], np.int64),
        "plus": np.array([1], np.float32),
        "minus": np.array([-1], np.float32),
        "nothing": np.array([0], np.float32),
    }
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Cast", [image], "pixels", {"to": TensorProto.FLOAT}),
        ("ReduceMax", ["pixels", "axis"], "high", {}),
        ("ReduceMin", ["pixels", "axis"], "low", {}),
        ("Sub", ["high", "low"], "spread", {}),
        ("ReduceSum", ["spread", "all"], "total", {"keepdims": 0}),
        ("Equal", ["total", "nothing"], "is_same", {}),
        ("Shape", [image], "count", {"start": 0, "end": 1}),
        ("Greater", ["count", "one"], "is_several", {}),
        ("And", ["is_same", "is_several"], "are_copies", {}),
        ("Where", ["are_copies", "minus", "plus"], "sign", {}),
        ("Mul", ["right", "sign"], answer, {}),
    ]
    for operator, taken, given, attributes in steps:
        model.graph.node.append(helper.make_node(operator, taken, [given], **attributes))


@pytest.mark.usefixtures("no_first_run")
@pytest.mark.slow
def test_a_file_that_is_wrong_about_copies_of_one_image_is_refused(bench: Bench) -> None:
    with pytest.raises(CheckFailedError, match="batch size 2 of one image, 1 thread"):
        bench.judge(edited(bench.sound, negate_copies), is_ours=False)


SAMPLE = networks.residual_sample()


@cache
def onnx_of_residual(factory: Callable[[], nn.Module]) -> bytes:
    return networks.residual_onnx(factory())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "exported", "message"),
    [
        ("turncoat", networks.turncoat, r"not stable in float32: its largest error is \d"),
        ("swamped", networks.swamped, r"not stable in float32: its largest error is 0\.\d"),
        ("counting", networks.residual, "second answer .* differs from its first in"),
        ("tiring", networks.residual, "second answer .* differs from its first in"),
        ("by_threads", networks.residual, "second answer .* differs from its first in"),
        ("by_address", networks.residual, "second answer .* differs from its first in"),
    ],
)
def test_a_module_that_is_no_yardstick_is_refused(
    tmp_path: Path, factory: str, exported: Callable[[], nn.Module], message: str
) -> None:
    np.savez(tmp_path / "images.npz", images=SAMPLE.images, labels=SAMPLE.labels)  # type: ignore[arg-type]
    (tmp_path / "given.onnx").write_bytes(onnx_of_residual(exported))
    options = ["--module", f"tests.networks:{factory}", "--images", str(tmp_path / "images.npz")]
    result = Chain(tmp_path).run("validate", "--onnx", str(tmp_path / "given.onnx"), *options)
    assert result.exit_code == 3, result.output
    assert re.search(message, error_line(result))
    assert not (tmp_path / "exported/given/validation.json").exists()


@pytest.mark.usefixtures("no_first_run")
@pytest.mark.slow
def test_the_variants_that_we_make_pass(bench: Bench) -> None:
    bench.judge(to_fp16(bench.sound, 9), "fp16")
    bench.judge(to_int8(bench.sound, 9, bench.calibration), "int8")


@pytest.mark.usefixtures("no_first_run")
@pytest.mark.slow
def test_the_worst_rows_are_left_as_pictures_and_arrays(bench: Bench) -> None:
    with pytest.raises(
        CheckFailedError,
        match="Replay them: pipeline validate --replay exported/handwriting/failed",
    ):
        bench.judge(bench.broken(swapped_labels))
    failed = bench.trial.paths.failed
    assert len([*failed.glob("worst-*.png")]) == 10
    worst = np.load(bench.trial.paths.worst)
    assert worst["images"].shape == (10, 1, 28, 28)
    assert (worst["reference"].argmax(1) != worst["outputs"].argmax(1)).any()
    assert (np.abs(worst["reference"] - worst["outputs"]).max(1) > worst["allowed"]).all()
