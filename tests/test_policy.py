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
from conftest import CAST, Chain, small
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from pipeline import graph
from pipeline.errors import CheckFailedError
from pipeline.policy import check_policy
from pipeline.sizes import MAX_VALUE


def refusal(model: onnx.ModelProto) -> str:
    with pytest.raises(CheckFailedError, match="breaks the graph policy") as caught:
        check_policy(model, "it")
    return str(caught.value)


def test_the_policy_names_everything_that_breaks_it() -> None:
    foreign = small(nodes=[helper.make_node("Mystery", ["x"], ["y"], domain="com.example")])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    weight.data_location = TensorProto.EXTERNAL
    foreign.graph.initializer.append(weight)
    foreign.graph.node.append(helper.make_node("If", ["c"], ["z"]))
    foreign.graph.node.append(helper.make_node("BatchNormalization", ["c"], ["v"], training_mode=1))
    foreign.graph.node.append(helper.make_node("Dropout", ["c"], ["u"]))
    foreign.graph.node[0].metadata_props.add(key="stack", value="File model.py")
    foreign.functions.add(name="f", domain="com.example")
    said = refusal(foreign)
    for words in ("chance: Dropout", "normalization in training mode", "local functions: f"):
        assert words in said
    for words in ("domain com.example", "control flow: If", "external data: w", "source paths"):
        assert words in said


def test_a_graph_that_the_checker_refuses_is_refused() -> None:
    with pytest.raises(CheckFailedError, match="no valid ONNX model"):
        check_policy(small(nodes=[helper.make_node("Cast", ["nowhere"], ["y"], to=1)]), "it")


def test_what_we_export_keeps_the_policy(made: Chain) -> None:
    check_policy(onnx.load_model(made.paths.onnx), "it")


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
        (helper.make_node("RandomNormal", [], ["z"], shape=[2]), "chance: RandomNormal"),
        (helper.make_node("Dropout", ["x"], ["z"]), "chance: Dropout; export the model in eval"),
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
        "import pathlib, resource, sys, pipeline.graph as g, pipeline.policy as p\n"
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
    assert f"the size of z ({nodes[0].op_type}) cannot be told" in said


def test_a_node_without_an_output_is_refused_and_not_computed() -> None:
    node = helper.make_node("ConstantOfShape", ["shape"], [])
    said = refusal(small(nodes=[CAST, node], tensors=[numbers("shape", HUGE)]))
    assert "a node without an output: ConstantOfShape" in said


def test_many_values_that_are_too_large_together_are_refused() -> None:
    nodes = [helper.make_node("ConstantOfShape", ["n"], [f"v{i}"]) for i in range(20)]
    said = refusal(small(nodes=[CAST, *nodes], tensors=[numbers("n", 1 << 26)]))
    assert "all values take 5368709160 bytes together" in said


def test_a_value_declared_as_another_size_than_it_has_is_refused() -> None:
    model = small(nodes=[helper.make_node("Identity", ["x"], ["z"]), CAST])
    shape = [HUGE, 4]
    model.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.UINT8, shape))
    assert "z is declared as another size than it has: [2, 4]" in refusal(model)


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
    assert "do not hold what their dims claim: w" in refusal(model)


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
    assert "metadata of the exporter in its graph, source paths among it: '--scrub' leaves" in said


@pytest.mark.parametrize("place", ["model", "graph", "node", "attribute", "input", "initializer"])
def test_a_doc_string_anywhere_is_refused(place: str) -> None:
    model = small(tensors=[numbers("n", 1)])
    node = model.graph.node[0]
    parts: dict[str, Any] = {"model": model, "graph": model.graph, "node": node}
    parts["attribute"] = node.attribute[0]
    parts |= {"input": model.graph.input[0], "initializer": model.graph.initializer[0]}
    parts[place].doc_string = "made on a Monday"
    assert "doc strings, which may hold source paths: '--scrub' leaves" in refusal(model)


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
    scrubbed = graph.parse(graph.scrub(graph.inlined(path), 10, {}), "it")
    check_policy(scrubbed, "it")
    assert graph.signature(scrubbed, "it", batch=None).images.shape == (1, 28, 28)
