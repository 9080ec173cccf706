"""A config against the graph of its model: names, types, shapes, batch axis, opset."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.export.targets import NEWEST, Target, loaded_by, target
from pipeline.repository.lint.backend import BACKEND, type_name
from pipeline.repository.lint.config import model_tensors
from pipeline.repository.lint.files import Model
from pipeline.repository.lint.graph import FILE, Graph, Tensor
from pipeline.repository.lint.text import Finding, Level

UTILS = "onnxruntime_backend src/onnxruntime_utils.cc"
OLDEST_OPSET = 7  # of which ONNX Runtime has all operators
COMPARE = f"{UTILS} CompareDimsSupported"


def signature(model: Model, version: int) -> Iterator[Finding]:
    """What the config says of the tensors of one version, against what its graph has."""
    graph, config = model.graphs[version], model.config
    yield from _kinds(graph)
    yield from _counts(model, graph)
    for kind, tensor, where in model_tensors(model):
        known: Mapping[str, Tensor] = graph.outputs
        if kind == "input":
            known = {**graph.inputs, **graph.defaults}
        if tensor.name not in known:
            if tensor.name:
                said = f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: "
                yield config.finding(
                    "tensor-name", "error", f"{where}.name", said + ", ".join(sorted(known)),
                    "call it as the graph does", f"{BACKEND} Validate{kind.title()}s",
                )  # fmt: skip
            continue
        yield from _type(model, kind, tensor, where, known[tensor.name])
        yield from _dims(model, kind, tensor, where, known[tensor.name], graph)


def _kinds(graph: Graph) -> Iterator[Finding]:
    for tensor in (*graph.inputs.values(), *graph.outputs.values()):
        if tensor.kind != "tensor_type":
            kind = f"ONNX_TYPE_{tensor.kind.removesuffix('_type').upper()}"
            said = f"Unsupported ONNX Type '{kind}' for I/O '{tensor.name}', expected "
            fix = "export it with tensors only (ZipMap off, for scikit-learn)"
            yield Finding(
                "tensor-type", "error", graph.path, f"{said}'ONNX_TYPE_TENSOR'", fix, source=UTILS
            )


def _counts(model: Model, graph: Graph) -> Iterator[Finding]:
    """The number of inputs, which must all be described, or none."""
    message = model.config.message
    if message.HasField("sequence_batching"):
        return  # which adds inputs of its own
    batch_inputs = len(message.batch_input)
    required = [tensor.name for tensor in message.input if not tensor.optional]
    expected = len(required) + batch_inputs
    if (message.input or batch_inputs) and expected != len(graph.inputs):
        missing = ", ".join(sorted(set(graph.inputs) - set(required)))
        said = f"configuration expects {expected} inputs, model provides {len(graph.inputs)}"
        fix = f"describe {missing} as well" if missing else "describe each input of the graph once"
        yield model.config.finding(
            "tensor-count", "error", "input[0]", said, fix, f"{BACKEND} ValidateInputs"
        )


def _type(model: Model, kind: str, tensor: Any, where: str, provided: Tensor) -> Iterator[Finding]:
    asked, found = type_name(tensor.data_type), provided.data_type
    if provided.kind == "tensor_type" and asked != found and tensor.data_type:
        said = f"configuration expects datatype {asked} for {kind} '{tensor.name}', model provides "
        yield model.config.finding(
            "tensor-type", "error", f"{where}.data_type", said + found,
            f"write data_type: {found}", f"{BACKEND} Validate{kind.title()}s",
        )  # fmt: skip


def _dims(
    model: Model, kind: str, tensor: Any, where: str, provided: Tensor, graph: Graph
) -> Iterator[Finding]:
    """Shapes as the backend compares them: an output's must be equal, an input's narrower."""
    config, shape = model.config, list(provided.shape)
    gathered = {name for one in config.message.batch_output for name in one.target_name}
    if provided.kind != "tensor_type" or not tensor.dims or tensor.name in gathered:
        return
    field = "reshape" if tensor.HasField("reshape") else "dims"
    dims = list(tensor.reshape.shape) if field == "reshape" else list(tensor.dims)
    is_input = kind == "input"
    if (is_input and (tensor.optional or tensor.allow_ragged_batch)) or not shape:
        said, fix = _unusual(tensor, is_input, dims, shape, model.max_batch_size)
        if said:
            source = f"{BACKEND} Validate{kind.title()}s"
            yield config.finding("tensor-dims", "error", f"{where}.{field}", said, fix, source)
    elif model.max_batch_size > 0 and shape[0] != -1:
        said = f"tensor '{tensor.name}': for the model to support batching the shape should have "
        said += "at least 1 dimension and the first dimension must be -1; but shape expected by "
        fix = "export it with a dynamic batch axis, or set max_batch_size: 0 and the whole shape"
        yield config.finding(
            "batch-axis", "error", where, f"{said}the model is {shape}", fix, COMPARE
        )
    else:
        full = [-1, *dims] if model.max_batch_size > 0 else dims
        yield from _compare(model, is_input, tensor.name, f"{where}.{field}", full, shape, graph)


def _unusual(
    tensor: Any, is_input: bool, dims: list[int], shape: list[int], largest: int
) -> tuple[str, str]:
    """What is wrong with an input that is optional or ragged, or with a scalar, and the fix."""
    if is_input and tensor.optional:
        said = f"optional input '{tensor.name}' is not supported for models that support batching"
        return (said, "set max_batch_size: 0, or describe it as required") if largest else ("", "")
    if is_input and tensor.allow_ragged_batch:
        said = "configuration expects model provides input with shape [-1] for ragged input "
        said += f"'{tensor.name}', model provides {shape}"
        return (said, "leave allow_ragged_batch out") if shape != [-1] else ("", "")
    said = f"scalar tensor '{tensor.name}', should only provide 1 in the model configuration"
    return (said, "write dims: 1") if any(dim != 1 for dim in dims) else ("", "")


def _compare(
    model: Model,
    is_input: bool,
    name: str,
    at: str,
    full: list[int],
    shape: list[int],
    graph: Graph,
) -> Iterator[Finding]:
    """The config's shape, the batch included, against the graph's."""
    pairs = list(zip(full, shape, strict=False))
    may_match = len(full) == len(shape) and all(ours == of or of == -1 for ours, of in pairs)
    if full == shape or (is_input and may_match):
        return
    is_batched = model.max_batch_size > 0
    note = " (an initial batch dimension because max_batch_size > 0)" if is_batched else ""
    said = f"tensor '{name}': the model expects {len(shape)} dimensions (shape {shape}) but the "
    said += f"model configuration specifies {len(full)} dimensions (shape {full}){note}"
    # A shape that the graph computes may be known to ONNX Runtime, where it is open to us.
    level: Level = "warning" if may_match and graph.computes_shapes else "error"
    fix = _dims_fix(shape, full, is_batched)
    yield model.config.finding("tensor-dims", level, at, said, fix, COMPARE)


def _dims_fix(shape: list[int], full: list[int], is_batched: bool) -> str:
    wanted = shape[1:] if is_batched else shape
    if not is_batched and len(shape) == len(full) + 1 and shape[0] == -1:
        return "set max_batch_size, since the dims leave the batch out"
    if is_batched and full[1:] == shape:
        return f"leave the batch out: dims: {wanted}"
    return f"write dims: {wanted}"


def completion(model: Model, version: int) -> Iterator[Finding]:
    """What Triton fills in where the config is silent, and cannot."""
    message, graph = model.config.message, model.graphs[version]
    if model.is_complete:
        return
    if message.max_batch_size > 0 and not graph.can_batch:
        said = f"autofill failed for model '{model.folder.name}': model does not support batching "
        yield model.config.finding(
            "batch-axis", "error", "max_batch_size",
            f"{said}while non-zero max_batch_size is specified",
            "export it with a dynamic batch axis, or leave max_batch_size out",
            f"{BACKEND} AutoCompleteMaxBatch",
        )  # fmt: skip
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for tensor in tensors.values() if not getattr(message, kind) else ():
            if tensor.data_type == "TYPE_INVALID" or 0 in tensor.shape:
                said = f"model {kind} '{tensor.name}' has a type or a shape that Triton has no word"
                fix = "export it with another type"
                yield Finding("tensor-type", "error", graph.path, f"{said} for", fix, source=UTILS)


def dialect(model: Model, version: int, wanted: Target | None) -> Iterator[Finding]:
    """Opset and IR against the release that is to serve it, and operators from elsewhere."""
    graph = model.graphs[version]
    oldest = loaded_by(graph.opset, graph.ir_version)
    asked = wanted or target(NEWEST)
    if graph.opset > asked.opset or graph.ir_version > asked.ir_version:
        said = (
            f"opset {graph.opset}, IR {graph.ir_version}: Triton {asked.release} has ONNX Runtime "
        )
        said += (
            f"{asked.onnxruntime}, which loads opset {asked.opset}, IR {asked.ir_version} at most"
        )
        later = f", or serve it with {oldest.release} or later" if oldest else ""
        fix = f"export it with --target-triton {asked.release}{later}"
        yield Finding("dialect", "error", graph.path, said, fix, source=FILE)
    if 0 < graph.opset < OLDEST_OPSET:
        said = f"ONNX Runtime lacks operators of opsets below {OLDEST_OPSET}, this has "
        fix = "convert it with onnx.version_converter, or try it with --live"
        yield Finding("dialect", "warning", graph.path, f"{said}{graph.opset}", fix, source=FILE)
    if graph.foreign and not model.config.message.model_operations.op_library_filename:
        said = f"operators of domain {', '.join(sorted(graph.foreign))} are not registered"
        fix = "name their library in model_operations, or export it without them"
        yield Finding("operators", "error", graph.path, said, fix, source=FILE)
