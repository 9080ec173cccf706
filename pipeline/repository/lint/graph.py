"""The tensors and errors of a model file as ONNX Runtime sees them. Runs no model."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, ValueInfoProto
from onnx.shape_inference import InferenceError
from tritonclient.grpc import model_config_pb2

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.export.graph import is_external, message_parts, parse, read_onnx
from pipeline.export.sizes import STANDARD, is_whole, raw_bytes
from pipeline.repository.lint.text import Finding

FILE = "onnxruntime onnxruntime/core/graph/model.cc"
# Triton's names of the types whose names in ONNX differ; the others are TYPE_ and ONNX's name.
_RENAMED = {"FLOAT16": "FP16", "FLOAT": "FP32", "DOUBLE": "FP64", "BFLOAT16": "BF16"}
_TRITON_TYPES = dict(model_config_pb2.DataType.items())
TYPES = {
    number: triton_name
    for name, number in TensorProto.DataType.items()
    if (triton_name := f"TYPE_{_RENAMED.get(name, name)}") in _TRITON_TYPES
}
# Domains of operators that ONNX Runtime includes.
KNOWN_DOMAINS = STANDARD | {"ai.onnx.ml"}
KNOWN_DOMAIN_ROOTS = ("com.microsoft", "com.ms.internal", "org.pytorch.aten")
# Operators in the standard domain that ONNX Runtime supports, and ONNX never had or has removed.
RUNTIME_ONLY = frozenset(
    {"Affine", "Crop", "DynamicSlice", "GivenTensorFill", "ImageScaler", "Scale", "ScaledTanh"}
    | {"MeanVarianceNormalization", "ParametricSoftplus", "ThresholdedRelu"}
)
SMALL = 1024  # elements: a constant up to this size may be used as a shape


@dataclass(frozen=True)
class Tensor:
    """An input or an output of a graph."""

    name: str
    data_type: str  # Triton's name; TYPE_INVALID if Triton has no such type
    shape: tuple[int, ...]  # with the batch; -1: variable size; (): a scalar
    kind: str = "tensor_type"


@dataclass(frozen=True)
class Graph:
    """The inputs and outputs of a model file, and what it needs to run."""

    path: Path
    inputs: dict[str, Tensor] = field(default_factory=dict)
    defaults: dict[str, Tensor] = field(default_factory=dict)  # inputs with a default value
    outputs: dict[str, Tensor] = field(default_factory=dict)
    opset: int = 0
    ir_version: int = 0
    foreign: frozenset[str] = frozenset()  # domains whose operators need another library
    computes_shapes: bool = False  # then ONNX Runtime may know more of them than we do

    @property
    def can_batch(self) -> bool:
        """Whether dimension 0 of every input and output has a variable size."""
        return all(t.shape[:1] == (-1,) for t in (*self.inputs.values(), *self.outputs.values()))


def read_graph(path: Path) -> tuple[Graph | None, list[Finding]]:
    """Read a model file; return its graph, None if unreadable, and findings for any config."""
    try:
        model = parse(read_onnx(path), str(path))
    except CheckFailedError as error:  # it is too large to read here
        return None, [Finding("onnx", "note", path, f"is not checked: {error}")]
    except PipelineError as error:
        return None, [_finding(path, str(error).partition(": export")[0].removeprefix(f"{path} "))]
    if not model.graph.output:
        return None, [_finding(path, "has no graph: the file is empty or cut off")]
    findings = [
        *_check_external(model, path),
        *(_finding(path, problem) for problem in _check_names(model)),
        *(_finding(path, problem, fix) for problem, fix in _check_operators(model)),
    ]
    included = KNOWN_DOMAINS | {function.domain for function in model.functions}
    domains = {node.domain for node in model.graph.node} - included
    _infer_shapes(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: _tensor(value) for value in model.graph.input}
    graph = Graph(
        path,
        {name: tensor for name, tensor in inputs.items() if name not in constants},
        {name: tensor for name, tensor in inputs.items() if name in constants},
        {value.name: _tensor(value) for value in model.graph.output},
        max((entry.version for entry in model.opset_import if entry.domain in STANDARD), default=0),
        model.ir_version,
        frozenset(domain for domain in domains if not domain.startswith(KNOWN_DOMAIN_ROOTS)),
        any(node.op_type == "Shape" for node in model.graph.node),
    )
    return graph, findings


def _finding(path: Path, problem: str, fix: str = "export it again") -> Finding:
    return Finding("onnx", "error", path, problem, fix, source=FILE)


def _infer_shapes(model: onnx.ModelProto) -> None:
    """Fill in the shapes that follow from the graph, as ONNX Runtime does when it loads a model.

    Does not use onnx's data propagation, because a few nodes can make it allocate without limit
    (see pipeline/export/sizes.py).
    """
    for tensor in model.graph.initializer:
        if len(tensor.dims) and max(tensor.dims) > SMALL:
            kept = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
            tensor.CopyFrom(kept)
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except (InferenceError, RuntimeError, ValueError, DecodeError):
        return  # the declared shapes stay
    model.graph.CopyFrom(inferred.graph)


def _tensor(value: ValueInfoProto) -> Tensor:
    kind = value.type.WhichOneof("value") or "tensor_type"
    dims = value.type.tensor_type.shape.dim
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
    data_type = TYPES.get(value.type.tensor_type.elem_type, "TYPE_INVALID")
    return Tensor(value.name, data_type, shape, kind)


def _check_names(model: onnx.ModelProto) -> Iterator[str]:
    """Check for names that no node or several nodes define, and for weights that are cut off."""
    graph = model.graph
    computed = Counter(name for node in graph.node for name in node.output if name)
    defined = {*computed, *(value.name for value in graph.input)}
    defined |= {tensor.name for tensor in graph.initializer}
    defined |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        for name in sorted(set(node.input) - defined - {""}):
            place = "is not a graph input, initializer, or output of a node"
            yield f"Invalid model. Node input '{name}' {place} ({node.op_type})"
    for tensor in graph.initializer:
        if not is_external(tensor) and not is_whole(tensor):
            yield f"the tensor '{tensor.name}' does not have as much data as its dims require"
    for value in graph.output:
        if value.name not in defined:
            yield f"no node computes the output '{value.name}'"
    for name, count in computed.items():
        if count > 1:
            yield f"Duplicate definition of name ({name}), by {count} nodes"


def _check_operators(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Check that the opset has all operators of the standard domain."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = max((versions.get(domain, 0) for domain in STANDARD), default=0)
    own = {function.name for function in model.functions if function.domain in STANDARD}
    if opset > onnx.defs.onnx_opset_version():
        return  # newer than the installed onnx package knows
    used = {node.op_type for node in model.graph.node if node.domain in STANDARD}
    for name in sorted(used - own - RUNTIME_ONLY):
        try:
            if not onnx.defs.get_schema(name, opset, "").deprecated:
                continue
            problem = f"{name} is deprecated in opset {opset}"
        except onnx.defs.SchemaError:
            problem = f"{name}({opset}) is not a registered function/op"
        yield problem, f"export it with operators of opset {opset}"


def _check_external(model: onnx.ModelProto, path: Path) -> Iterator[Finding]:
    """Check the external files that hold the model's weights."""
    by_location: dict[str, list[tuple[Any, dict[str, str]]]] = {}
    for part in message_parts(model):
        if isinstance(part, TensorProto) and is_external(part):
            entries = {entry.key: entry.value for entry in part.external_data}
            by_location.setdefault(entries.get("location", ""), []).append((part, entries))
    for location, parts in by_location.items():
        place, problem = PurePosixPath(location), ""
        fix = f"put the file next to {path.name}, or export one file"
        if not location or place.is_absolute() or ".." in place.parts or "\0" in location:
            problem = "is not in the version's folder"
        else:
            try:
                if not stat.S_ISREG(os.lstat(path.parent / place).st_mode):
                    problem = "is not a regular file"
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
        if not problem:
            fix = f"copy '{location}' again, together with {path.name}"
            problem = _find_gap(parts, (path.parent / location).stat().st_size)
        if problem:
            problem = f"the data of {parts[0][0].name or 'a tensor'} in '{location}' {problem}"
            yield Finding("external-data", "error", path, problem, fix, source=FILE)


def _find_gap(parts: Iterable[tuple[Any, dict[str, str]]], size: int) -> str:
    """Return why a weights file of `size` bytes does not have all data; "" if it has."""
    for tensor, entries in parts:
        offset, length = entries.get("offset", "0"), entries.get("length", "")
        if not re.fullmatch("[0-9]{1,18}", offset) or not re.fullmatch("[0-9]{0,18}", length):
            return f"has an invalid offset '{offset}' or length '{length}'"
        needed = raw_bytes(tensor)
        if length and needed is not None and int(length) != needed:
            return f"has {length} bytes for {tensor.name}, whose dims require {needed}"
        end = int(offset) + (int(length) if length else needed or 0)
        if end > size:
            return f"ends at byte {size}, before the end of {tensor.name} at {end}"
    return ""
