"""Rules for a config and its model's graph: names, types, shapes, batch axis, opset."""

from collections.abc import Iterator
from typing import Any

from pipeline.export.targets import NEWEST, Target, loaded_by, target
from pipeline.repository.lint.backend import BACKEND, triton_type
from pipeline.repository.lint.config import INPUTS, model_tensors
from pipeline.repository.lint.files import ModelFolder
from pipeline.repository.lint.graph import FILE, Graph, Tensor
from pipeline.repository.lint.text import Finding, Level

UTILS = "onnxruntime_backend src/onnxruntime_utils.cc"
OLDEST_OPSET = 7  # ONNX Runtime has all operators from this opset on
COMPARE = f"{UTILS} CompareDimsSupported"


def described_tensors(model: ModelFolder, version: int) -> Iterator[Finding]:
    """Check the config's inputs and outputs against the graph of one version."""
    graph, config = model.graphs[version], model.config
    for provided in (*graph.inputs.values(), *graph.outputs.values()):
        if provided.kind != "tensor_type":
            onnx_type = f"ONNX_TYPE_{provided.kind.removesuffix('_type').upper()}"
            said = f"Unsupported ONNX Type '{onnx_type}' for I/O '{provided.name}', expected "
            said += "'ONNX_TYPE_TENSOR'"
            fix = "export it with tensors only (ZipMap off, for scikit-learn)"
            yield Finding("tensor-type", "error", graph.path, said, fix, source=UTILS)
    message = config.message
    required = [tensor.name for tensor in message.input if not tensor.optional]
    expected, count = len(required) + len(message.batch_input), len(graph.inputs)
    # Either all inputs or no inputs must be described. Sequence batching adds its own inputs.
    is_described = message.input or message.batch_input
    if is_described and expected != count and not message.HasField("sequence_batching"):
        missing = ", ".join(sorted(set(graph.inputs) - set(required)))
        said = f"configuration expects {expected} inputs, model provides {count}"
        fix = f"describe {missing} as well" if missing else "describe each input of the graph once"
        yield config.finding("tensor-count", "error", "input[0]", said, fix, INPUTS)
    for kind, tensor, where in model_tensors(model):
        source = f"{BACKEND} Validate{kind.title()}s"
        known = {**graph.inputs, **graph.defaults} if kind == "input" else graph.outputs
        if tensor.name in known:
            provided = known[tensor.name]
            asked, data_type = triton_type(tensor.data_type), provided.data_type
            if provided.kind == "tensor_type" and asked != data_type and tensor.data_type:
                said = f"configuration expects datatype {asked} for {kind} '{tensor.name}', model "
                said, fix = f"{said}provides {data_type}", f"write data_type: {data_type}"
                at = f"{where}.data_type"
                yield config.finding("tensor-type", "error", at, said, fix, source)
            yield from _dims(model, kind, tensor, where, provided, graph)
        elif tensor.name:
            said = f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: "
            said, fix = said + ", ".join(sorted(known)), "call it as the graph does"
            yield config.finding("tensor-name", "error", f"{where}.name", said, fix, source)


def _dims(
    model: ModelFolder, kind: str, tensor: Any, where: str, provided: Tensor, graph: Graph
) -> Iterator[Finding]:
    """Compare shapes as the backend does: outputs must be equal, inputs may be more specific."""
    config, shape = model.config, list(provided.shape)
    gathered = {name for one in config.message.batch_output for name in one.target_name}
    if provided.kind != "tensor_type" or not tensor.dims or tensor.name in gathered:
        return
    is_input, is_batched = kind == "input", model.max_batch_size > 0
    field, source = "dims", f"{BACKEND} Validate{kind.title()}s"
    dims, name = list(tensor.dims), f"tensor '{tensor.name}'"
    if tensor.HasField("reshape"):
        field, dims = "reshape", list(tensor.reshape.shape)
    at = f"{where}.{field}"
    if is_input and tensor.optional:
        if model.max_batch_size:
            said = f"optional input '{tensor.name}' is not supported for models that support "
            said, fix = f"{said}batching", "set max_batch_size: 0, or describe it as required"
            yield config.finding("tensor-dims", "error", at, said, fix, source)
    elif is_input and tensor.allow_ragged_batch:
        if shape != [-1]:
            said = "configuration expects model provides input with shape [-1] for ragged input "
            said, fix = (
                f"{said}'{tensor.name}', model provides {shape}",
                "leave allow_ragged_batch out",
            )
            yield config.finding("tensor-dims", "error", at, said, fix, source)
    elif not shape:
        if any(dim != 1 for dim in dims):
            said = f"scalar {name}, should only provide 1 in the model configuration"
            yield config.finding("tensor-dims", "error", at, said, "write dims: 1", source)
    elif is_batched and shape[0] != -1:
        said = f"{name}: for the model to support batching the shape should have at least 1 "
        said += "dimension and the first dimension must be -1; but shape expected by the model is "
        said += str(shape)
        fix = "export it with a dynamic batch axis, or set max_batch_size: 0 and the whole shape"
        yield config.finding("batch-axis", "error", where, said, fix, COMPARE)
    else:
        full = [-1, *dims] if is_batched else dims
        pairs = zip(full, shape, strict=False)
        may_match = len(full) == len(shape) and all(of in (-1, ours) for ours, of in pairs)
        if full == shape or (is_input and may_match):
            return
        note = " (an initial batch dimension because max_batch_size > 0)" if is_batched else ""
        said = f"{name}: the model expects {len(shape)} dimensions (shape {shape}) but the model "
        said += f"configuration specifies {len(full)} dimensions (shape {full}){note}"
        # ONNX Runtime may know the size of a computed dimension that is unknown (-1) to us.
        level: Level = "warning" if may_match and graph.computes_shapes else "error"
        fix = f"write dims: {shape[1:] if is_batched else shape}"
        if is_batched and dims == shape:
            fix = f"leave the batch out: dims: {shape[1:]}"
        elif not is_batched and shape[0] == -1 and len(shape) == len(dims) + 1:
            fix = "set max_batch_size, since the dims leave the batch out"
        yield config.finding("tensor-dims", level, at, said, fix, COMPARE)


def completion(model: ModelFolder, version: int) -> Iterator[Finding]:
    """Check that Triton can fill in what the config does not describe."""
    message, graph = model.config.message, model.graphs[version]
    if model.is_complete:
        return
    if message.max_batch_size > 0 and not graph.can_batch:
        said = f"autofill failed for model '{model.folder.name}': model does not support batching "
        said += "while non-zero max_batch_size is specified"
        fix = "export it with a dynamic batch axis, or leave max_batch_size out"
        at, source = "max_batch_size", f"{BACKEND} AutoCompleteMaxBatch"
        yield model.config.finding("batch-axis", "error", at, said, fix, source)
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for tensor in tensors.values() if not getattr(message, kind) else ():
            if tensor.data_type == "TYPE_INVALID" or 0 in tensor.shape:
                said = f"model {kind} '{tensor.name}' has a type or a shape that Triton has no word"
                fix = "export it with another type"
                yield Finding("tensor-type", "error", graph.path, f"{said} for", fix, source=UTILS)


def opset_and_ir(model: ModelFolder, version: int, wanted: Target | None) -> Iterator[Finding]:
    """Check opset and IR version against the Triton release, and for operators of other domains."""
    graph = model.graphs[version]
    oldest = loaded_by(graph.opset, graph.ir_version)
    asked = wanted or target(NEWEST)
    if graph.opset > asked.opset or graph.ir_version > asked.ir_version:
        said = f"opset {graph.opset}, IR {graph.ir_version}: Triton {asked.releases} has ONNX "
        said += f"Runtime {asked.onnxruntime}, which loads opset {asked.opset}, "
        said += f"IR {asked.ir_version} at most"
        later = f", or serve it with {oldest.releases} or later" if oldest else ""
        fix = f"export it with --target-triton {asked.releases}{later}"
        yield Finding("dialect", "error", graph.path, said, fix, source=FILE)
    if 0 < graph.opset < OLDEST_OPSET:
        said = f"ONNX Runtime lacks operators of opsets below {OLDEST_OPSET}, this has "
        fix = "convert it with onnx.version_converter, or try it with --live"
        yield Finding("dialect", "warning", graph.path, f"{said}{graph.opset}", fix, source=FILE)
    if graph.foreign and not model.config.message.model_operations.op_library_filename:
        said = f"operators of domain {', '.join(sorted(graph.foreign))} are not registered"
        fix = "name their library in model_operations, or export it without them"
        yield Finding("operators", "error", graph.path, said, fix, source=FILE)
