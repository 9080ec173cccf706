import math
import re
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from pipeline.core.errors import CheckFailedError
from pipeline.export import graph, sizes
from pipeline.export.graph import SOURCE_PATH
from pipeline.export.policy import MAX_NODES, check_policy
from pipeline.export.sizes import ELEMENT, LITTLE_WORK, MAX_VALUE, MAX_WORK, multiply_adds
from tests.conftest import CAST, Chain, small


def refusal(model: onnx.ModelProto) -> str:
    with pytest.raises(CheckFailedError, match="breaks the graph policy") as caught:
        check_policy(model, "it")
    return str(caught.value)


def test_the_policy_names_everything_that_breaks_it() -> None:
    foreign = small(nodes=[helper.make_node("Mystery", ["x"], ["y"], domain="com.example")])
    foreign.opset_import.add(domain="com.example", version=1)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    weight.data_location = TensorProto.EXTERNAL
    foreign.graph.initializer.append(weight)
    foreign.graph.node.append(helper.make_node("If", ["c"], ["z"]))
    foreign.graph.node.append(helper.make_node("BatchNormalization", ["c"], ["v"], training_mode=1))
    foreign.graph.node.append(helper.make_node("Dropout", ["c"], ["u"]))
    foreign.graph.node[0].metadata_props.add(key="stack", value="File model.py")
    foreign.functions.add(name="f", domain="com.example")
    said = refusal(foreign)
    for words in (
        "random operators: Dropout",
        "normalization in training mode",
        "local functions: f",
    ):
        assert words in said
    for words in ("domain com.example", "control flow: If", "external data: w", "source paths"):
        assert words in said


def test_a_graph_that_the_checker_refuses_is_refused() -> None:
    with pytest.raises(CheckFailedError, match="not a valid ONNX model"):
        check_policy(small(nodes=[helper.make_node("Cast", ["nowhere"], ["y"], to=1)]), "it")


def test_what_we_export_keeps_the_policy(made: Chain) -> None:
    check_policy(onnx.load_model(made.paths.onnx), "it")


@pytest.mark.parametrize(
    ("imports", "said"),
    [
        ([("", 18), ("", 7)], "the standard domain imported as 18 and 7"),
        ([("", 18), ("ai.onnx", 17)], "the standard domain imported as 18 and 17"),
        ([("ai.onnx", 18), ("", 18)], "the standard domain imported as 18 and 18"),
        ([("", 18), ("com.example", 1), ("com.example", 2)], "com.example imported as 1 and 2"),
        ([], "no import of the standard domain"),
        ([("com.example", 1)], "no import of the standard domain"),
        ([("", 0)], "no import of the standard domain between opset 1 and"),
        ([("", -1)], "no import of the standard domain between opset 1 and"),
        ([("", 99)], "no import of the standard domain between opset 1 and"),
        ([("", 2**40)], "no import of the standard domain between opset 1 and"),
        (
            [("", 18), ("com.example", 1)],
            "imports that no node uses, com.example: '--scrub' leaves them out",
        ),
    ],
)
def test_imports_that_leave_the_dialect_open_are_refused(
    imports: list[tuple[str, int]], said: str
) -> None:
    model = small()
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*entry) for entry in imports)
    assert said in refusal(model)


def test_the_other_name_of_the_standard_domain_passes() -> None:
    model = small()
    model.opset_import[0].domain = "ai.onnx"
    check_policy(model, "it")
    assert graph.read_signature(model, "it").opset == 18


def overriding(is_sparse: bool = False) -> onnx.ModelProto:
    """Weights that are an input as well: since IR 4 a client may give others."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["f", "w"], ["y"]),
    ]
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w")
    model = small(nodes=nodes, tensors=[] if is_sparse else [weight])
    if is_sparse:
        sparse_weight = helper.make_sparse_tensor(weight, numbers("i", 0, 1, 2, 3), [4])
        model.graph.sparse_initializer.append(sparse_weight)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    return model


@pytest.mark.parametrize("is_sparse", [False, True])
def test_weights_that_a_client_may_override_are_refused(is_sparse: bool) -> None:
    said = refusal(overriding(is_sparse))
    assert "weights that a client may override, w: '--scrub' leaves them out" in said


def test_weights_among_the_inputs_pass_where_the_format_demands_it() -> None:
    model = overriding()
    model.ir_version = 3
    check_policy(model, "it")
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 1
    assert "w is declared with another shape than it has: [4]" in refusal(model)


def test_an_attribute_that_refers_to_a_function_is_refused_where_there_is_none() -> None:
    node = helper.make_node("Softmax", ["y"], ["z"], axis=1)
    node.attribute[0].ref_attr_name = "axis"
    assert "attributes that refer to those of a function" in refusal(small(nodes=[CAST, node]))


def within(node: NodeProto) -> NodeProto:
    """`node` in a branch in a branch: three graphs deep."""
    for level in ("inner", "outer"):
        body = helper.make_graph([node], level, [], [helper.make_empty_tensor_value_info("z")])
        node = helper.make_node("If", ["c"], [level], then_branch=body, else_branch=body)
    return node


def outside(location: str, name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


@pytest.mark.parametrize("location", ["data", "../secret", "/etc/passwd", "a/b"])
def test_external_data_is_refused_wherever_it_lies(location: str) -> None:
    said = refusal(small(nodes=[CAST], tensors=[outside(location)]))
    assert f"external data: w in '{location}'" in said


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_external_data_is_refused_where_the_file_is_a_link(tmp_path: Path, link: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    if link == "symbolic":
        (tmp_path / "data").symlink_to(tmp_path / "secret")
    else:
        (tmp_path / "data").hardlink_to(tmp_path / "secret")
    path = tmp_path / "f.onnx"
    path.write_bytes(small(tensors=[outside("data")]).SerializeToString())
    said = refusal(graph.parse(path.read_bytes(), "it"))
    assert "external data: w in 'data'" in said


def test_a_location_without_the_mark_of_external_data_is_refused() -> None:
    tensor = outside("data")
    tensor.data_location = TensorProto.DEFAULT
    tensor.raw_data = bytes(16)
    assert "external data: w in 'data'" in refusal(small(tensors=[tensor]))


def sparse(name: str = "w") -> onnx.SparseTensorProto:
    indices = helper.make_tensor("i", TensorProto.INT64, [4], [0, 1, 2, 3])
    return helper.make_sparse_tensor(outside("data", name), indices, [8])


@pytest.mark.parametrize(
    "attributes",
    [
        {"value": outside("data")},
        {"tensors": [outside("data")]},
        {"sparse_value": sparse()},
        {"sparse_values": [sparse()]},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_external_data_of_an_attribute_is_refused(
    attributes: dict[str, Any], is_nested: bool
) -> None:
    node = helper.make_node("Constant", [], ["z"], **attributes)
    said = refusal(small(nodes=[CAST, within(node) if is_nested else node]))
    assert "external data: w in 'data'" in said


def test_external_data_of_a_sparse_initializer_is_refused() -> None:
    model = small()
    model.graph.sparse_initializer.append(sparse("s"))
    assert "external data: s in 'data'" in refusal(model)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft"), "domain com.microsoft"),
        (helper.make_node("RandomNormal", [], ["z"], shape=[2]), "random operators: RandomNormal"),
        (
            helper.make_node("Dropout", ["x"], ["z"]),
            "operators: Dropout; call .eval\\(\\) before",
        ),
        (helper.make_node("SequenceMap", ["x"], ["z"]), r"control flow: (If, )?SequenceMap"),
        (helper.make_node("Scan", ["x"], ["z"]), r"control flow: (If, )?Scan"),
        (
            helper.make_node("BatchNormalization", ["x"] * 5, ["z"], training_mode=1),
            "a batch normalization in training mode",
        ),
    ],
    ids=lambda value: value.op_type if isinstance(value, NodeProto) else "",
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_forbidden_operator_is_refused(node: NodeProto, said: str, is_nested: bool) -> None:
    nodes = [CAST, within(node) if is_nested else node]
    assert re.search(said, refusal(small(nodes=nodes)))


def test_graphs_for_training_are_refused() -> None:
    model = small()
    model.training_info.add()
    assert "graphs for training" in refusal(model)


def numbers(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def scalars(*values: int) -> list[TensorProto]:
    names = ("start", "limit", "step")
    return [
        numpy_helper.from_array(np.array(value, np.int64), name)
        for name, value in zip(names, values, strict=True)
    ]


HUGE = 1 << 33
ONE = helper.make_tensor("one", TensorProto.FLOAT, [1, 1], [1.0])
# Each asks for GiB in a few hundred bytes: nodes, initializers, and the value that is too large.
BOMBS: dict[str, tuple[list[NodeProto], list[TensorProto]]] = {
    "ConstantOfShape": (
        [helper.make_node("ConstantOfShape", ["shape"], ["z"])],
        [numbers("shape", HUGE)],
    ),
    "Expand": ([helper.make_node("Expand", ["one", "n"], ["z"])], [ONE, numbers("n", HUGE, 4)]),
    "Tile": ([helper.make_node("Tile", ["one", "n"], ["z"])], [ONE, numbers("n", HUGE, 4)]),
    "Range": (
        [helper.make_node("Range", ["start", "limit", "step"], ["z"])],
        scalars(0, HUGE, 1),
    ),
    "Pad": (
        [helper.make_node("Pad", ["one", "pads"], ["z"])],
        [ONE, numbers("pads", 0, HUGE, 0, 0)],
    ),
    "Concat": (
        [
            helper.make_node("Concat", ["n" if i == 0 else f"v{i}"] * 2, [f"v{i + 1}"], axis=0)
            for i in range(35)
        ],
        [numbers("n", 1)],
    ),
    "Mul": (  # the outer product of two long vectors
        [
            helper.make_node("ConstantOfShape", ["tall"], ["a"]),
            helper.make_node("ConstantOfShape", ["wide"], ["b"]),
            helper.make_node("Mul", ["a", "b"], ["z"]),
        ],
        [numbers("tall", 1 << 20, 1), numbers("wide", 1, 1 << 20)],
    ),
    "Shape": (  # a shape made of shapes: 4 million times the batch by 4, by 4
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Mul", ["s", "n"], ["shape"]),
            helper.make_node("ConstantOfShape", ["shape"], ["z"]),
        ],
        [numbers("n", 1 << 22, 1 << 4)],
    ),
}
BOMBS["Tiles"] = (
    [
        helper.make_node("Tile", ["one" if i == 0 else f"v{i}", "n"], [f"v{i + 1}"])
        for i in range(35)
    ],
    [ONE, numbers("n", 1, 2)],
)


def bomb(name: str) -> onnx.ModelProto:
    nodes, tensors = BOMBS[name]
    return small(nodes=[CAST, *nodes], tensors=tensors)


@pytest.mark.parametrize("name", BOMBS)
def test_a_value_that_is_too_large_is_refused(name: str) -> None:
    said = refusal(bomb(name))
    assert f"bytes, {MAX_VALUE} are allowed" in said
    assert len(bomb(name).SerializeToString()) < 2048


def test_no_bomb_makes_the_policy_take_memory(tmp_path: Path) -> None:
    for name in BOMBS:
        (tmp_path / name).write_bytes(bomb(name).SerializeToString())
    code = (
        "import pathlib, resource, sys, pipeline.export.graph as g, pipeline.export.policy as p\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: p.check_policy(g.parse(path.read_bytes(), path.name), path.name)\n"
        "    except p.CheckFailedError: continue\n"
        "    sys.exit(f'{path} passed')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50 * 1024  # KiB on Linux


def test_values_that_grow_faster_than_the_number_of_images_are_refused() -> None:
    """For 2 images they are small: 2,000 numbers each, multiplied with each other."""
    nodes = [
        CAST,
        helper.make_node("Tile", ["y", "n"], ["long"]),
        helper.make_node("Transpose", ["long"], ["wide"]),
        helper.make_node("MatMul", ["long", "wide"], ["z"]),
    ]
    said = refusal(small(nodes=nodes, tensors=[numbers("n", 1000, 1)]))
    largest = MAX_VALUE // 2 * 256
    assert f"z (MatMul) takes {4 * 256_000**2} bytes, {largest} are allowed" in said


def test_work_that_grows_faster_than_the_number_of_images_is_refused() -> None:
    nodes = [
        CAST,
        helper.make_node("Tile", ["y", "n"], ["long"]),
        helper.make_node("Transpose", ["long"], ["wide"]),
        helper.make_node("MatMul", ["long", "wide"], ["a"]),
        *chain_of("MatMul", 14),
    ]
    said = refusal(small(nodes=nodes, tensors=[numbers("n", 20, 1)]))
    assert "256 images take 1,897,190,244,384 " in said
    assert f"multiply-adds, {128 * LITTLE_WORK:,} are allowed; MatMul a1 has the most" in said


def test_a_graph_of_too_many_nodes_is_refused_at_once() -> None:
    nodes = [helper.make_node("Identity", ["y"], [f"v{i}"]) for i in range(MAX_NODES)]
    said = refusal(small(nodes=[CAST, *nodes]))
    assert f"{MAX_NODES + 1:,} nodes, {MAX_NODES:,} are allowed" in said


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("StringConcat", ["s", "s"], ["z"]),
        helper.make_node("Expand", ["s", "n"], ["z"]),
        helper.make_node("Cast", ["y"], ["z"], to=TensorProto.STRING),
    ],
    ids=lambda node: node.op_type,
)
def test_text_that_is_computed_is_refused_since_its_length_cannot_be_told(node: NodeProto) -> None:
    text = numpy_helper.from_array(np.array(["a" * 1000], object), "s")
    said = refusal(small(nodes=[CAST, node], tensors=[text, numbers("n", 10_000_000)]))
    assert f"the size of z ({node.op_type}) is unknown" in said


def test_shapes_that_take_too_many_nodes_to_compute_are_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = [
        helper.make_node("Add", ["n" if i == 0 else f"n{i}", "n"], [f"n{i + 1}"]) for i in range(9)
    ]
    nodes = [CAST, *steps, helper.make_node("ConstantOfShape", ["n9"], ["z"])]
    model = small(nodes=nodes, tensors=[numbers("n", 3)])
    check_policy(model, "it")
    monkeypatch.setattr(sizes, "FOLDS", 8)
    assert "the size of z (ConstantOfShape) is unknown" in refusal(model)


def made(name: str, *dims: int) -> list[NodeProto]:
    """Nodes that make a value out of a shape, which takes no space in the file."""
    stored = numbers("", *dims)
    return [
        helper.make_node("Constant", [], [f"{name}_shape"], value=stored),
        helper.make_node("ConstantOfShape", [f"{name}_shape"], [name]),
    ]


def chain_of(op_type: str, times: int, **attributes: Any) -> list[NodeProto]:
    """As many operators, each upon what the one before gives."""
    return [
        helper.make_node(op_type, [f"a{i or ''}"] * 2, [f"a{i + 1}"], **attributes)
        for i in range(times)
    ]


# Each computes for hours out of a kilobyte, and no value of it is large.
WORK = {
    "MatMul": [*made("a", 8000, 8000), *chain_of("MatMul", 14)],
    "Gemm": [*made("a", 8000, 8000), *chain_of("Gemm", 14, transA=1)],
    "Einsum": [*made("a", 8000, 8000), *chain_of("Einsum", 14, equation="ij,jk->ik")],
    "Einsum with an ellipsis": [
        *made("a", 16, 2000, 2000),
        *chain_of("Einsum", 14, equation="...ij, ...jk -> ...ik"),
    ],
    "Expand": [
        helper.make_node("Constant", [], ["n"], value=numbers("", 8000, 8000)),
        helper.make_node("Constant", [], ["v"], value_float=1e-3),
        helper.make_node("Expand", ["v", "n"], ["a"]),
        *chain_of("MatMul", 14),
    ],
    "Conv": [
        *(*made("a", 1, 64, 512, 512), *made("w", 64, 64, 63, 63)),
        helper.make_node("Conv", ["a", "w"], ["z"], auto_pad="SAME_UPPER"),
    ],
    "ConvTranspose": [
        *(*made("a", 1, 64, 512, 512), *made("w", 64, 64, 63, 63)),
        helper.make_node("ConvTranspose", ["a", "w"], ["z"], pads=[31, 31, 31, 31]),
    ],
    "LSTM": [
        *(*made("a", 65536, 1, 64), *made("w", 1, 8192, 64), *made("r", 1, 8192, 2048)),
        helper.make_node("LSTM", ["a", "w", "r"], ["", "z"], hidden_size=2048),
    ],
    "AveragePool": [
        *made("a", 1, 8, 2000, 2000),
        helper.make_node("AveragePool", ["a"], ["z"], kernel_shape=[999, 999]),
    ],
    "many sums": [
        *made("a", 8000, 8000),
        *(helper.make_node("ReduceSum", ["a"], [f"sum{i}"], keepdims=0) for i in range(200)),
    ],
    "sorting": [
        *(*made("a", 60_000_000), *made("k", 1)),
        *(helper.make_node("TopK", ["a", "n"], [f"v{i}", f"i{i}"]) for i in range(14)),
    ],
    "upsampling": [
        *made("a", 1, 1, 8, 8),
        helper.make_node("Constant", [], ["s"], value_floats=[1.0, 1.0, 1000.0, 1000.0]),
        *(helper.make_node("Resize", ["a", "", "s"], [f"v{i}"], mode="cubic") for i in range(15)),
    ],
}


@pytest.mark.parametrize("name", WORK)
def test_work_without_end_is_refused_with_its_count_and_the_node_that_takes_most(name: str) -> None:
    model = small(nodes=[CAST, *WORK[name]], tensors=[numbers("n", 1)] * (name == "sorting"))
    said = refusal(model)
    costly = {"Expand": "MatMul", "many sums": "ConstantOfShape", "sorting": "TopK"}
    costly |= {"upsampling": "Resize", "Einsum with an ellipsis": "Einsum"}
    assert re.search(
        rf"2 images take [\d,]+ multiply-adds, {MAX_WORK:,} are allowed; {costly.get(name, name)} "
        r"\w+ has the most, [\d,]+",
        said,
    )


@pytest.mark.parametrize(
    ("node", "inputs", "outputs", "count"),
    [
        (
            helper.make_node("Conv", ["x", "w"], ["z"]),
            [[2, 8, 9, 9], [4, 8, 3, 3]],
            [2, 4, 7, 7],
            72 * 392,
        ),
        (
            helper.make_node("Conv", ["x", "w"], ["z"], group=8),
            [[2, 8, 9, 9], [8, 1, 3, 3]],
            [2, 8, 7, 7],
            9 * 784,
        ),
        (
            helper.make_node("QLinearConv", [*"xabwcdef"], ["z"]),
            [[2, 8, 9, 9], [], [], [4, 8, 3, 3]],
            [2, 4, 7, 7],
            72 * 392,
        ),
        (
            helper.make_node("ConvTranspose", ["x", "w"], ["z"]),
            [[2, 8, 7, 7], [8, 4, 3, 3]],
            [2, 4, 9, 9],
            36 * 784,
        ),
        (helper.make_node("MatMul", ["x", "w"], ["z"]), [[3, 2, 5], [5, 4]], [3, 2, 4], 120),
        (helper.make_node("Gemm", ["x", "w"], ["z"], transA=1), [[5, 2], [5, 4]], [2, 4], 40),
        (
            helper.make_node("Einsum", ["x", "w"], ["z"], equation="...ij,jk"),
            [[3, 2, 5], [5, 4]],
            [3, 2, 4],
            120,
        ),
        (
            helper.make_node("Attention", [*"qkv"], ["z"]),
            [[2, 3, 5, 4], [2, 3, 7, 4], [2, 3, 7, 6]],
            [2, 3, 5, 6],
            7 * 300,
        ),
        (
            helper.make_node("GRU", [*"xwr"], ["z"]),
            [[5, 2, 3], [1, 12, 3], [1, 12, 4]],
            [5, 1, 2, 4],
            10 * 84,
        ),
        (helper.make_node("Relu", ["x"], ["z"]), [[2, 3]], [2, 3], 0),
    ],
    ids=lambda value: value.op_type if isinstance(value, NodeProto) else "",
)
def test_multiply_adds_are_counted_as_a_textbook_does(
    node: NodeProto, inputs: list[list[int]], outputs: list[int], count: int
) -> None:
    looked_at = ELEMENT * sum(map(math.prod, (*inputs, outputs)))
    assert multiply_adds(node, inputs, [outputs]) == count + looked_at


VGG19 = [64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4, 0]


def test_the_work_of_the_largest_known_classifier_is_allowed() -> None:
    """VGG19's 19.6 G multiply-adds an image, its weights made as they are needed."""
    nodes, name, channels = made("v0", 2, 3, 224, 224), "v0", 3
    for i, width in enumerate(VGG19):
        if width:
            nodes += made(f"w{i}", width, channels, 3, 3)
            channels = width
            nodes.append(helper.make_node("Conv", [name, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        else:
            nodes.append(
                helper.make_node("MaxPool", [name], [f"c{i}"], kernel_shape=[2, 2], strides=[2, 2])
            )
        name = f"c{i}"
    check_policy(small(nodes=[CAST, *nodes]), "it")


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("ConstantOfShape", ["i"], ["z"])],
        [helper.make_node("Expand", ["one", "i"], ["z"])],
        [helper.make_node("NonZero", ["x"], ["z"])],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_a_size_that_depends_on_the_image_is_refused(nodes: list[NodeProto]) -> None:
    before = [
        CAST,
        helper.make_node("ReduceSum", ["y"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["whole", "n"], ["i"]),
    ]
    said = refusal(small(nodes=[*before, *nodes], tensors=[ONE, numbers("n", 1)]))
    assert f"the size of z ({nodes[0].op_type}) is unknown" in said


def test_a_node_without_an_output_is_refused_and_not_computed() -> None:
    node = helper.make_node("ConstantOfShape", ["shape"], [])
    said = refusal(small(nodes=[CAST, node], tensors=[numbers("shape", HUGE)]))
    assert "a node without an output: ConstantOfShape" in said


def test_many_values_that_are_too_large_together_are_refused() -> None:
    nodes = [helper.make_node("ConstantOfShape", ["n"], [f"v{i}"]) for i in range(20)]
    said = refusal(small(nodes=[CAST, *nodes], tensors=[numbers("n", 1 << 26)]))
    assert "all values of 2 images together take 5368709160 bytes" in said


def test_a_value_declared_as_another_size_than_it_has_is_refused() -> None:
    model = small(nodes=[helper.make_node("Identity", ["x"], ["z"]), CAST])
    shape = [HUGE, 4]
    model.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.UINT8, shape))
    assert "z is declared with another shape than it has: [2, 4]" in refusal(model)


def test_a_shape_computed_from_the_batch_is_told() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "first"], ["b"]),
        helper.make_node("Unsqueeze", ["b", "first1"], ["b1"]),
        helper.make_node("Concat", ["b1", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
    ]
    first = numpy_helper.from_array(np.array(0, np.int64), "first")
    check_policy(
        small(nodes=nodes, tensors=[first, numbers("first1", 0), numbers("rest", -1)]), "it"
    )


@pytest.mark.parametrize(
    "tensor",
    [
        TensorProto(name="w", data_type=1, dims=[HUGE], raw_data=bytes(4)),
        TensorProto(name="w", data_type=1, dims=[1], raw_data=bytes(8)),
        TensorProto(name="w", data_type=1, dims=[-1], raw_data=bytes(4)),
        TensorProto(name="w", data_type=1, dims=[-1, -1], raw_data=bytes(4)),
        TensorProto(name="w", data_type=1, dims=[2], float_data=[1.0]),
        TensorProto(name="w", data_type=1, dims=[1] * 1000, float_data=[1.0]),
        TensorProto(name="w", data_type=TensorProto.INT4, dims=[5], raw_data=bytes(2)),
        TensorProto(name="w", data_type=99, dims=[1], raw_data=bytes(4)),
    ],
)
@pytest.mark.parametrize("is_attribute", [False, True])
def test_a_tensor_that_does_not_hold_what_it_claims_is_refused(
    tensor: TensorProto, is_attribute: bool
) -> None:
    constant = helper.make_node("Constant", [], ["z"], value=tensor)
    model = small(nodes=[CAST, constant]) if is_attribute else small(tensors=[tensor])
    assert "whose data do not match their dims: w" in refusal(model)


@pytest.mark.parametrize(
    "data_type", [t for t in helper.get_all_tensor_dtypes() if t != TensorProto.STRING]
)
def test_a_tensor_of_any_type_that_holds_what_it_claims_passes(data_type: int) -> None:
    values = helper.make_tensor("w", data_type, [3], [0, 1, 1])
    check_policy(small(tensors=[values]), "it")


@pytest.mark.parametrize("place", ["graph", "node", "input", "value", "initializer", "nested"])
def test_metadata_anywhere_but_on_the_model_is_refused(place: str) -> None:
    model = small(nodes=[CAST, within(CAST)], tensors=[numbers("n", 1)])
    model.graph.value_info.add(name="v")
    parts: dict[str, Any] = {
        "graph": model.graph,
        "node": model.graph.node[0],
        "input": model.graph.input[0],
        "value": model.graph.value_info[0],
        "initializer": model.graph.initializer[0],
        "nested": model.graph.node[1].attribute[0].g.node[0],
    }
    parts[place].metadata_props.add(key="k", value="v")
    said = refusal(model)
    assert "metadata of the exporter, which may have source paths: '--scrub' leaves" in said


@pytest.mark.parametrize("place", ["model", "graph", "node", "attribute", "input", "initializer"])
def test_a_doc_string_anywhere_is_refused(place: str) -> None:
    model = small(tensors=[numbers("n", 1)])
    node = model.graph.node[0]
    parts: dict[str, Any] = {"model": model, "graph": model.graph, "node": node}
    parts["attribute"] = node.attribute[0]
    parts |= {"input": model.graph.input[0], "initializer": model.graph.initializer[0]}
    parts[place].doc_string = "made on a Monday"
    assert "doc strings, which may have source paths: '--scrub' leaves" in refusal(model)


@pytest.mark.parametrize(
    "text",
    ['File "model.py", line 3', "/srv/me/model.py:3", "at=C:\\me\\model.py", "x/site-packages/y"],
)
@pytest.mark.parametrize("place", ["metadata 'k'", "producer_name", "name"])
def test_a_source_path_in_what_the_model_says_of_itself_is_refused(place: str, text: str) -> None:
    model = small()
    if place == "producer_name":
        model.producer_name = text
    elif place == "name":
        model.graph.name = text
    else:
        model.metadata_props.add(key="k", value=text)
    assert f"source paths in {place}: '--scrub' leaves them out" in refusal(model)


def test_metadata_of_the_model_that_shows_no_source_path_passes() -> None:
    model = small()
    model.metadata_props.add(key="classes", value='["0", "a/b", "pkg.pyx"]')
    check_policy(model, "it")


HOME, ROOT = "/home", "/root"  # apart, since no file of ours may show a path of one machine
SHOWING = [
    f"{HOME}/alice/secret-project/train.py:33",
    f"{HOME}/alice/secret/weights.pt",
    f"node_{HOME}/alice/secret",
    "/Users/alice/secret",
    "C:\\Users\\alice\\secret",
    "d:/alice/secret",
    "\\\\server\\alice\\secret",
    "file:///alice/secret",
    "s3://alice/secret",
    "~/secret/run",
    "~alice/secret",
    f"{ROOT}/secret",
    "/tmp/alice",
    "/mnt/nas/secret",
    "/data/alice/secret",
    "/usr/lib/python3/secret",
    "/var/folders/zz/secret",
    "secret/project/train.py",
    "secret-project/train.ipynb",
    "train.py:33",
    "secret/weights.safetensors",
    "\0".join(f"{HOME}/alice/secret"),
    'File "<stdin>", line 3',
]
# What exporters of PyTorch (both), TensorFlow, Keras, JAX, Paddle and ONNX Runtime's tools write.
USUAL = [
    "/features/0/Conv_output_0",
    "/features/features.0/features.0.0/Conv",
    "/layer1/layer1.0/conv1/Conv",
    f"/level2{ROOT}/conv/Conv_output_0",
    "/blocks.0/attn/Constant_1_output_0",
    "/transformer/h.0/attn/MatMul",
    "/head/py/Gemm",
    "/Reshape",
    "_/Add_1",
    "InsertedPrecisionFreeCast_/features/0/Conv_output_0",
    "model/conv1/weight",
    "model/conv1/kernel:0",
    "StatefulPartitionedCall/model/conv2d/Conv2D/ReadVariableOp:0",
    "InceptionV3/InceptionV3/Mixed_5b/Branch_0/Conv2d_0a_1x1/Relu",
    "const_fold_opt__21",
    "jit(predict)/jit(main)/Dense_0/dot_general",
    "p_features_0_weight",
    "features.0.pt.weight",
    "onnx::Conv_123",
    "aten::relu",
    "conv2d_0.w_0",
    "Relu_quant_QuantizeLinear_Output:0",
    "~",
    "s77",
]


@pytest.mark.parametrize("text", SHOWING)
def test_a_name_that_shows_a_source_path_is_refused_and_scrubbed(text: str) -> None:
    model = small()
    model.graph.node[0].name = text
    assert f"source paths in the name '{text}': '--scrub' leaves them out" in refusal(model)
    content = graph.scrub(model, 9, {})
    assert text.encode() not in content
    check_policy(graph.parse(content, "it"), "it")


@pytest.mark.parametrize(
    "text", ["/-", "a-", "/", "~", "~a", "\\a", "a:", "/a.", "a.p", ":/", "usr/", "/ ", "File"]
)
def test_a_name_without_end_is_searched_once_and_not_over_and_over(text: str) -> None:
    assert not SOURCE_PATH.search(text * 200_000)


def test_a_refusal_that_names_many_things_stays_short() -> None:
    model = small(nodes=[CAST, *[helper.make_node("Cast", ["x"], ["z"], to=1)] * 1000])
    for i, node in enumerate(model.graph.node[1:]):
        node.name, node.output[0] = f"{HOME}/{'a' * 10_000}/{i}", f"{HOME}/z{i}"
    said = refusal(model)
    assert "and 1,980 more: '--scrub' leaves them out" in said
    assert len(said) < 10_000


@pytest.mark.parametrize("text", USUAL)
def test_a_name_as_exporters_give_it_passes_and_stays(text: str) -> None:
    model = small()
    model.graph.node[0].name = text
    check_policy(model, "it")
    assert text.encode() in graph.scrub(model, 9, {})


@pytest.mark.parametrize("place", ["input", "output"])
def test_a_source_path_in_a_name_that_clients_use_is_refused_with_what_to_do(place: str) -> None:
    name = f"{HOME}/alice/secret"
    model = small(outputs=[name if place == "output" else "y"])
    if place == "output":
        model.graph.node[0].output[0] = name
    else:
        model.graph.node[0].input[0] = model.graph.input[0].name = name
    scrubbed = graph.parse(graph.scrub(model, 9, {}), "it")
    for one in (model, scrubbed):
        said = refusal(one)
        assert f"the names of inputs or outputs, {name}: clients use them" in said
        assert "--scrub" not in said


PATH = f"{HOME}/alice/secret-project/train.py:33"


def strings(*values: bytes) -> TensorProto:
    return numpy_helper.from_array(np.array(values, object), "w")


@pytest.mark.parametrize(
    ("nodes", "tensors", "said"),
    [
        ([], [strings(b"a", PATH.encode())], "a source path in the data of w"),
        ([], [strings(PATH.encode("utf-16"))], "a source path in the data of w"),
        ([], [strings(b"\xff\xfe " + PATH.encode())], "a source path in the data of w"),
        (
            [],
            [numpy_helper.from_array(np.frombuffer(PATH.encode(), np.uint8), "w")],
            "a source path in the data of w",
        ),
        (
            [],
            [numpy_helper.from_array(np.frombuffer(PATH.encode("utf-16-be"), np.int8), "w")],
            "a source path in the data of w",
        ),
        (
            [],
            [helper.make_tensor("w", TensorProto.UINT8, [len(PATH)], [*PATH.encode()])],
            "a source path in the data of w",
        ),
        (
            [helper.make_node("Constant", [], ["z"], value=strings(PATH.encode()))],
            [],
            "a source path in the data of w",
        ),
        (
            [helper.make_node("Constant", [], ["z"], "c", value_string=PATH)],
            [],
            "a source path in 'value_string' of Constant c",
        ),
        (
            [helper.make_node("Constant", [], ["z"], "c", value_strings=["a", PATH])],
            [],
            "a source path in 'value_strings' of Constant c",
        ),
        (
            [helper.make_node("Gelu", ["y"], ["z"], "g", approximate=PATH)],
            [],
            "a source path in 'approximate' of Gelu g",
        ),
    ],
)
def test_a_source_path_that_the_graph_computes_with_is_refused_and_named(
    nodes: list[NodeProto], tensors: list[TensorProto], said: str
) -> None:
    model = small(nodes=[CAST, *nodes], tensors=tensors)
    assert said in refusal(model)
    assert said in refusal(graph.parse(graph.scrub(model, 9, {}), "it"))


def test_strings_that_show_no_source_path_pass() -> None:
    constant = helper.make_node("Constant", [], ["z"], value_strings=["a/b", "model/conv1"])
    check_policy(small(nodes=[CAST, constant], tensors=[strings(b"\xff/x", b"a")]), "it")


def block(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(1, 8, 7), nn.MaxPool2d(3, 2, 1))
        self.a, self.b = block(8, 8), block(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images.float() / 255)
        x = torch.relu(x + self.b(self.a(x)))
        return torch.log_softmax(self.head(torch.flatten(x.mean(dim=(2, 3)), 1)), 1)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(block(1, 8), block(8, 8, groups=8), block(8, 16, 1))
        self.pool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.2)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.Hardswish(), nn.Linear(16, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.features(images.float() / 255))
        return torch.log_softmax(self.head(self.drop(x.flatten(1))), 1)


class Vision(nn.Module):
    """Patches, attention with a class token, upsampling: shapes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 14, 14)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.up, self.norm = nn.Upsample(scale_factor=2.0), nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.up(self.norm(self.patches(images.float() / 255)))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return torch.log_softmax(self.head(self.layer(x)[:, 0]), 1)


@pytest.mark.slow
@pytest.mark.parametrize("network", [ResNet, MobileNet, Vision])
@pytest.mark.parametrize("opset", [18, 21])
def test_a_network_exported_by_torch_and_scrubbed_keeps_the_policy(
    network: type[nn.Module], opset: int, tmp_path: Path
) -> None:
    path = tmp_path / "f.onnx"
    example = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    axis = {"images": {0: torch.export.Dim("batch")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            *(network().eval(), (example,), path),
            dynamo=True,
            dynamic_shapes=axis,
            opset_version=opset,
            verbose=False,
        )
    assert path.with_name("f.onnx.data").exists()
    assert "external data" in refusal(onnx.load_model(path, load_external_data=False))
    scrubbed = graph.parse(graph.scrub(graph.read_inlined(path), 10, {}), "it")
    check_policy(scrubbed, "it")
    assert graph.read_signature(scrubbed, "it", batch=None).images.shape == (1, 28, 28)
