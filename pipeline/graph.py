"""An ONNX graph as bytes: its signature, what we allow in one, and what is scrubbed from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, ValueInfoProto

from pipeline.config import TensorSpec
from pipeline.errors import CheckFailedError, CorruptError

BATCH = "batch"  # the name of dimension 0, on the input and on the output
MAX_BYTES = 512 * 1024 * 1024
# ONNX Runtime on a CPU skips a Dropout that was left in training mode; other runtimes obey it.
RANDOM = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike"}
    | {"RandomUniform", "RandomUniformLike"}
)
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})


@dataclass(frozen=True)
class Signature:
    """What goes in and what comes out; shapes without the batch."""

    images: TensorSpec
    outputs: TensorSpec
    opset: int
    ir_version: int


def parse(content: bytes, name: str) -> onnx.ModelProto:
    """The model in `content`; CorruptError names the file when it is none."""
    if len(content) > MAX_BYTES:
        raise CheckFailedError(f"{name} is larger than {MAX_BYTES} bytes")
    try:
        return onnx.load_model_from_string(content)
    except DecodeError as error:
        raise CorruptError(f"{name} is no ONNX file: export it again") from error


def _spec(value: ValueInfoProto, name: str) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = list(tensor.shape.dim)
    if not dims or dims[0].dim_param != BATCH:
        raise CheckFailedError(f"{name}: dimension 0 of {value.name} is not the axis '{BATCH}'")
    if not all(dim.HasField("dim_value") for dim in dims[1:]):
        raise CheckFailedError(f"{name}: {value.name} has an open dimension besides the batch")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(value.name, dtype, tuple(dim.dim_value for dim in dims[1:]))


def signature(model: onnx.ModelProto, name: str) -> Signature:
    """The signature of an image classifier: one tensor in, one out, the batch axis named.

    Raises CheckFailedError for a graph of any other form.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs = list(model.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        raise CheckFailedError(
            f"{name} has {len(inputs)} inputs and {len(outputs)} outputs, not one of each"
        )
    opset = next((entry.version for entry in model.opset_import if not entry.domain), 0)
    return Signature(_spec(inputs[0], name), _spec(outputs[0], name), opset, model.ir_version)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _is_training(node: onnx.NodeProto) -> bool:
    return any(entry.name == "training_mode" and entry.i for entry in node.attribute)


def check_policy(model: onnx.ModelProto, name: str) -> None:
    """Refuse what the checker lets pass and a server should never load.

    One file, the standard domain, no functions, no control flow, nothing random or in training
    mode, no source paths. Raises CheckFailedError with everything that is wrong.
    """
    wrong = []
    domains = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if domains:
        wrong.append(f"operators of domain {', '.join(sorted(domains))}")
    control = {node.op_type for node in model.graph.node} & CONTROL_FLOW
    if control:
        wrong.append(f"control flow: {', '.join(sorted(control))}")
    random = {node.op_type for node in model.graph.node} & RANDOM
    if random:
        wrong.append(f"chance: {', '.join(sorted(random))}; export the model in evaluation mode")
    if any(_is_training(node) for node in model.graph.node):
        wrong.append("a batch normalization in training mode")
    if model.functions:
        wrong.append("local functions")
    external = [t.name for t in _tensors(model.graph) if t.data_location == TensorProto.EXTERNAL]
    if external:
        wrong.append(f"external data: {', '.join(external)}")
    if any(node.metadata_props for node in model.graph.node):
        wrong.append("metadata of the exporter on its nodes, source paths among it")
    if wrong:
        raise CheckFailedError(f"{name} breaks the graph policy: {'; '.join(wrong)}")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailedError(f"{name} is no valid ONNX model: {error}") from error


def scrub(model: onnx.ModelProto, ir_version: int, metadata: dict[str, str]) -> bytes:
    """The bytes of `model` without the exporter's traces, with our metadata: the same each time."""
    model.ir_version = ir_version
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
    parts: list[Any] = [model, graph, *graph.node, *values]
    for part in parts:
        del part.metadata_props[:]
        part.doc_string = ""
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])
    return model.SerializeToString(deterministic=True)
