"""Mutations of a model repository: cases, each with its expected result in Triton, and why."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from pipeline.core.files import sha256
from pipeline.repository import config_pbtxt
from pipeline.repository.lint.text import Finding

# The expected result of a case, and the outcomes of a local server that match it:
REFUSED = "refused"  # by Triton or its backend
WRONG = "wrong"  # it loads, but serves something unintended, or is unsafe
NATIVE = "native"  # refused where there is a GPU or the native backend, whose source is cited
SILENT = "answers wrongly"  # it loads, and only a request shows the fault
WAITS = "waits"  # it loads, and a request that is alone gets no answer
LOADS = "loads"  # and is correct, maybe with a warning
UNTRIED = "loads natively"  # and is correct; this project's backend may not run it with numpy 2
ON_A_SERVER = {
    REFUSED: ("refused", "hangs", "ends"),
    WRONG: ("loads",),
    NATIVE: ("not judged",),
    SILENT: ("wrong",),
    WAITS: ("hangs",),
    LOADS: ("loads",),
    UNTRIED: ("loads", "not judged"),
}
CONFIG = """name: "{name}"
backend: "onnxruntime"
max_batch_size: 8
input {
  name: "images"
  data_type: TYPE_UINT8
  format: FORMAT_NCHW
  dims: [ 1, 2, 2 ]
}
output {
  name: "scores"
  data_type: TYPE_FP32
  dims: 4
  label_filename: "labels.txt"
}
instance_group {
  count: 1
  kind: KIND_CPU
}
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
}
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
parameters { key: "classes" value { string_value: "anything at all" } }
model_warmup {
  name: "one"
  batch_size: 1
  inputs {
    key: "images"
    value { data_type: TYPE_UINT8 dims: [ 1, 2, 2 ] input_data_file: "picture" }
  }
}
"""


def graph(
    nodes: Sequence[Any] | None = None,
    batch: str | int = "batch",
    opset: int = 18,
    ir_version: int = 9,
    tensors: Sequence[Any] = (),
    outputs: Sequence[Any] | None = None,
    inputs: Sequence[Any] | None = None,
) -> onnx.ModelProto:
    """Make a model from images (batch, 1, 2, 2) of bytes to their four pixels as scores."""
    usual = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["scores"]),
    ]
    model = helper.make_graph(
        usual if nodes is None else nodes,
        "small",
        inputs or [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 1, 2, 2])],
        outputs or [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 4])],
        tensors,
    )
    return helper.make_model(
        model, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )


def write_model(folder: Path) -> None:
    """Write a small model with the layout of `package`, named after its folder."""
    (folder / "1").mkdir(parents=True)
    (folder / "warmup").mkdir()
    onnx.save(graph(), folder / "1" / "model.onnx")
    (folder / "labels.txt").write_text("a\nb\nc\nd\n")
    (folder / "warmup" / "picture").write_bytes(bytes(4))
    (folder / "config.pbtxt").write_text(CONFIG.replace("{name}", folder.name))


@dataclass(frozen=True)
class Case:
    """A mutation of a repository, with its expected result."""

    name: str
    expected: str
    mutate: Callable[[Path], None]
    rule: str = ""  # the lint rule that reports it; empty if lint reports nothing
    why: str = ""
    source: str = ""  # where Triton's code decides it


def static_fault(case: Case, findings: Sequence[Finding]) -> str:
    """Return how lint's findings on a case differ from the expected ones; empty if they match."""
    reported = {
        level: {f.rule for f in findings if f.level == level} for level in ("error", "warning")
    }
    is_error = case.expected in (REFUSED, WRONG, NATIVE) and case.rule
    if is_error:
        return "" if case.rule in reported["error"] else f"no error of {case.rule} among {reported}"
    if reported["error"]:
        return f"refused by {reported['error']}"
    wanted = {case.rule} if case.rule else set()
    return (
        "" if reported["warning"] == wanted else f"warned of {reported['warning']}, not of {wanted}"
    )


CASES: list[Case] = []
Change = Callable[[Path], None]


def case(expected: str, rule: str = "", source: str = "") -> Callable[[Change], Change]:
    """Add a function to the cases: its name is the case's name, its docstring the reason."""

    def add(change: Change) -> Change:
        why = (change.__doc__ or "").strip()
        CASES.append(Case(change.__name__, expected, change, rule, why, source))
        return change

    return add


def edit(folder: Path, old: str, new: str, file: str = "config.pbtxt") -> None:
    """Change a model's config, as a user with an editor would."""
    text = (folder / file).read_text()
    assert old in text, old
    (folder / file).write_text(text.replace(old, new))


def append(folder: Path, text: str) -> None:
    """Add text to a model's config."""
    (folder / "config.pbtxt").write_text((folder / "config.pbtxt").read_text() + text)


def set_parameter(folder: Path, key: str, value: str) -> None:
    """Add a parameter to a model's config, or change it."""
    path = folder / "config.pbtxt"
    message = config_pbtxt.read(path)
    message.parameters[key].string_value = value
    path.write_text(text_format.MessageToString(message, as_utf8=True))


def save(folder: Path, model: onnx.ModelProto, version: str = "1") -> None:
    """Write a model as a version."""
    (folder / version).mkdir(exist_ok=True)
    onnx.save(model, folder / version / "model.onnx")


def bare(folder: Path, text: str = "", model: onnx.ModelProto | None = None) -> None:
    """Remove everything of the model but its graph, and write another config."""
    for name in ("warmup", "labels.txt", "config.pbtxt"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if text:
        (folder / "config.pbtxt").write_text(text)
    save(folder, model or graph())


MODEL_CONFIG = "core src/model_config_utils.cc"
BACKEND = "onnxruntime_backend src/onnxruntime.cc"
STOI = "backend src/backend_common.cc"
PARSE = "onnxruntime include/onnxruntime/core/common/parse_string.h"
SHRINK = "onnxruntime onnxruntime/core/session/inference_session.cc"


# --- the config's text ---


@case(REFUSED, "config-text", "core src/filesystem/api.cc")
def misspelt_field(folder: Path) -> None:
    """There is no field max_bach_size."""
    edit(folder, "max_batch_size", "max_bach_size")


@case(REFUSED, "config-text")
def misspelt_type(folder: Path) -> None:
    """There is no type TYPE_FLOAT32."""
    edit(folder, "TYPE_FP32", "TYPE_FLOAT32")


@case(REFUSED, "config-text")
def bracket_left_open(folder: Path) -> None:
    """A bracket is never closed."""
    edit(folder, "dims: [ 1, 2, 2 ]\n}", "dims: [ 1, 2, 2 ]\n")


@case(REFUSED, "config-text")
def field_given_twice(folder: Path) -> None:
    """A field that is no list stands there twice."""
    append(folder, "max_batch_size: 4\n")


@case(REFUSED, "config-text")
def json_instead_of_text(folder: Path) -> None:
    """JSON is not what the file holds."""
    (folder / "config.pbtxt").write_text('{"name": "x", "max_batch_size": 8}')


@case(REFUSED, "config-text")
def byte_order_mark(folder: Path) -> None:
    """An editor put a byte order mark before the text."""
    path = folder / "config.pbtxt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


@case(WRONG, "config-text")
def misspelt_field_in_a_profile(folder: Path) -> None:
    """Only who asks for that profile would see it."""
    (folder / "configs").mkdir()
    text = (folder / "config.pbtxt").read_text()
    (folder / "configs" / "fast.pbtxt").write_text(text.replace("dynamic_batching", "batching"))


# --- name, backend, policy ---


@case(REFUSED, "name", "core src/model_repository_manager/model_repository_manager.cc")
def name_of_another(folder: Path) -> None:
    """The name is not the folder's."""
    edit(folder, f'name: "{folder.name}"', 'name: "another"')


@case(REFUSED, "backend", "core src/backend_model.cc")
def misspelt_backend(folder: Path) -> None:
    """There is no backend onnxruntim."""
    edit(folder, '"onnxruntime"', '"onnxruntim"')


@case(REFUSED, "backend", MODEL_CONFIG)
def platform_of_another_backend(folder: Path) -> None:
    """Platform and backend do not belong together."""
    append(folder, 'platform: "pytorch_libtorch"\n')


@case(REFUSED, "version-missing", "core src/model_repository_manager/model_lifecycle.cc")
def version_that_is_not_there(folder: Path) -> None:
    """The policy names version 3 only."""
    append(folder, "version_policy { specific { versions: 3 } }\n")


@case(WRONG, "version-missing", "core src/model_repository_manager/model_lifecycle.cc")
def one_of_two_versions_missing(folder: Path) -> None:
    """Triton loads version 1, and does not serve version 3 that is asked for."""
    append(folder, "version_policy { specific { versions: [ 1, 3 ] } }\n")


@case(REFUSED, "no-version", "core src/model_repository_manager/model_lifecycle.cc")
def latest_of_none(folder: Path) -> None:
    """The newest 0 versions are none."""
    append(folder, "version_policy { latest { } }\n")


@case(REFUSED, "backend", MODEL_CONFIG)
def folder_that_is_no_model(folder: Path) -> None:
    """Triton takes every folder of the repository for a model."""
    bare(folder)
    shutil.rmtree(folder / "1")
    (folder / "notes.txt").write_text("no model")


# --- folders and files ---


@case(REFUSED, "no-version")
def no_version_folder(folder: Path) -> None:
    """The model lies beside the config."""
    shutil.move(folder / "1" / "model.onnx", folder / "model.onnx")
    (folder / "1").rmdir()


@case(REFUSED, "no-version")
def version_with_leading_zero(folder: Path) -> None:
    """Triton ignores version directories with leading zeros."""
    (folder / "1").rename(folder / "01")


@case(REFUSED, "no-version")
def version_called_v1(folder: Path) -> None:
    """Triton ignores version directories that are no numbers."""
    (folder / "1").rename(folder / "v1")


@case(REFUSED, "model-file")
def backup_of_a_version(folder: Path) -> None:
    """Triton takes 2.bak for version 2, and finds no folder 2."""
    shutil.copytree(folder / "1", folder / "2.bak")


@case(REFUSED, "model-file")
def version_called_1a(folder: Path) -> None:
    """Triton takes 1a for version 1, and looks for it in 1."""
    (folder / "1").rename(folder / "1a")


@case(REFUSED, "version-name")
def version_beyond_all_numbers(folder: Path) -> None:
    """Triton's own number overflows, and the server aborts."""
    (folder / ("9" * 20)).mkdir()


@case(REFUSED, "model-file", BACKEND)
def empty_version(folder: Path) -> None:
    """A version without its file."""
    (folder / "1" / "model.onnx").unlink()


@case(REFUSED, "model-file", BACKEND)
def newer_version_empty(folder: Path) -> None:
    """The newest version is an empty folder; an older one would load."""
    (folder / "2").mkdir()


@case(REFUSED, "model-file", BACKEND)
def file_called_otherwise(folder: Path) -> None:
    """The file is not called as the config says."""
    append(folder, 'default_model_filename: "net.onnx"\n')


@case(WRONG, "link")
def version_is_a_link(folder: Path) -> None:
    """What is served can change unseen."""
    elsewhere = folder.parent.parent / f"elsewhere-{folder.name}"
    shutil.move(folder / "1", elsewhere)
    (folder / "1").symlink_to(elsewhere)


@case(REFUSED, "link")
def link_to_nothing(folder: Path) -> None:
    """Triton looks behind every name in a model's folder."""
    (folder / "notes").symlink_to(folder / "gone")


@case(WRONG, "world-writable")
def file_that_anyone_may_write(folder: Path) -> None:
    """Anybody on the machine can change what is served."""
    (folder / "1" / "model.onnx").chmod(0o666)


@case(WRONG, "world-writable")
def folder_that_anyone_may_write(folder: Path) -> None:
    """Anybody on the machine can put a version there."""
    folder.chmod(0o777)


# --- the graph ---


@case(REFUSED, "onnx", BACKEND)
def file_cut_off(folder: Path) -> None:
    """Half of the file is missing."""
    path = folder / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@case(REFUSED, "onnx", BACKEND)
def file_of_no_bytes(folder: Path) -> None:
    """A copy that ran out of disk."""
    (folder / "1" / "model.onnx").write_bytes(b"")


@case(REFUSED, "onnx", BACKEND)
def file_of_another_kind(folder: Path) -> None:
    """An error page saved under the model's name."""
    (folder / "1" / "model.onnx").write_text("<html>404 Not Found</html>")


@case(REFUSED, "onnx", BACKEND)
def node_without_its_input(folder: Path) -> None:
    """A weight is missing."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("Mul", ["flat", "weight"], ["scores"]),
    ]
    save(folder, graph(nodes))


@case(REFUSED, "onnx", BACKEND)
def operator_that_onnx_lacks(folder: Path) -> None:
    """There is no such operator."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flaten", ["floats"], ["scores"]),
    ]
    save(folder, graph(nodes))


@case(REFUSED, "operators", BACKEND)
def operator_of_an_unknown_domain(folder: Path) -> None:
    """The library of the operator is not there."""
    nodes = [helper.make_node("Score", ["images"], ["scores"], domain="com.example")]
    model = graph(nodes)
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    save(folder, model)


@case(REFUSED, "dialect", BACKEND)
def opset_of_the_future(folder: Path) -> None:
    """No ONNX Runtime knows opset 99."""
    save(folder, graph(opset=99))


@case(REFUSED, "dialect", BACKEND)
def ir_of_the_future(folder: Path) -> None:
    """No ONNX Runtime knows IR version 99."""
    save(folder, graph(ir_version=99))


@case(REFUSED)
def operator_for_a_gpu_only(folder: Path) -> None:
    """ONNX Runtime knows the operator, and has no implementation for a CPU."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Squeeze", ["floats", "axis"], ["rows"]),
        helper.make_node("BiasAdd", ["rows", "bias", "rows"], ["sum"], domain="com.microsoft"),
        helper.make_node("Flatten", ["sum"], ["scores"]),
    ]
    weights = {"axis": np.array([1]), "bias": np.ones(2, np.float32)}
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    model = graph(nodes, tensors=tensors)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    save(folder, model)


@case(REFUSED)
def types_that_do_not_meet(folder: Path) -> None:
    """Bytes are added to floats."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["floats", "images"], ["sum"]),
        helper.make_node("Flatten", ["sum"], ["scores"]),
    ]
    save(folder, graph(nodes))


@case(SILENT)
def memory_for_one_image(folder: Path) -> None:
    """A recurrent network's first state is exported for a batch of one."""
    ones = np.ones((1, 4, 4), np.float32)
    weights = {"W": ones, "R": ones, "state": ones[:, :1], "axis": np.array([0])}
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "axis"], ["steps"]),
        helper.make_node("RNN", ["steps", "W", "R", "", "", "state"], ["", "last"], hidden_size=4),
        helper.make_node("Squeeze", ["last", "axis"], ["scores"]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    save(folder, graph(nodes, tensors=tensors))


@case(SILENT)
def rows_of_a_batch_added_up(folder: Path) -> None:
    """The graph gives one row, however many images it got."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("NonZero", ["flat"], ["places"]),
        helper.make_node("Cast", ["places"], ["place"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["place"], ["zero"], keepdims=0),
        helper.make_node("ReduceSum", ["flat", "axis"], ["row"], keepdims=1),
        helper.make_node("Compress", ["row", "first"], ["kept"], axis=0),
        helper.make_node("Add", ["kept", "zero"], ["scores"]),
    ]
    weights = {"axis": np.array([0]), "first": np.array([True])}
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    save(folder, graph(nodes, tensors=tensors))


def external(folder: Path, location: str, size: int) -> None:
    """Make the model with a weight in a separate file."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("Mul", ["flat", "weight"], ["scores"]),
    ]
    weight = numpy_helper.from_array(np.ones(4, np.float32), "weight")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    (folder / "1" / "model.onnx").write_bytes(graph(nodes, tensors=[weight]).SerializeToString())
    if size:
        (folder / "1" / location).write_bytes(np.ones(size // 4, np.float32).tobytes())


@case(REFUSED, "external-data", BACKEND)
def external_data_missing(folder: Path) -> None:
    """The weights' own file was not copied."""
    external(folder, "weights.bin", 0)


@case(REFUSED, "external-data", BACKEND)
def external_data_cut_off(folder: Path) -> None:
    """The weights' own file is too short."""
    external(folder, "weights.bin", 8)


# --- the config against the graph ---


@case(REFUSED, "tensor-name", BACKEND)
def input_called_otherwise(folder: Path) -> None:
    """The graph has no input 'pictures'."""
    edit(folder, '"images"', '"pictures"')


@case(REFUSED, "tensor-name", BACKEND)
def output_called_otherwise(folder: Path) -> None:
    """The graph has no output 'logits'."""
    edit(folder, '"scores"', '"logits"')


@case(REFUSED, "tensor-type", BACKEND)
def input_of_another_type(folder: Path) -> None:
    """The graph takes bytes."""
    edit(folder, "TYPE_UINT8\n  format", "TYPE_FP32\n  format")


@case(REFUSED, "tensor-type", BACKEND)
def output_of_another_type(folder: Path) -> None:
    """The graph gives 32-bit floats."""
    edit(folder, "TYPE_FP32", "TYPE_FP16")


@case(REFUSED, "tensor-dims", BACKEND)
def output_of_another_width(folder: Path) -> None:
    """The graph gives four scores."""
    edit(folder, "dims: 4", "dims: 5")


@case(REFUSED, "tensor-dims", BACKEND)
def output_left_open(folder: Path) -> None:
    """An output must be the graph's own, open dimensions included."""
    edit(folder, "dims: 4", "dims: -1")


@case(REFUSED, "tensor-dims", BACKEND)
def optional_input_in_a_batch(folder: Path) -> None:
    """Optional inputs are for models that take no batches."""
    edit(
        folder,
        "data_type: TYPE_UINT8\n  format",
        "data_type: TYPE_UINT8\n  optional: true\n  format",
    )


@case(REFUSED, "tensor-dims", BACKEND)
def batch_written_into_dims(folder: Path) -> None:
    """The batch does not belong into dims where max_batch_size is set."""
    edit(folder, "dims: 4", "dims: [ -1, 4 ]")


@case(REFUSED, "tensor-dims", BACKEND)
def batch_forgotten(folder: Path) -> None:
    """Without max_batch_size, dims are the whole shape."""
    bare(
        folder,
        'backend: "onnxruntime"\n'
        'input { name: "images" data_type: TYPE_UINT8 dims: [ 1, 2, 2 ] }\n'
        'output { name: "scores" data_type: TYPE_FP32 dims: 4 }\n',
    )


@case(REFUSED, "batch-axis", BACKEND)
def batch_axis_fixed(folder: Path) -> None:
    """The graph takes one image at a time."""
    save(folder, graph(batch=1))


@case(REFUSED, "batch-axis", BACKEND)
def batch_baked_into_a_reshape(folder: Path) -> None:
    """The signature is dynamic, and a reshape inside fixes it to one image."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["floats", "shape"], ["scores"]),
    ]
    save(folder, graph(nodes, tensors=[numpy_helper.from_array(np.array([1, 4]), "shape")]))


@case(REFUSED, "batch-axis", BACKEND)
def batch_asked_of_a_graph_without(folder: Path) -> None:
    """Triton cannot fill in a config with max_batch_size for a graph that takes no batches."""
    bare(folder, 'backend: "onnxruntime"\nmax_batch_size: 8\n', graph(batch=1))


@case(REFUSED, "tensor-count", BACKEND)
def input_not_described(folder: Path) -> None:
    """The graph has two inputs, the config one."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, ["batch", 1, 2, 2])
        for name in ("images", "masks")
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["masks"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "b"], ["floats"]),
        helper.make_node("Flatten", ["floats"], ["scores"]),
    ]
    save(folder, graph(nodes, inputs=inputs))


@case(REFUSED, "tensor-count", BACKEND)
def input_described_twice(folder: Path) -> None:
    """The config has two inputs of one name, the graph one."""
    edit(
        folder,
        "output {",
        'input { name: "images" data_type: TYPE_UINT8 dims: [ 1, 2, 2 ] }\noutput {',
    )


@case(REFUSED, "tensor-type", BACKEND)
def output_that_is_a_sequence(folder: Path) -> None:
    """Triton takes tensors only, and scikit-learn's ZipMap gives a sequence."""
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, ["batch", 4])
    outputs = [helper.make_value_info("scores", helper.make_sequence_type_proto(element))]
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("SequenceConstruct", ["flat"], ["scores"]),
    ]
    save(folder, graph(nodes, outputs=outputs))


# --- the config by itself ---


@case(REFUSED, "max-batch-size", MODEL_CONFIG)
def negative_batch(folder: Path) -> None:
    """A largest batch of -1."""
    edit(folder, "max_batch_size: 8", "max_batch_size: -1")


@case(REFUSED, "preferred-sizes", MODEL_CONFIG)
def preferred_size_too_large(folder: Path) -> None:
    """A preferred size above max_batch_size."""
    edit(folder, "[ 4, 8 ]", "[ 4, 16 ]")


@case(REFUSED, "preferred-sizes", MODEL_CONFIG)
def preferred_size_of_zero(folder: Path) -> None:
    """A preferred size of no images."""
    edit(folder, "[ 4, 8 ]", "[ 0, 8 ]")


@case(REFUSED, "scheduling", MODEL_CONFIG)
def priorities_without_a_default(folder: Path) -> None:
    """Three priority levels, and none is the default."""
    edit(folder, "dynamic_batching {", "dynamic_batching {\n  priority_levels: 3")


@case(REFUSED, "tensor", MODEL_CONFIG)
def dimension_of_zero(folder: Path) -> None:
    """A dimension is at least 1, or -1."""
    edit(folder, "dims: [ 1, 2, 2 ]\n}", "dims: [ 0, 2, 2 ]\n}")


@case(REFUSED, "tensor", MODEL_CONFIG)
def input_without_dims(folder: Path) -> None:
    """An input that is described needs dims."""
    edit(folder, "  format: FORMAT_NCHW\n  dims: [ 1, 2, 2 ]\n", "")


@case(REFUSED, "tensor", MODEL_CONFIG)
def output_without_a_type(folder: Path) -> None:
    """An output that is described needs a type."""
    edit(folder, "  data_type: TYPE_FP32\n", "")


@case(REFUSED, "tensor", MODEL_CONFIG)
def format_of_four_dims(folder: Path) -> None:
    """FORMAT_NCHW is for three dims."""
    edit(folder, "dims: [ 1, 2, 2 ]\n}", "dims: [ 1, 1, 2, 2 ]\n}")


@case(REFUSED, "tensor", MODEL_CONFIG)
def reshape_of_another_size(folder: Path) -> None:
    """Dims of five elements reshaped to four."""
    edit(folder, "dims: 4", "dims: 5\n  reshape { shape: 4 }")


@case(REFUSED, "instance-group", MODEL_CONFIG)
def gpus_for_the_cpu(folder: Path) -> None:
    """KIND_CPU names a GPU."""
    edit(folder, "kind: KIND_CPU", "kind: KIND_CPU\n  gpus: 0")


@case(REFUSED, "instance-group", MODEL_CONFIG)
def profile_without_tensorrt(folder: Path) -> None:
    """A profile is for TensorRT models only."""
    edit(folder, "kind: KIND_CPU", 'kind: KIND_CPU\n  profile: "0"')


@case(REFUSED, "parameters", BACKEND)
def threads_in_words(folder: Path) -> None:
    """The number of threads is a word."""
    edit(folder, 'string_value: "1"', 'string_value: "all"')


@case(REFUSED, "parameters", BACKEND)
def execution_mode_of_two(folder: Path) -> None:
    """There are the execution modes 0 and 1."""
    append(folder, 'parameters { key: "execution_mode" value { string_value: "2" } }\n')


@case(REFUSED, "parameters", BACKEND)
def arena_perhaps(folder: Path) -> None:
    """A switch that is neither on nor off."""
    append(folder, 'parameters { key: "enable_mem_arena" value { string_value: "maybe" } }\n')


@case(REFUSED, "parameters", STOI)
def threads_beyond_32_bits(folder: Path) -> None:
    """std::stoi throws what nobody catches, and NVIDIA's server aborts."""
    set_parameter(folder, "intra_op_thread_count", "2147483648")


@case(REFUSED, "parameters", STOI)
def mode_beyond_all_numbers(folder: Path) -> None:
    """The same of the execution mode, with more digits than Python converts."""
    set_parameter(folder, "execution_mode", "-" + "9" * 5000)


@case(REFUSED, "parameters", STOI)
def threads_in_arabic_digits(folder: Path) -> None:
    """std::stoi reads ASCII digits only."""
    set_parameter(folder, "intra_op_thread_count", "\u0661")


@case(REFUSED, "parameters", STOI)
def mode_in_full_width(folder: Path) -> None:
    """A digit from a Japanese keyboard."""
    set_parameter(folder, "execution_mode", "\uff11")


@case(REFUSED, "parameters", STOI)
def threads_after_a_wide_blank(folder: Path) -> None:
    """std::stoi skips ASCII blanks only."""
    set_parameter(folder, "inter_op_thread_count", "\u00a01")


@case(REFUSED, "parameters", STOI)
def threads_left_empty(folder: Path) -> None:
    """There is no number to read."""
    set_parameter(folder, "inter_op_thread_count", "")


@case(REFUSED, "parameters", STOI)
def threads_with_two_signs(folder: Path) -> None:
    """A number has one sign."""
    set_parameter(folder, "inter_op_thread_count", "+-1")


@case(REFUSED, "parameters", STOI)
def arena_with_a_blank(folder: Path) -> None:
    """A switch is compared as it stands."""
    set_parameter(folder, "enable_mem_arena", "true ")


@case(REFUSED, "parameters", SHRINK)
def shrinkage_switched_on(folder: Path) -> None:
    """The value lists memory arenas: each run fails, and so does the warm-up."""
    set_parameter(folder, "memory.enable_memory_arena_shrinkage", "true")


@case(REFUSED, "parameters", SHRINK)
def shrinkage_of_a_gpu_that_is_not_used(folder: Path) -> None:
    """A session on the CPU has no arena of a GPU."""
    set_parameter(folder, "memory.enable_memory_arena_shrinkage", "gpu:0")


@case(REFUSED, "parameters", SHRINK)
def shrinkage_without_an_arena(folder: Path) -> None:
    """The arena that shall shrink is switched off."""
    set_parameter(folder, "memory.enable_memory_arena_shrinkage", "cpu:0")
    set_parameter(folder, "enable_mem_arena", "0")


@case(REFUSED, "model-file", "backend src/backend_common.cc JoinPath")
def file_by_its_whole_path(folder: Path) -> None:
    """The backend appends the path to that of the version, where there is no such file."""
    append(folder, f'default_model_filename: "{folder / "1" / "model.onnx"}"\n')


@case(REFUSED, "instance-group", "core src/rate_limiter.cc")
def only_a_passive_instance(folder: Path) -> None:
    """No instance runs the requests, and the first one ends the server."""
    edit(folder, "kind: KIND_CPU", "kind: KIND_CPU\n  passive: true")


# --- labels and warm-up ---


@case(REFUSED, "labels", "core src/label_provider.cc")
def labels_missing(folder: Path) -> None:
    """The file of labels is not there."""
    (folder / "labels.txt").unlink()


@case(WRONG, "labels", "core src/label_provider.cc")
def labels_too_few(folder: Path) -> None:
    """Three labels for four classes: the fourth has none."""
    (folder / "labels.txt").write_text("a\nb\nc\n")


@case(WRONG, "labels", "core src/model.cc Init (refused since Triton 26.02)")
def labels_outside_of_the_model(folder: Path) -> None:
    """A newer Triton refuses labels that lie elsewhere."""
    (folder / "labels.txt").rename(folder.parent.parent / f"labels-{folder.name}.txt")
    edit(folder, '"labels.txt"', f'"../../labels-{folder.name}.txt"')


@case(REFUSED, "warmup-batch", BACKEND)
def warmup_batch_too_large(folder: Path) -> None:
    """A warm-up of 16 where batches end at 8."""
    edit(folder, "batch_size: 1\n  inputs", "batch_size: 16\n  inputs")


@case(REFUSED, "warmup", "core src/backend_model_instance.cc")
def warmup_file_missing(folder: Path) -> None:
    """The warm-up's file is not there."""
    (folder / "warmup" / "picture").unlink()


@case(REFUSED, "warmup", "core src/backend_model_instance.cc")
def warmup_file_too_short(folder: Path) -> None:
    """The warm-up's file holds three of four bytes."""
    (folder / "warmup" / "picture").write_bytes(bytes(3))


@case(REFUSED, "warmup", "core src/backend_model_instance.cc")
def warmup_left_open(folder: Path) -> None:
    """A warm-up needs numbers for all its dims."""
    edit(folder, "dims: [ 1, 2, 2 ] input_data", "dims: [ 1, -1, 2 ] input_data")


@case(REFUSED, "warmup", "core src/backend_model_instance.cc")
def warmup_without_data(folder: Path) -> None:
    """A warm-up that does not say what to send."""
    edit(folder, ' input_data_file: "picture"', "")


@case(REFUSED, "warmup", "core src/backend_model_instance.cc")
def warmup_of_another_input(folder: Path) -> None:
    """A warm-up for an input that the model does not have."""
    edit(folder, 'key: "images"', 'key: "pictures"')


# --- digests ---


@case(WRONG, "digest")
def another_digest(folder: Path) -> None:
    """The config states the digest of other weights."""
    append(folder, 'parameters { key: "sha256.1" value { string_value: "%s" } }\n' % ("0" * 64))


@case(WRONG, "digest")
def file_changed_since_its_manifest(folder: Path) -> None:
    """The manifest lists another file than lies there."""
    (folder / "1" / "manifest.json").write_text('{"files": {"model.onnx": "%s"}}' % ("0" * 64))


# --- what only a GPU or the native backend shows ---

GPU = "count: 1\n  kind: KIND_GPU"


def accelerated(folder: Path, name: str, parameters: str) -> None:
    """Request a GPU accelerator in the config."""
    edit(folder, "count: 1\n  kind: KIND_CPU", GPU)
    append(
        folder,
        "optimization { execution_accelerators { gpu_execution_accelerator {\n"
        f'  name: "{name}"\n  {parameters}\n}} }} }}\n',
    )


@case(NATIVE, "accelerator", BACKEND)
def unknown_tensorrt_parameter(folder: Path) -> None:
    """TensorRT's parameters are all known by name."""
    accelerated(folder, "tensorrt", 'parameters { key: "trt_engine_cache" value: "1" }')


@case(NATIVE, "accelerator", BACKEND)
def unknown_tensorrt_precision(folder: Path) -> None:
    """There is no precision FP8."""
    accelerated(folder, "tensorrt", 'parameters { key: "precision_mode" value: "FP8" }')


@case(NATIVE, "accelerator", BACKEND)
def unknown_accelerator(folder: Path) -> None:
    """There is no accelerator tensorrt_rtx."""
    accelerated(folder, "tensorrt_rtx", "")


@case(NATIVE, "accelerator", BACKEND)
def tensorrt_profile_incomplete(folder: Path) -> None:
    """A profile has a smallest, a usual and a largest shape."""
    accelerated(
        folder, "tensorrt", 'parameters { key: "trt_profile_min_shapes" value: "images:1x1x2x2" }'
    )


@case(NATIVE, "accelerator", BACKEND)
def cache_switched_perhaps(folder: Path) -> None:
    """A switch that is neither on nor off."""
    accelerated(
        folder, "tensorrt", 'parameters { key: "trt_engine_cache_enable" value: "perhaps" }'
    )


@case(NATIVE, "accelerator", BACKEND)
def unknown_cuda_option(folder: Path) -> None:
    """CUDA's provider knows use_tf32."""
    accelerated(folder, "cuda", 'parameters { key: "use_tf_32" value: "0" }')


@case(NATIVE, "parameters", BACKEND)
def unknown_cudnn_search(folder: Path) -> None:
    """There are three ways to search."""
    edit(folder, "count: 1\n  kind: KIND_CPU", GPU)
    append(folder, 'parameters { key: "cudnn_conv_algo_search" value { string_value: "3" } }\n')


@case(NATIVE, "parameters", STOI)
def cudnn_search_beyond_32_bits(folder: Path) -> None:
    """The server aborts when it loads the model on a GPU."""
    edit(folder, "count: 1\n  kind: KIND_CPU", GPU)
    set_parameter(folder, "cudnn_conv_algo_search", "99999999999")


@case(NATIVE, "parameters", PARSE)
def gpu_memory_with_a_unit(folder: Path) -> None:
    """ONNX Runtime reads bytes, and the whole text."""
    edit(folder, "count: 1\n  kind: KIND_CPU", GPU)
    set_parameter(folder, "gpu_mem_limit", "8 GB")


@case(NATIVE, "accelerator", STOI)
def workspace_beyond_64_bits(folder: Path) -> None:
    """std::stoull throws what nobody catches."""
    accelerated(
        folder,
        "tensorrt",
        'parameters { key: "max_workspace_size_bytes" value: "18446744073709551616" }',
    )


@case(NATIVE, "accelerator", PARSE)
def workspace_below_zero(folder: Path) -> None:
    """std::stoull accepts it, and ONNX Runtime does not."""
    accelerated(folder, "tensorrt", 'parameters { key: "max_workspace_size_bytes" value: "-1" }')


@case(NATIVE, "accelerator", PARSE)
def workspace_with_a_unit(folder: Path) -> None:
    """The backend reads the number, and ONNX Runtime refuses the whole text."""
    accelerated(folder, "tensorrt", 'parameters { key: "max_workspace_size_bytes" value: "1G" }')


@case(NATIVE, "accelerator", STOI)
def tensorrt_level_beyond_32_bits(folder: Path) -> None:
    """The same of one of TensorRT's other numbers."""
    accelerated(
        folder,
        "tensorrt",
        'parameters { key: "trt_builder_optimization_level" value: "5000000000" }',
    )


@case(NATIVE, "accelerator", PARSE)
def cache_switched_on(folder: Path) -> None:
    """The backend reads "on", and ONNX Runtime, which gets it as well, does not."""
    accelerated(folder, "tensorrt", 'parameters { key: "trt_engine_cache_enable" value: "on" }')


@case(NATIVE, "accelerator", PARSE)
def cuda_option_in_words(folder: Path) -> None:
    """ONNX Runtime reads 0, 1, true and false."""
    accelerated(folder, "cuda", 'parameters { key: "use_tf32" value: "no" }')


# --- what loads and is right ---


@case(LOADS)
def as_packaged(folder: Path) -> None:
    """Nothing is changed."""


@case(LOADS)
def no_config_at_all(folder: Path) -> None:
    """Triton fills in everything."""
    bare(folder)


@case(LOADS)
def no_tensors_in_the_config(folder: Path) -> None:
    """Triton fills in the tensors."""
    bare(folder, 'backend: "onnxruntime"\nmax_batch_size: 16\n')


@case(LOADS)
def platform_instead_of_backend(folder: Path) -> None:
    """The older way to say which backend."""
    edit(folder, 'backend: "onnxruntime"', 'platform: "onnxruntime_onnx"')


@case(LOADS)
def no_batches(folder: Path) -> None:
    """A graph for one image, and a config that says so."""
    bare(
        folder,
        'backend: "onnxruntime"\n'
        'input { name: "images" data_type: TYPE_UINT8 dims: [ 1, 1, 2, 2 ] }\n'
        'output { name: "scores" data_type: TYPE_FP32 dims: [ 1, 4 ] }\n',
        graph(batch=1),
    )


@case(LOADS)
def whole_shape_left_open(folder: Path) -> None:
    """A graph that takes batches, served without Triton's batching."""
    bare(
        folder,
        'backend: "onnxruntime"\n'
        'input { name: "images" data_type: TYPE_UINT8 dims: [ -1, 1, 2, 2 ] }\n'
        'output { name: "scores" data_type: TYPE_FP32 dims: [ -1, 4 ] }\n',
    )


@case(LOADS)
def only_one_of_two_outputs(folder: Path) -> None:
    """A config may leave outputs of the graph out."""
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])
        for name in ("scores", "more")
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["scores"]),
        helper.make_node("Neg", ["scores"], ["more"]),
    ]
    save(folder, graph(nodes, outputs=outputs))


@case(LOADS)
def narrower_input(folder: Path) -> None:
    """The graph takes any height and width, the config one."""
    shape: list[str | int | None] = ["batch", 1, "height", "width"]
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)]
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["floats"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Concat", ["flat"] * 4, ["scores"], axis=1),
    ]
    save(folder, graph(nodes, inputs=inputs))


@case(LOADS)
def flat_images_reshaped(folder: Path) -> None:
    """Clients send four bytes, the graph gets a picture."""
    edit(
        folder,
        "format: FORMAT_NCHW\n  dims: [ 1, 2, 2 ]",
        "dims: 4\n  reshape { shape: [ 1, 2, 2 ] }",
    )
    edit(folder, "dims: [ 1, 2, 2 ] input_data", "dims: 4 input_data")


@case(LOADS)
def one_score_reshaped_to_none(folder: Path) -> None:
    """The graph gives a number for each image, in a shape of the batch alone."""
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch"])]
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["floats", "axes"], ["scores"], keepdims=0),
    ]
    axes = numpy_helper.from_array(np.array([1, 2, 3]), "axes")
    save(folder, graph(nodes, outputs=outputs, tensors=[axes]))
    edit(folder, 'dims: 4\n  label_filename: "labels.txt"', "dims: 1\n  reshape { shape: [ ] }")


@case(LOADS)
def two_versions_both_served(folder: Path) -> None:
    """All versions."""
    shutil.copytree(folder / "1", folder / "2")
    append(folder, "version_policy { all { } }\n")


@case(LOADS)
def the_older_of_two_versions(folder: Path) -> None:
    """The newer one may even be broken."""
    (folder / "2").mkdir()
    (folder / "2" / "model.onnx").write_text("not yet")
    append(folder, "version_policy { specific { versions: 1 } }\n")


@case(LOADS)
def profiles(folder: Path) -> None:
    """Configs for --model-config-name."""
    (folder / "configs").mkdir()
    text = (folder / "config.pbtxt").read_text()
    (folder / "configs" / "cpu.pbtxt").write_text(text)
    (folder / "configs" / "gpu.pbtxt").write_text(text.replace("KIND_CPU", "KIND_GPU"))
    shapes = "".join(
        f'parameters {{ key: "trt_profile_{which}_shapes" value: "images:{size}x1x2x2" }}\n'
        for which, size in (("min", 1), ("opt", 8), ("max", 8))
    )
    (folder / "configs" / "tensorrt-fp16.pbtxt").write_text(
        text.replace("KIND_CPU", "KIND_GPU")
        + "optimization { execution_accelerators { gpu_execution_accelerator {\n"
        'name: "tensorrt"\nparameters { key: "precision_mode" value: "FP16" }\n'
        'parameters { key: "trt_engine_cache_enable" value: "true" }\n'
        'parameters { key: "trt_engine_cache_path" value: "/tmp/engines" }\n'
        f"{shapes}}} }} }}\n"
    )


@case(LOADS)
def warmup_ladder(folder: Path) -> None:
    """A warm-up of each size, with zeros and random bytes as well."""
    for size, data in ((2, "zero_data: true"), (8, "random_data: true")):
        append(
            folder,
            f'model_warmup {{ name: "{size}" batch_size: {size} inputs {{ key: "images"\n'
            f"value {{ data_type: TYPE_UINT8 dims: [ 1, 2, 2 ] {data} }} }} }}\n",
        )


@case(LOADS)
def files_of_others(folder: Path) -> None:
    """Triton minds no notes, pictures or folders that are no versions."""
    (folder / "README.md").write_text("notes")
    (folder / "1" / "manifest.json").write_text('["somebody else\'s"]')
    (folder / "docs").mkdir()


@case(LOADS)
def digest_that_is_right(folder: Path) -> None:
    """What `package` writes."""
    digest = sha256(folder / "1" / "model.onnx")
    append(folder, f'parameters {{ key: "sha256.1" value {{ string_value: "{digest}" }} }}\n')


@case(LOADS)
def weights_in_a_file_of_their_own(folder: Path) -> None:
    """External data that is all there."""
    external(folder, "weights.bin", 16)


@case(LOADS)
def operator_of_onnx_runtime(folder: Path) -> None:
    """com.microsoft's operators come with ONNX Runtime."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("Gelu", ["flat"], ["scores"], domain="com.microsoft"),
    ]
    model = graph(nodes)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    save(folder, model)


@case(LOADS)
def graph_that_computes_its_shape(folder: Path) -> None:
    """Whose width is only known to a runtime."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["floats"], ["size"]),
        helper.make_node("Gather", ["size", "first"], ["count"]),
        helper.make_node("Concat", ["count", "four"], ["shape"], axis=0),
        helper.make_node("Reshape", ["floats", "shape"], ["scores"]),
    ]
    numbers = [
        numpy_helper.from_array(np.array([0]), "first"),
        numpy_helper.from_array(np.array([4]), "four"),
    ]
    save(folder, graph(nodes, tensors=numbers))


@case(LOADS)
def model_that_is_a_folder(folder: Path) -> None:
    """A large model may be a folder that holds model.onnx."""
    path = folder / "1" / "model.onnx"
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    (path / "model.onnx").write_bytes(content)


@case(LOADS)
def comments_and_other_spellings(folder: Path) -> None:
    """Lists, colons and comments are free."""
    edit(folder, "input {", "# what goes in\ninput: [ {")
    edit(folder, "dims: [ 1, 2, 2 ]\n}", "dims: 1 dims: 2, dims: 2;\n} ]")


@case(LOADS)
def comment_in_latin_1(folder: Path) -> None:
    """Triton minds no strange byte in a comment."""
    path = folder / "config.pbtxt"
    path.write_bytes(b"# \xe9t\xe9\r\n" + path.read_bytes().replace(b"\n", b"\r\n"))


@case(LOADS)
def only_the_input_described(folder: Path) -> None:
    """Triton fills in the outputs, and a largest batch of four."""
    bare(
        folder,
        'backend: "onnxruntime"\n'
        'input { name: "images" data_type: TYPE_UINT8 dims: [ 1, 2, 2 ] }\n',
    )


@case(LOADS)
def two_inputs_and_two_outputs(folder: Path) -> None:
    """Of several types, in another order than the graph's."""
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 1, 2, 2]),
        helper.make_tensor_value_info("factor", TensorProto.DOUBLE, ["batch", 1]),
    ]
    outputs = [
        helper.make_tensor_value_info("scores", TensorProto.DOUBLE, ["batch", 4]),
        helper.make_tensor_value_info("best", TensorProto.INT64, ["batch", 1]),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.DOUBLE),
        helper.make_node("Flatten", ["numbers"], ["flat"]),
        helper.make_node("Mul", ["flat", "factor"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=1),
    ]
    bare(
        folder,
        'backend: "onnxruntime"\nmax_batch_size: 4\ninput [\n'
        '  { name: "factor" data_type: TYPE_FP64 dims: 1 },\n'
        '  { name: "images" data_type: TYPE_UINT8 dims: [ 1, 2, 2 ] }\n]\noutput [\n'
        '  { name: "best" data_type: TYPE_INT64 dims: 1 },\n'
        '  { name: "scores" data_type: TYPE_FP64 dims: 4 }\n]\n',
        graph(nodes, inputs=inputs, outputs=outputs),
    )


@case(LOADS)
def scalar_output(folder: Path) -> None:
    """The native backend serves a scalar as dims of 1."""
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [])]
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["floats"], ["scores"], keepdims=0),
    ]
    bare(
        folder,
        'backend: "onnxruntime"\n'
        'input { name: "images" data_type: TYPE_UINT8 dims: [ -1, 1, 2, 2 ] }\n'
        'output { name: "scores" data_type: TYPE_FP32 dims: 1 }\n',
        graph(nodes, outputs=outputs),
    )


@case(LOADS)
def number_between_blanks(folder: Path) -> None:
    """std::stoi skips blanks, takes a plus sign, and minds no blanks after the number."""
    set_parameter(folder, "intra_op_thread_count", " \t+01\n")


@case(LOADS)
def switches_in_capitals(folder: Path) -> None:
    """Switches are read in any case."""
    set_parameter(folder, "enable_mem_arena", "ON")
    set_parameter(folder, "enable_mem_pattern", "False")


@case(LOADS)
def arena_that_shrinks(folder: Path) -> None:
    """As ONNX Runtime's documentation writes it."""
    set_parameter(folder, "memory.enable_memory_arena_shrinkage", "cpu:0")


@case(LOADS)
def file_with_a_slash(folder: Path) -> None:
    """The backend appends it to the version's path, where the file is."""
    append(folder, 'default_model_filename: "/model.onnx"\n')


@case(LOADS)
def opset_of_newer_releases(folder: Path) -> None:
    """A note says which releases load it."""
    save(folder, graph(opset=23, ir_version=11))


@case(UNTRIED, source=BACKEND)
def brain_floats(folder: Path) -> None:
    """The native backend has bfloat16 since 26.03, as a note says."""
    tensors = [
        [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["batch", 2])]
        for name in ("x", "y")
    ]
    bare(
        folder,
        'backend: "onnxruntime"\nmax_batch_size: 4\n'
        'input { name: "x" data_type: TYPE_BF16 dims: 2 }\n'
        'output { name: "y" data_type: TYPE_BF16 dims: 2 }\n',
        graph([helper.make_node("Identity", ["x"], ["y"])], inputs=tensors[0], outputs=tensors[1]),
    )


@case(UNTRIED, source=BACKEND)
def strings(folder: Path) -> None:
    """The native backend takes strings."""
    bare(
        folder,
        'backend: "onnxruntime"\nmax_batch_size: 4\n'
        'input { name: "words" data_type: TYPE_STRING dims: 1 }\n'
        'output { name: "same" data_type: TYPE_STRING dims: 1 }\n',
        graph(
            [helper.make_node("Identity", ["words"], ["same"])],
            inputs=[helper.make_tensor_value_info("words", TensorProto.STRING, ["batch", 1])],
            outputs=[helper.make_tensor_value_info("same", TensorProto.STRING, ["batch", 1])],
        ),
    )


# --- what loads, with a warning ---


@case(LOADS, "labels")
def labels_too_many(folder: Path) -> None:
    """Five labels for four classes."""
    (folder / "labels.txt").write_text("a\nb\nc\nd\ne\n")


@case(LOADS, "threads")
def threads_beyond_the_cores(folder: Path) -> None:
    """More threads than cores only wait for each other."""
    edit(folder, 'string_value: "1"', f'string_value: "{(os.cpu_count() or 1) + 1}"')


@case(LOADS, "parameters")
def parameter_nearly_known(folder: Path) -> None:
    """The backend ignores what it does not know."""
    edit(folder, "intra_op_thread_count", "intra_op_threads_count")


@case(LOADS, "parameters", STOI)
def threads_with_a_unit(folder: Path) -> None:
    """std::stoi reads the number before the text."""
    set_parameter(folder, "intra_op_thread_count", "1 thread")


@case(LOADS, "parameters", STOI)
def threads_of_one_and_a_half(folder: Path) -> None:
    """std::stoi reads 1."""
    set_parameter(folder, "intra_op_thread_count", "1.5")


@case(LOADS, "parameters", STOI)
def threads_in_hexadecimal(folder: Path) -> None:
    """std::stoi reads the 0 before the x."""
    set_parameter(folder, "inter_op_thread_count", "0x2")


@case(LOADS, "parameters", STOI)
def mode_with_a_letter(folder: Path) -> None:
    """std::stoi reads 1."""
    set_parameter(folder, "execution_mode", "1x")


@case(LOADS, "parameters", BACKEND)
def threads_below_zero(folder: Path) -> None:
    """The backend leaves ONNX Runtime's default."""
    set_parameter(folder, "inter_op_thread_count", "-2")


@case(LOADS, "parameters", BACKEND)
def allocator_in_words(folder: Path) -> None:
    """ONNX Runtime compares with "1"."""
    set_parameter(folder, "session.use_device_allocator_for_initializers", "true")


@case(LOADS, "parameters", BACKEND)
def option_of_onnx_runtime(folder: Path) -> None:
    """The backend passes only two of them on."""
    set_parameter(folder, "session.disable_prepacking", "1")


@case(LOADS, "instance-group", "core src/rate_limiter.cc")
def passive_instance_beside_another(folder: Path) -> None:
    """The other one answers."""
    append(folder, "instance_group { count: 1 kind: KIND_CPU passive: true }\n")


@case(WAITS, "queue-delay", "core src/dynamic_batch_scheduler.cc")
def delay_of_an_hour(folder: Path) -> None:
    """A request waits for others to fill its batch."""
    edit(
        folder,
        "dynamic_batching {",
        "dynamic_batching {\n  max_queue_delay_microseconds: 3600000000",
    )


@case(LOADS, "accelerator")
def cudnn_search_in_the_wrong_place(folder: Path) -> None:
    """The backend overwrites it with its default."""
    append(
        folder,
        'optimization { execution_accelerators { gpu_execution_accelerator { name: "cuda"\n'
        'parameters { key: "cudnn_conv_algo_search" value: "HEURISTIC" } } } }\n',
    )


@case(LOADS, "warmup")
def warmup_without_a_size(folder: Path) -> None:
    """Triton skips a warm-up of no images."""
    edit(folder, "  batch_size: 1\n", "")


@case(LOADS, "version-name")
def another_version_with_leading_zero(folder: Path) -> None:
    """Triton ignores it, which somebody may not have meant."""
    shutil.copytree(folder / "1", folder / "02")


@case(LOADS, "version-name")
def backup_beside_a_chosen_version(folder: Path) -> None:
    """Triton takes 2.bak for version 2, which nobody asked for."""
    shutil.copytree(folder / "1", folder / "2.bak")
    append(folder, "version_policy { specific { versions: 1 } }\n")


@case(LOADS, "dialect")
def opset_of_long_ago(folder: Path) -> None:
    """ONNX Runtime has some operators of opset 6, not all."""
    save(folder, graph(opset=6))


@case(LOADS, "digest")
def digest_of_a_version_that_went(folder: Path) -> None:
    """A version that was pruned."""
    append(folder, 'parameters { key: "sha256.7" value { string_value: "%s" } }\n' % ("0" * 64))


def build(repository: Path, cases: Sequence[Case] = CASES) -> None:
    """Write a repository with a model for each case, named after the case."""
    for case in cases:
        write_model(repository / case.name)
        case.mutate(repository / case.name)
