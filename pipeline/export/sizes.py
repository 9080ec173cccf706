"""Sizes of the values in an ONNX graph, and its work, computed without running the graph.

onnx's own shape inference of a whole graph is not safe enough: with `data_prop` it computes the
numbers that shapes are made of and allocates without limit (30 nodes that double a list take it
100 GiB); without `data_prop` it leaves most shapes unknown. So we infer node by node, each only
after its inputs are known to be small, and compute short lists of numbers ourselves.
"""

import copy
import math
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

# Batch sizes to compute the sizes for: two, since a batch of one would broadcast, and many, since
# the work for each image may grow with the batch size.
IMAGES, MANY = 2, 256
# Bytes of one value for two images; the same for each image of a larger batch. VGG's largest layer
# takes 13 MiB an image. Its largest weights, dequantized from int8 when needed, take 392 MiB: it is
# the only known classifier that is too large here.
MAX_VALUE = 256 * 1024 * 1024
# Bytes of all values for two images, as if none were freed: many medium values must not pass.
MAX_TOTAL = 4 * 1024 * 1024 * 1024
MAX_RANK = 16  # a shape of a million ones would slow all code that handles it
# Multiply-adds for two images. VGG19 takes 20 G an image, the largest classifiers whose weights
# fit into one file (ViT-B/8, EfficientNet-B8) 65 G. A core does 5 to 50 G a second.
MAX_WORK = IMAGES * 100_000_000_000
# Multiply-adds; less work than this may grow faster than the number of images.
LITTLE_WORK = 100_000_000
# Multiply-adds that reading or writing one element counts as: on one core, ONNX Runtime does 20 G
# multiply-adds a second, and reads or writes 0.3 G elements (Softplus 0.03 G, Identity 3 G).
ELEMENT = 16
STANDARD = frozenset({"", "ai.onnx"})  # the names of the standard domain
SHORT = 1024  # numbers that a shape may be computed from: more than any rank
FOLDS = 5_000  # evaluations of nodes that compute shapes; each takes a millisecond
# Operators that compute shapes and need no more memory than their inputs and outputs.
FOLDED = frozenset(
    {"Add", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand"}
    | {"Floor", "Gather", "Identity", "Max", "Min", "Mul", "Neg", "ReduceProd", "Reshape"}
    | {"Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"}
)
# onnx 1.23 infers no shape for these two; their output has the shape of their input.
AS_LARGE_AS_ITS_INPUT = frozenset({"GroupNormalization", "MeanVarianceNormalization"})
# Bits of the types that are packed in raw data; all others take whole bytes, as in numpy.
PACKED = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
PACKED |= {"FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
BITS = {
    number: PACKED.get(name) or 8 * helper.tensor_dtype_to_np_dtype(number).itemsize
    for name, number in TensorProto.DataType.items()
    if name != "UNDEFINED"
}


def count(dims: Iterable[int]) -> int | None:
    """Return the number of elements of a tensor with these dimensions, or None if invalid."""
    dims = list(dims)
    if len(dims) > MAX_RANK or any(dim < 0 for dim in dims):
        return None
    return math.prod(dims)


def raw_bytes(tensor: TensorProto) -> int | None:
    """Return the number of bytes of `tensor`'s raw data, from its dims and type.

    None for strings, an unknown type or invalid dims.
    """
    elements = count(tensor.dims)
    bits = BITS.get(tensor.data_type)
    if elements is None or bits is None or tensor.data_type == TensorProto.STRING:
        return None
    return (elements * bits + 7) // 8


def is_whole(tensor: TensorProto) -> bool:
    """Tell whether `tensor` holds exactly as much data as its dims declare."""
    elements = count(tensor.dims)
    if elements is None or tensor.data_type not in BITS:
        return False
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data) == raw_bytes(tensor)
    bits = BITS[tensor.data_type]
    is_complex = tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
    entries = (elements * bits + 7) // 8 if bits < 8 else elements * (1 + is_complex)
    return len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type))) == entries


def read_dims(kind: TypeProto) -> list[int] | None:
    """Return the dimensions of a tensor type, or None unless every one of them is a number."""
    dims = kind.tensor_type.shape.dim
    if not kind.tensor_type.HasField("shape") or not all(d.HasField("dim_value") for d in dims):
        return None
    return [dim.dim_value for dim in dims]


def list_excesses(model: onnx.ModelProto) -> list[str]:
    """List the problems with the sizes of the values that `model` computes, and with its work.

    Values computed from a refused value or node are not listed. The list is empty where the opset
    is missing or ambiguous: the policy refuses that elsewhere.
    """
    if sum(entry.domain in STANDARD for entry in model.opset_import) != 1:
        return []
    work, problems = _measure(model, IMAGES, MAX_WORK)
    return problems or _measure(model, MANY, MANY // IMAGES * max(work, LITTLE_WORK))[1]


def _measure(model: onnx.ModelProto, images: int, most_work: int) -> tuple[int, list[str]]:
    """Return the multiply-adds for `images` images, and the problems with sizes and work."""
    values = _Values(model, images)
    for node in model.graph.node:
        if all(name in values.types for name in node.input if name):
            values.add(node)
    for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]:
        values.compare(value)
    problems, most, work = values.problems, MAX_TOTAL // IMAGES * images, sum(values.work.values())
    if values.total > most:
        total = f"{values.total} bytes, {most} are allowed"
        problems.append(f"all values of {images} images together take {total}")
    if work > most_work:
        costliest = max(values.work, key=values.work.__getitem__)
        problems.append(
            f"{images} images take {work:,} multiply-adds, {most_work:,} are allowed; {costliest} "
            f"has the most, {values.work[costliest]:,}"
        )
    return work, problems


class _Values:
    """Values of a graph that are known so far: their types, and the contents of short ones."""

    def __init__(self, model: onnx.ModelProto, images: int) -> None:
        self.largest = MAX_VALUE // IMAGES * images  # bytes
        self.opsets = [entry for entry in model.opset_import if entry.domain in STANDARD]
        self.types: dict[str, TypeProto] = {}
        self.short: dict[str, TensorProto] = {}
        self.total = 0  # bytes
        self.folds = 0
        self.work: dict[str, int] = {}  # multiply-adds, by node
        self.problems: list[str] = []
        for value in model.graph.input:
            kind = copy.deepcopy(value.type)
            dims = kind.tensor_type.shape.dim
            if dims and not dims[0].HasField("dim_value"):
                dims[0].dim_value = images
            self._add_type(value.name, kind, "an input")
        for tensor in model.graph.initializer:
            self._add_stored(tensor.name, tensor)
        for sparse in model.graph.sparse_initializer:
            kind = helper.make_tensor_type_proto(sparse.values.data_type, sparse.dims)
            self._add_type(sparse.values.name, kind, "a sparse initializer")

    def add(self, node: NodeProto) -> None:
        """Add the types of the outputs of `node`, its work, and the contents of short outputs."""
        stored = [attribute.t for attribute in node.attribute if attribute.HasField("t")]
        outputs = [name for name in node.output if name]
        if not outputs:
            self.problems.append(f"a node without an output: {node.op_type}")
            return
        if node.op_type == "Constant" and stored:
            self._add_stored(outputs[0], stored[0])
            return
        kinds = self._infer(node)
        for name in outputs:
            self._add_type(name, kinds.get(name), node.op_type)
        if all(name in self.types for name in outputs):
            inputs = [self._dims(name) for name in node.input]
            work = multiply_adds(node, inputs, [self._dims(name) for name in outputs])
            self.work[f"{node.op_type} {outputs[0]}"] = work
        if all(self._elements(name) <= SHORT for name in node.output):
            self._fold(node)

    def compare(self, value: onnx.ValueInfoProto) -> None:
        """Note a declared shape that contradicts the inferred one: runtimes may trust it."""
        if value.name not in self.types or not value.type.tensor_type.HasField("shape"):
            return
        declared = value.type.tensor_type.shape.dim
        dims = self._dims(value.name)
        if len(declared) != len(dims) or any(
            dim.HasField("dim_value") and dim.dim_value != size
            for dim, size in zip(declared, dims, strict=True)
        ):
            self.problems.append(f"{value.name} is declared with another shape than it has: {dims}")

    def _add_stored(self, name: str, tensor: TensorProto) -> None:
        """Add a stored tensor; its size needs no check, because that of the file is limited."""
        if tensor.data_location == TensorProto.EXTERNAL or not is_whole(tensor):
            return
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if self._elements(name) <= SHORT:
            self.short[name] = copy.deepcopy(tensor)
            self.short[name].name = name

    def _add_type(self, name: str, kind: TypeProto | None, source: str) -> None:
        kind = kind or TypeProto()  # a type without a shape
        dims, dtype = read_dims(kind), kind.tensor_type.elem_type
        elements = None if dims is None else count(dims)
        is_text = dtype == TensorProto.STRING and source != "Constant"
        if elements is None or dtype not in BITS or is_text:
            self.problems.append(f"the size of {name} ({source}) is unknown")
        elif (size := (elements * BITS[dtype] + 7) // 8) > self.largest:
            most = f"{self.largest} are allowed"
            self.problems.append(f"{name} ({source}) takes {size} bytes, {most}")
        else:
            self.types[name] = kind
            self.total += size

    def _elements(self, name: str) -> float:
        return math.prod(self._dims(name)) if name in self.types else math.inf

    def _dims(self, name: str) -> list[int]:
        """Return the dimensions of a value; [] for an optional input that is left out."""
        return read_dims(self.types[name]) or [] if name else []

    def _isolate(self, node: NodeProto) -> onnx.ModelProto:
        """Return a model of this node only, with the inputs of the node."""
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
            return {}  # the policy refuses subgraphs; inference would double its work at each level
        try:
            inferred = onnx.shape_inference.infer_shapes(self._isolate(node))
        except onnx.shape_inference.InferenceError:
            return {}
        return {value.name: value.type for value in inferred.graph.output}

    def _fold(self, node: NodeProto) -> None:
        """Add the contents of the short outputs of `node`, where its inputs are known."""
        results: list[Any] = []
        if node.op_type == "Size":
            results = [np.array(math.prod(self._dims(node.input[0])), np.int64)]
        elif node.op_type == "Shape":
            ends = {attribute.name: attribute.i for attribute in node.attribute}
            dims = self._dims(node.input[0])[ends.get("start", 0) : ends.get("end")]
            results = [np.array(dims, np.int64)]
        elif self.folds < FOLDS and node.op_type in FOLDED and {"", *self.short} >= {*node.input}:
            self.folds += 1
            # onnx's evaluator checks little: on an invalid node it raises whatever numpy raises.
            with warnings.catch_warnings(), np.errstate(all="ignore"), suppress(Exception):
                warnings.simplefilter("ignore")
                results = list(ReferenceEvaluator(self._isolate(node)).run(None, {}))
        for name, result in zip(node.output, results, strict=False):
            if isinstance(result, np.ndarray):
                self.short[name] = numpy_helper.from_array(result, name)


def multiply_adds(node: NodeProto, inputs: list[list[int]], outputs: list[list[int]]) -> int:
    """Return how many multiply-adds `node` takes at most, from its input and output dimensions.

    Reading or writing one element counts as ELEMENT multiply-adds.
    """
    # [] for inputs that are left out.
    first, second, third, fourth, fifth = [*inputs, *[[]] * 5][:5]
    out = math.prod(outputs[0])
    elements = sum(map(math.prod, (*inputs, *outputs)))
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    lists = {attribute.name: attribute.ints for attribute in node.attribute}
    match node.op_type:
        case "Conv" | "ConvInteger" | "DeformConv":
            work = out * math.prod(second[1:])
        case "QLinearConv":
            work = out * math.prod(fourth[1:])
        case "ConvTranspose":
            work = math.prod(first) * math.prod(second[1:])
        case "MatMul" | "MatMulInteger" | "QLinearMatMul":
            work = out * math.prod(first[-1:])
        case "Gemm":
            work = math.prod(first) * math.prod(outputs[0][-1:])
        case "Einsum":
            work = math.prod(_index_sizes(node, inputs).values())
        case "RNN" | "GRU" | "LSTM":
            work = math.prod(first[:2]) * (math.prod(second) + math.prod(third))
        case "Attention":  # each query with each key (past keys too), each weight with a value
            work = (math.prod(first) + out) * (sum(second[-2:-1]) + sum(fifth[-2:-1]))
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


def _index_sizes(node: NodeProto, inputs: list[list[int]]) -> dict[str, int]:
    """Return the size of each index of an Einsum; an ellipsis's are numbered from its end."""
    equation = next((a.s for a in node.attribute if a.name == "equation"), b"")
    terms = equation.decode(errors="replace").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, dims in zip(terms, inputs, strict=False):
        before, dots, after = term.replace(" ", "").partition("...")
        hidden = range(len(dims) - len(before) - len(after), 0, -1) if dots else ()
        for label, size in zip([*before, *map(str, hidden), *after], dims, strict=False):
            sizes[label] = max(size, sizes.get(label, 1))
    return sizes
