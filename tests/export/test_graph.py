import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.core.errors import CheckFailedError, CorruptError, PipelineError
from pipeline.core.signature import TensorSpec
from pipeline.export import graph
from pipeline.export.policy import check_policy
from pipeline.export.runtime import onnx_predictor
from tests.conftest import small


def test_a_graph_that_keeps_the_policy_passes_and_has_a_signature() -> None:
    check_policy(small(), "it")
    assert graph.read_signature(small(), "it").images == TensorSpec("x", "uint8", (4,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 2}, "is 2, not a dynamic axis 'batch'. Export it with dynamic_shapes="),
        ({"batch": None}, "is unnamed, not a dynamic axis 'batch'"),
        ({"batch": "s77"}, "is s77, not a dynamic axis 'batch'"),
        ({"outputs": ["y", "z"]}, "2 outputs"),
    ],
)
def test_another_signature_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckFailedError, match=said):
        graph.read_signature(small(**changes), "it")


def test_any_name_of_the_batch_is_accepted_where_none_is_demanded() -> None:
    assert graph.read_signature(small("s77"), "it", batch=None).images == TensorSpec(
        "x", "uint8", (4,)
    )


@pytest.mark.parametrize(("batch", "said"), [(2, "x is 2, not"), (None, "x is unnamed")])
def test_a_batch_without_a_name_is_refused_with_what_to_do(batch: int | None, said: str) -> None:
    with pytest.raises(CheckFailedError, match=said) as caught:
        graph.read_signature(small(batch), "it", batch=None)
    assert 'dynamic_shapes={"x": {0: "batch"}}' in str(caught.value)


def test_an_output_whose_batch_is_called_otherwise_is_refused() -> None:
    model = small("N")
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "M"
    with pytest.raises(CheckFailedError, match="0 of y is M, not a dynamic axis 'N'"):
        graph.read_signature(model, "it", batch=None)


def test_an_open_dimension_besides_the_batch_is_refused() -> None:
    model = small()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "wide"
    with pytest.raises(CheckFailedError, match="dynamic dimension other than the batch"):
        graph.read_signature(model, "it")


@pytest.mark.parametrize("content", [b"this is no graph", b"\x08"])
def test_bytes_that_are_no_graph_are_corrupt(content: bytes) -> None:
    with pytest.raises(CorruptError, match="not a valid ONNX file"):
        graph.parse(content, "it")


def test_names_that_are_no_text_are_corrupt() -> None:
    content = small().SerializeToString().replace(b"small", b"sm\xffll")
    with pytest.raises(CorruptError, match="a name that is not valid UTF-8"):
        graph.parse(content, "it")


def test_a_graph_beyond_the_size_cap_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MAX_BYTES", 10)
    with pytest.raises(CheckFailedError, match="larger than 10 bytes"):
        graph.parse(bytes(11), "it")


@pytest.mark.parametrize("what", ["nodes", "names"])
def test_a_graph_of_too_many_parts_is_not_looked_into(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "MAX_PARTS", 100)
    graph.parse(small().SerializeToString(), "it")
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    model = small(nodes=[cast] * (100 if what == "nodes" else 1))
    model.graph.node[0].input.extend(["x"] * (100 if what == "names" else 0))
    with pytest.raises(CheckFailedError, match="more than 100 parts"):
        graph.parse(model.SerializeToString(), "it")


def test_a_scrubbed_graph_imports_only_the_domains_that_it_uses() -> None:
    model = small()
    model.opset_import.add(domain="com.example", version=1)
    scrubbed = graph.parse(graph.scrub(model, 9, {}), "it")
    assert [(entry.domain, entry.version) for entry in scrubbed.opset_import] == [("", 18)]


def test_a_scrubbed_graph_shows_no_source_anywhere_and_keeps_our_metadata() -> None:
    model = small()
    model.producer_name = model.graph.name = "/srv/me/model.py"
    for part in graph.message_parts(model):
        if "doc_string" in part.DESCRIPTOR.fields_by_name:
            part.doc_string = 'File "/srv/me/model.py"'
        if "metadata_props" in part.DESCRIPTOR.fields_by_name:
            part.metadata_props.add(key="stack", value="/srv/me/model.py")
    content = graph.scrub(model, 9, {"classes": "10"})
    assert b"model.py" not in content
    scrubbed = graph.parse(content, "it")
    check_policy(scrubbed, "it")
    assert [entry.key for entry in scrubbed.metadata_props] == ["classes"]


PATH = "/home" + "/alice/secret-project/train.py:33"


def showing_paths() -> onnx.ModelProto:
    """A sound graph that shows a source path in every name that it has."""
    weights = numpy_helper.from_array(np.arange(4, dtype=np.float32), f"{PATH}/w")
    nodes = [
        helper.make_node("Cast", ["x"], [f"{PATH}/f"], f"{PATH}/Cast", to=TensorProto.FLOAT),
        helper.make_node("Add", [f"{PATH}/f", f"{PATH}/w"], [f"{PATH}/a"], f"{PATH}/Add"),
        helper.make_node("Mul", [f"{PATH}/a", f"{PATH}/w"], ["y"], "renamed_0"),
    ]
    model = small(nodes=nodes, tensors=[weights])
    value = helper.make_tensor_value_info(f"{PATH}/a", TensorProto.FLOAT, ["batch", 4])
    value.type.denotation = value.type.tensor_type.shape.dim[0].denotation = PATH
    model.graph.value_info.append(value)
    for value in (model.graph.input[0], model.graph.output[0], model.graph.value_info[0]):
        value.type.tensor_type.shape.dim[0].dim_param = f"{PATH}/n"
    annotation = model.graph.quantization_annotation.add(tensor_name=f"{PATH}/a")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=f"{PATH}/w")
    model.producer_name = model.producer_version = model.domain = model.graph.name = PATH
    return model


def answers(content: bytes) -> np.ndarray:
    return onnx_predictor(content)(np.arange(8, dtype=np.uint8).reshape(2, 4))


def test_names_that_show_a_source_path_are_rewritten_the_same_everywhere() -> None:
    model = showing_paths()
    before = answers(model.SerializeToString())
    content = graph.scrub(model, 9, {})
    assert b"alice" not in content
    scrubbed = graph.parse(content, "it")
    check_policy(scrubbed, "it")
    assert np.array_equal(answers(content), before)
    annotation = scrubbed.graph.quantization_annotation[0]
    assert annotation.tensor_name == scrubbed.graph.node[1].output[0]
    assert annotation.quant_parameter_tensor_names[0].value == scrubbed.graph.initializer[0].name
    assert scrubbed.graph.node[2].name == "renamed_0"  # no other is called so
    assert len({node.name for node in scrubbed.graph.node}) == 3
    assert graph.read_signature(scrubbed, "it", batch=None).images == TensorSpec("x", "uint8", (4,))
    assert graph.scrub(showing_paths(), 9, {}) == content


def test_weights_that_a_client_may_override_are_constants_once_they_are_scrubbed() -> None:
    model = showing_paths()
    model.graph.input.append(helper.make_tensor_value_info(f"{PATH}/w", TensorProto.FLOAT, [4]))
    content = graph.scrub(model, 9, {})
    check_policy(graph.parse(content, "it"), "it")
    assert content == graph.scrub(showing_paths(), 9, {})


def outside(tmp_path: Path, **entries: object) -> Path:
    """A model whose weights, four floats, lie in `data`, or where `entries` say."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "data", **entries}.items():
        weight.external_data.add(key=key, value=str(value))
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["f", "w"], ["y"]),
    ]
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "f.onnx"
    path.write_bytes(small(nodes=nodes, tensors=[weight]).SerializeToString())
    for name in (folder / "data", tmp_path / "secret"):
        name.write_bytes(bytes(range(32)))
    return path


def test_data_beside_the_model_is_taken_in(tmp_path: Path) -> None:
    model = graph.read_inlined(outside(tmp_path, offset=8, length=16))
    (weight,) = model.graph.initializer
    assert weight.raw_data == bytes(range(8, 24))
    assert not weight.external_data
    check_policy(model, "it")


def symbolic(data: Path, secret: Path) -> None:
    data.unlink()
    data.symlink_to(secret)


def hard(data: Path, secret: Path) -> None:
    data.unlink()
    os.link(secret, data)


def pipe(data: Path, secret: Path) -> None:
    data.unlink()
    os.mkfifo(data)


def gone(data: Path, secret: Path) -> None:
    data.unlink()


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (symbolic, "the data of w in 'data' cannot be read: .*symbolic link"),
        (hard, "the data of w in 'data' cannot be read: .*hard links"),
        (pipe, "cannot be read: .*not regular file"),
        (gone, "cannot be read: .*No such file"),
    ],
)
def test_data_in_anything_but_a_plain_file_is_refused(
    tmp_path: Path, put: Callable[[Path, Path], None], said: str
) -> None:
    path = outside(tmp_path, length=16)
    put(path.with_name("data"), tmp_path / "secret")
    with pytest.raises(CheckFailedError, match=said):
        graph.read_inlined(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b"])
def test_data_whose_name_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckFailedError, match="the data of w in .* (is not in|cannot be read)"):
        graph.read_inlined(outside(tmp_path, location=name, length=16))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"offset": 20, "length": 16}, "cannot be read: .*exceeds"),
        ({"offset": 8, "length": 12}, "has 12 bytes, not 16"),
        ({"offset": 8}, "has 24 bytes, not 16"),
        ({"offset": -8, "length": 16}, "cannot be read: .*non-negative"),
        ({"length": "9" * 30}, "cannot be read: .*exceeds"),
    ],
)
def test_a_span_that_does_not_fit_is_refused(
    tmp_path: Path, entries: dict[str, object], said: str
) -> None:
    with pytest.raises(CheckFailedError, match=said):
        graph.read_inlined(outside(tmp_path, **entries))


def test_a_model_and_its_data_beyond_the_size_cap_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = outside(tmp_path, length=16)
    monkeypatch.setattr(graph, "MAX_BYTES", path.stat().st_size + 15)
    with pytest.raises(CheckFailedError, match="and its data are larger than"):
        graph.read_inlined(path)


@pytest.mark.parametrize("name", ["nothing", "."])
def test_a_model_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PipelineError, match="cannot read"):
        graph.read_inlined(tmp_path / name)


def test_a_model_in_one_file_is_read_as_it_is(tmp_path: Path) -> None:
    onnx.save(small(), tmp_path / "f.onnx")
    assert graph.read_inlined(tmp_path / "f.onnx") == small()
