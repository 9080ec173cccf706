"""Rules for a config and its model's graph: names, types, shapes, batch axis, opset."""

from collections.abc import Iterator
from typing import Any

from pipeline.export.targets import NEWEST, OLDEST, find_oldest, target
from pipeline.repository.lint.backend import BACKEND, BF16_TENSORS, triton_type
from pipeline.repository.lint.config import INPUTS, list_tensors
from pipeline.repository.lint.files import ModelFolder
from pipeline.repository.lint.graph import FILE, Graph, Tensor
from pipeline.repository.lint.text import Finding, Level

UTILS = "onnxruntime_backend src/onnxruntime_utils.cc"
OLDEST_OPSET = 7  # ONNX Runtime has all operators from this opset on
COMPARE = f"{UTILS} CompareDimsSupported"


def check_described_tensors(model: ModelFolder, version: int) -> Iterator[Finding]:
    """Check the config's inputs and outputs against the graph of one version."""
    graph, config = model.graphs[version], model.config
    for actual in (*graph.inputs.values(), *graph.outputs.values()):
        if actual.kind != "tensor_type":
            onnx_type = f"ONNX_TYPE_{actual.kind.removesuffix('_type').upper()}"
            problem = f"Unsupported ONNX Type '{onnx_type}' for I/O '{actual.name}'"
            fix = "export it with tensors only (ZipMap off, for scikit-learn)"
            yield Finding("tensor-type", "error", graph.path, problem, fix, source=UTILS)
    message = config.message
    required = [tensor.name for tensor in message.input if not tensor.optional]
    expected, count = len(required) + len(message.batch_input), len(graph.inputs)
    # Either all inputs or no inputs must be described. Sequence batching adds its own inputs.
    is_described = message.input or message.batch_input
    if is_described and expected != count and not message.HasField("sequence_batching"):
        missing = ", ".join(sorted(set(graph.inputs) - set(required)))
        problem = f"configuration expects {expected} inputs, model provides {count}"
        fix = f"describe {missing} as well" if missing else "describe each input of the graph once"
        yield config.finding("tensor-count", "input[0]", problem, fix, INPUTS)
    for kind, tensor, at in list_tensors(model):
        source = f"{BACKEND} Validate{kind.title()}s"
        in_graph = {**graph.inputs, **graph.defaults} if kind == "input" else graph.outputs
        if tensor.name in in_graph:
            actual = in_graph[tensor.name]
            stated, data_type = triton_type(tensor.data_type), actual.data_type
            if actual.kind == "tensor_type" and stated != data_type and tensor.data_type:
                problem = f"configuration expects datatype {stated} for {kind} '{tensor.name}'"
                problem, fix = f"{problem}, model provides {data_type}", f"write {data_type}"
                yield config.finding("tensor-type", f"{at}.data_type", problem, fix, source)
            yield from _check_dims(model, kind, tensor, at, actual, graph)
        elif tensor.name:
            problem = f"unexpected inference {kind} '{tensor.name}'"
            fix = f"allowed {kind}s are: {', '.join(sorted(in_graph))}"
            yield config.finding("tensor-name", f"{at}.name", problem, fix, source)


def _check_dims(
    model: ModelFolder, kind: str, tensor: Any, where: str, actual: Tensor, graph: Graph
) -> Iterator[Finding]:
    """Compare shapes as the backend does: outputs must be equal, inputs may be more specific."""
    config, shape = model.config, list(actual.shape)
    gathered = {name for output in config.message.batch_output for name in output.target_name}
    if actual.kind != "tensor_type" or not tensor.dims or tensor.name in gathered:
        return
    is_input, is_batched = kind == "input", model.max_batch_size > 0
    is_reshaped, source = tensor.HasField("reshape"), f"{BACKEND} Validate{kind.title()}s"
    dims = list(tensor.reshape.shape if is_reshaped else tensor.dims)
    name, at = f"tensor '{tensor.name}'", f"{where}.{'reshape' if is_reshaped else 'dims'}"
    if is_input and tensor.optional:
        if model.max_batch_size:
            problem = f"optional input '{tensor.name}' is not supported for models with batching"
            fix = "set max_batch_size: 0, or describe it as required"
            yield config.finding("tensor-dims", at, problem, fix, source)
    elif is_input and tensor.allow_ragged_batch:
        if shape != [-1]:
            problem = f"ragged input '{tensor.name}' must have shape [-1], model provides {shape}"
            yield config.finding("tensor-dims", at, problem, "leave allow_ragged_batch out", source)
    elif not shape:
        if any(dim != 1 for dim in dims):
            problem = f"scalar {name}, should only provide 1 in the model configuration"
            yield config.finding("tensor-dims", at, problem, "write dims: 1", source)
    elif is_batched and shape[0] != -1:
        problem = f"{name}: the first dimension must be -1 for batching, the model has {shape}"
        fix = "export it with a dynamic batch axis, or set max_batch_size: 0 and the whole shape"
        yield config.finding("batch-axis", where, problem, fix, COMPARE)
    else:
        full = [-1, *dims] if is_batched else dims
        pairs = zip(full, shape, strict=False)
        may_match = len(full) == len(shape) and all(size in (-1, own) for own, size in pairs)
        if full == shape or (is_input and may_match):
            return
        note = ", with the batch dimension" if is_batched else ""
        problem = f"{name}: the model has shape {shape}, the configuration specifies {full}{note}"
        # ONNX Runtime may know the size of a computed dimension that is unknown (-1) to us.
        level: Level = "warning" if may_match and graph.computes_shapes else "error"
        fix = f"write dims: {shape[1:] if is_batched else shape}"
        if not is_batched and shape[0] == -1 and len(shape) == len(dims) + 1:
            fix = "set max_batch_size, because the dims leave the batch out"
        yield config.finding("tensor-dims", at, problem, fix, COMPARE, level)


def check_completion(model: ModelFolder, version: int) -> Iterator[Finding]:
    """Check that Triton can fill in what the config does not describe."""
    message, graph = model.config.message, model.graphs[version]
    if model.is_complete:
        return
    if message.max_batch_size > 0 and not graph.can_batch:
        problem = "autofill failed: model does not support batching"
        fix = "export it with a dynamic batch axis, or leave max_batch_size out"
        source = f"{BACKEND} AutoCompleteMaxBatch"
        yield model.config.finding("batch-axis", "max_batch_size", problem, fix, source)
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for tensor in tensors.values() if not getattr(message, kind) else ():
            if tensor.data_type == "TYPE_INVALID" or 0 in tensor.shape:
                problem = f"model {kind} '{tensor.name}' has a type or shape that Triton lacks"
                fix = "export it with another type"
                yield Finding("tensor-type", "error", graph.path, problem, fix, source=UTILS)


def check_dialect(model: ModelFolder, version: int) -> Iterator[Finding]:
    """Check opset, IR version and types against the Triton release, and custom operators.

    Without a release, state in a note which of them load the model, if not all do.
    """
    graph, release = model.graphs[version], model.target or target(NEWEST)
    oldest = find_oldest(graph.opset, graph.ir_version)
    types = {tensor.data_type for tensor in (*graph.inputs.values(), *graph.outputs.values())}
    has_bfloat16 = "TYPE_BF16" in types
    first = max(oldest.first if oldest else "", BF16_TENSORS * has_bfloat16)
    needs = f"opset {graph.opset}, IR {graph.ir_version}"
    if graph.opset > release.opset or graph.ir_version > release.ir_version:
        problem = f"{needs}: Triton {release.releases} has ONNX Runtime {release.onnxruntime}, "
        problem += f"which loads opset {release.opset}, IR {release.ir_version} at most"
        later = f", or serve it with {first} or later" if oldest else ""
        fix = f"export it with --target-triton {release.releases}{later}"
        yield Finding("dialect", "error", graph.path, problem, fix, source=FILE)
    elif release.first < first:
        problem = f"Triton {release.first} has no bfloat16 tensors: {first} is the first that has"
        fix = f"export it with float32 inputs and outputs, or serve it with {first} or later"
        yield Finding("tensor-type", "error", graph.path, problem, fix, source=UTILS)
    elif not model.target and first > OLDEST:
        problem = f"{needs}{', bfloat16' * has_bfloat16}: Triton {first} and later load it"
        fix = "name the release that will serve it with --target-triton"
        yield Finding("dialect", "note", graph.path, problem, fix, source=FILE)
    if 0 < graph.opset < OLDEST_OPSET:
        problem = f"opset {graph.opset} is below {OLDEST_OPSET}: ONNX Runtime lacks some operators"
        fix = "convert it with onnx.version_converter, or try it with --live"
        yield Finding("dialect", "warning", graph.path, problem, fix, source=FILE)
    if graph.foreign and not model.config.message.model_operations.op_library_filename:
        problem = f"operators of domain {', '.join(sorted(graph.foreign))} are not registered"
        fix = "name their library in model_operations, or export it without them"
        yield Finding("operators", "error", graph.path, problem, fix, source=FILE)
