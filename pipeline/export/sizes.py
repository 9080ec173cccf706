"""How large the values of an ONNX graph are, and how much work: told from the graph alone.

onnx's own inference of a whole graph is no gate: with `data_prop` it computes what shapes are
made of and allocates as it goes (30 nodes that double a list take it 100 GiB), and without it
cannot tell what most shapes are. So we go node by node, each asked about only after its inputs
were told and found small, and compute short lists of numbers ourselves.
"""

import math
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

# Some shapes depend on the batch. Two, not one, which would broadcast; and many, since a graph may
# compute more for each image the more there are.
IMAGES, MANY = 2, 256
# Of one value for two images, and as much an image for many. VGG's largest layer takes 13 MiB an
# image, and its largest weights, made of int8 as they are needed, 392 MiB: the one known classifier
# that is too large for us.
MAX_VALUE = 256 * 1024 * 1024
# Of all values for two images, as if none were ever freed, or many small bombs made a large one.
MAX_TOTAL = 4 * 1024 * 1024 * 1024
MAX_RANK = 16  # a shape of a million ones is a bomb to whoever passes it on
# Of multiply-adds for two images. VGG19 takes 20 G an image, the largest classifiers whose weights
# fit into one file (ViT-B/8, EfficientNet-B8) 65 G. A core does 5 to 50 G a second.
MAX_WORK = IMAGES * 100_000_000_000
# Of so little it does not matter whether it grows with the number of images, or faster.
LITTLE_WORK = 100_000_000
# Multiply-adds that reading or writing one element weighs: ONNX Runtime does 20 G of the ones and
# 0.3 G of the others a second on one core, from 0.03 (Softplus) to 3 (Identity).
ELEMENT = 16
STANDARD = frozenset({"", "ai.onnx"})  # the names of the standard domain
SHORT = 1024  # what a shape may be computed from: more numbers than any rank
FOLDS = 5_000  # nodes that compute what shapes are made of; each takes a millisecond here
# What computes shapes, and never needs more memory than its inputs and outputs take.
FOLDED = frozenset(
    {"Add", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand"}
    | {"Floor", "Gather", "Identity", "Max", "Min", "Mul", "Neg", "ReduceProd", "Reshape"}
    | {"Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"}
)
# onnx 1.23 infers nothing for these two, whose output is as large as their input.
AS_LARGE_AS_ITS_INPUT = frozenset({"GroupNormalization", "MeanVarianceNormalization"})
# Bits of what is packed in raw data; everything else takes whole bytes, as in numpy.
PACKED = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
PACKED |= {"FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
BITS = {
    number: PACKED.get(name) or 8 * helper.tensor_dtype_to_np_dtype(number).itemsize
    for name, number in TensorProto.DataType.items()
    if name != "UNDEFINED"
}


def count(dims: Iterable[int]) -> int | None:
    """How many elements a tensor of these dimensions has; None when it cannot be a shape."""
    dims = list(dims)
    if len(dims) > MAX_RANK or any(dim < 0 for dim in dims):
        return None
    return math.prod(dims)


def raw_bytes(tensor: TensorProto) -> int | None:
    """How many bytes the raw data of `tensor` has by its dims and type; None where it has none."""
    elements = count(tensor.dims)
    bits = BITS.get(tensor.data_type)
    if elements is None or bits is None or tensor.data_type == TensorProto.STRING:
        return None
    return (elements * bits + 7) // 8


def is_whole(tensor: TensorProto) -> bool:
    """Whether `tensor` holds as much as its dims claim, neither less nor more."""
    elements = count(tensor.dims)
    if elements is None or tensor.data_type not in BITS:
        return False
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data) == raw_bytes(tensor)
    entries = elements
    if BITS[tensor.data_type] < 8:
        entries = (elements * BITS[tensor.data_type] + 7) // 8
    elif tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        entries = 2 * elements
    return len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type))) == entries


def dims_of(told: TypeProto) -> list[int] | None:
    """The dimensions of a type; None unless it is a tensor's and every one of them is a number."""
    dims = told.tensor_type.shape.dim
    if not told.tensor_type.HasField("shape") or not all(d.HasField("dim_value") for d in dims):
        return None
    return [dim.dim_value for dim in dims]


def too_large(model: onnx.ModelProto) -> list[str]:
    """What is wrong with the sizes of the values that `model` computes, and its work, in words.

    A value that follows from a wrong one, or from a node that cannot be, goes unmentioned; all of
    them where the opset is missing or ambiguous, which the policy refuses.
    """
    if sum(entry.domain in STANDARD for entry in model.opset_import) != 1:
        return []
    work, wrong = _told(model, IMAGES, MAX_WORK)
    if not wrong:
        _, wrong = _told(model, MANY, MANY // IMAGES * max(work, LITTLE_WORK))
    return wrong


def _told(model: onnx.ModelProto, images: int, most_work: int) -> tuple[int, list[str]]:
    """The multiply-adds for so many images, and what is wrong with the sizes or with them."""
    values = _Values(model, images)
    for node in model.graph.node:
        if all(name in values.types for name in node.input if name):
            values.add(node)
    for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]:
        values.compare(value)
    if values.total > (most := MAX_TOTAL // IMAGES * images):
        values.wrong.append(
            f"all values of {images} images take {values.total} bytes together, {most} are allowed"
        )
    work = sum(values.work.values())
    if work > most_work:
        costliest = max(values.work, key=values.work.__getitem__)
        values.wrong.append(
            f"{images} images take {work:,} multiply-adds, {most_work:,} are allowed; {costliest} "
            f"takes most of all nodes, {values.work[costliest]:,}"
        )
    return work, values.wrong


class _Values:
    """What is known of the values of a graph so far: their types, and the short ones themselves."""

    def __init__(self, model: onnx.ModelProto, images: int) -> None:
        self.largest = MAX_VALUE // IMAGES * images  # bytes
        self.opsets = [entry for entry in model.opset_import if entry.domain in STANDARD]
        self.types: dict[str, TypeProto] = {}
        self.short: dict[str, TensorProto] = {}
        self.total = 0  # bytes
        self.folds = 0
        self.work: dict[str, int] = {}  # multiply-adds, by node
        self.wrong: list[str] = []
        for value in model.graph.input:
            told = TypeProto()
            told.CopyFrom(value.type)
            dims = told.tensor_type.shape.dim
            if dims and not dims[0].HasField("dim_value"):
                dims[0].dim_value = images
            self._take(value.name, told, "an input")
        for tensor in model.graph.initializer:
            self._hold(tensor.name, tensor)
        for sparse in model.graph.sparse_initializer:
            told = helper.make_tensor_type_proto(sparse.values.data_type, sparse.dims)
            self._take(sparse.values.name, told, "a sparse initializer")

    def add(self, node: NodeProto) -> None:
        """Tell the sizes of what `node` computes, and what it is where that is short."""
        stored = [attribute.t for attribute in node.attribute if attribute.HasField("t")]
        outputs = [name for name in node.output if name]
        if not outputs:
            self.wrong.append(f"a node without an output: {node.op_type}")
            return
        if node.op_type == "Constant" and stored:
            self._hold(outputs[0], stored[0])
            return
        told = self._infer(node)
        for name in outputs:
            self._take(name, told.get(name), node.op_type)
        if all(name in self.types for name in outputs):
            inputs = [self._dims(name) for name in node.input]
            work = multiply_adds(node, inputs, [self._dims(name) for name in outputs])
            self.work[f"{node.op_type} {outputs[0]}"] = work
        if all(self._elements(name) <= SHORT for name in node.output):
            self._fold(node)

    def compare(self, value: onnx.ValueInfoProto) -> None:
        """Note a declared shape that contradicts the one that we found: runtimes may trust it."""
        if value.name not in self.types or not value.type.tensor_type.HasField("shape"):
            return
        declared = value.type.tensor_type.shape.dim
        found = dims_of(self.types[value.name]) or []
        if len(declared) != len(found) or any(
            dim.HasField("dim_value") and dim.dim_value != size
            for dim, size in zip(declared, found, strict=True)
        ):
            self.wrong.append(f"{value.name} is declared as another size than it has: {found}")

    def _hold(self, name: str, tensor: TensorProto) -> None:
        """Know a stored tensor; it takes no more than the file, which has a cap of its own."""
        if tensor.data_location == TensorProto.EXTERNAL or not is_whole(tensor):
            return
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if self._elements(name) <= SHORT:
            self.short[name] = TensorProto()
            self.short[name].CopyFrom(tensor)
            self.short[name].name = name

    def _take(self, name: str, told: TypeProto | None, what: str) -> None:
        dims = dims_of(told) if told else None
        bits = BITS.get(told.tensor_type.elem_type) if told else None
        elements = None if dims is None else count(dims)
        is_text = told is not None and told.tensor_type.elem_type == TensorProto.STRING
        if told is None or bits is None or elements is None or (is_text and what != "Constant"):
            self.wrong.append(f"the size of {name} ({what}) cannot be told")
        elif (size := (elements * bits + 7) // 8) > self.largest:
            self.wrong.append(f"{name} ({what}) takes {size} bytes, {self.largest} are allowed")
        else:
            self.types[name] = told
            self.total += size

    def _elements(self, name: str) -> float:
        return math.prod(self._dims(name)) if name in self.types else math.inf

    def _dims(self, name: str) -> list[int]:
        """The dimensions of a value; none where an input is left out."""
        return dims_of(self.types[name]) or [] if name else []

    def _alone(self, node: NodeProto) -> onnx.ModelProto:
        """A model of this node only, that takes what the node takes."""
        names = dict.fromkeys(name for name in node.input if name)
        return helper.make_model(
            helper.make_graph(
                [node],
                "alone",
                [helper.make_value_info(n, self.types[n]) for n in names if n not in self.short],
                [onnx.ValueInfoProto(name=name) for name in node.output if name],
                [self.short[name] for name in names if name in self.short],
            ),
            opset_imports=self.opsets,
        )

    def _infer(self, node: NodeProto) -> dict[str, TypeProto]:
        if node.op_type in AS_LARGE_AS_ITS_INPUT and node.input and node.output:
            return {node.output[0]: self.types[node.input[0]]}
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            return {}  # the policy refuses it, and inference doubles its work at each level
        try:
            inferred = onnx.shape_inference.infer_shapes(self._alone(node))
        except onnx.shape_inference.InferenceError:
            return {}
        return {value.name: value.type for value in inferred.graph.output}

    def _fold(self, node: NodeProto) -> None:
        """Know what `node` answers where that is short, and what it takes is known."""
        results: list[Any] = []
        if node.op_type == "Size":
            results = [np.array(math.prod(self._dims(node.input[0])), np.int64)]
        elif node.op_type == "Shape":
            ends = {attribute.name: attribute.i for attribute in node.attribute}
            dims = self._dims(node.input[0])[ends.get("start", 0) : ends.get("end")]
            results = [np.array(dims, np.int64)]
        elif (
            self.folds < FOLDS
            and node.op_type in FOLDED
            and all(not name or name in self.short for name in node.input)
        ):
            self.folds += 1
            # The reference checks little, and fails on a wrong node in whatever way numpy does.
            with warnings.catch_warnings(), np.errstate(all="ignore"), suppress(Exception):
                warnings.simplefilter("ignore")
                results = list(ReferenceEvaluator(self._alone(node)).run(None, {}))
        for name, result in zip(node.output, results, strict=False):
            if isinstance(result, np.ndarray):
                self.short[name] = numpy_helper.from_array(result, name)


def multiply_adds(node: NodeProto, inputs: list[list[int]], outputs: list[list[int]]) -> int:
    """How many multiply-adds `node` takes at most, by the dimensions of what goes in and out.

    An element that is only looked at weighs ELEMENT of them.
    """
    first, out = inputs[0] if inputs else [], math.prod(outputs[0])
    elements = sum(map(math.prod, (*inputs, *outputs)))
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    lists = {attribute.name: attribute.ints for attribute in node.attribute}

    def dims(index: int) -> list[int]:
        return inputs[index] if index < len(inputs) else []

    match node.op_type:
        case "Conv" | "ConvInteger" | "DeformConv":
            work = out * math.prod(dims(1)[1:])
        case "QLinearConv":
            work = out * math.prod(dims(3)[1:])
        case "ConvTranspose":
            work = math.prod(first) * math.prod(dims(1)[1:])
        case "MatMul" | "MatMulInteger" | "QLinearMatMul":
            work = out * math.prod(first[-1:])
        case "Gemm":
            work = math.prod(first) * math.prod(outputs[0][-1:])
        case "Einsum":
            work = math.prod(_labelled(node, inputs).values())
        case "RNN" | "GRU" | "LSTM":
            work = math.prod(first[:2]) * (math.prod(dims(1)) + math.prod(dims(2)))
        case "Attention":  # each query with each key, of the past too, and each weight with a value
            keys = sum(dims(1)[-2:-1]) + sum(dims(4)[-2:-1])
            work = (math.prod(first) + out) * keys
        case "Det":
            work = math.prod(first) * math.prod(first[-1:])
        case "DFT" | "STFT":
            work = 2 * out * max(outputs[0], default=1)
        case "MaxPool" | "AveragePool" | "LpPool":
            work = ELEMENT * out * math.prod(lists.get("kernel_shape", []))
        case "LRN":
            work = ELEMENT * math.prod(first) * numbers.get("size", 1)
        case "TfIdfVectorizer":
            work = ELEMENT * math.prod(first) * numbers.get("max_skip_count", 1)
        case "MaxRoiPool":
            work = ELEMENT * out * math.prod(first[2:])
        case "Resize" | "Upsample" | "GridSample" | "TopK":  # 16 neighbours, or comparisons
            work = ELEMENT * elements * 16
        case _:
            work = 0
    return max(work, 0) + ELEMENT * elements  # a wrong attribute may be negative


def _labelled(node: NodeProto, inputs: list[list[int]]) -> dict[str, int]:
    """How far each index of an Einsum runs; those of an ellipsis are counted from its end."""
    equation = next((a.s for a in node.attribute if a.name == "equation"), b"")
    terms = equation.decode(errors="replace").partition("->")[0].split(",")
    runs: dict[str, int] = {}
    for term, dims in zip(terms, inputs, strict=False):
        before, dots, after = term.replace(" ", "").partition("...")
        hidden = range(len(dims) - len(before) - len(after), 0, -1) if dots else ()
        for label, size in zip([*before, *map(str, hidden), *after], dims, strict=False):
            runs[label] = max(size, runs.get(label, 1))
    return runs
