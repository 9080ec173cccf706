"""The rules of Triton's core for any config, independent of the model, with Triton's messages."""

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2

from pipeline.core import machine
from pipeline.repository import config_pbtxt
from pipeline.repository.lint.files import ModelFolder
from pipeline.repository.lint.text import Finding, Level

CORE = "core src/model_config_utils.cc"
VALIDATE = f"{CORE} ValidateModelConfig"
INITIALIZE = "core src/model_repository_manager/model_repository_manager.cc InitializeModelInfo"
KINDS = model_config_pb2.ModelInstanceGroup
INPUTS = "onnxruntime_backend src/onnxruntime.cc ValidateInputs"
CPU_COUNT = 2  # instances that Triton starts for KIND_CPU without a count
ONNX_PLATFORM = "onnxruntime_onnx"
# Backends in NVIDIA's container, which lint does not check.
OTHER_BACKENDS = frozenset(
    {"dali", "ensemble", "fil", "identity", "openvino", "python", "pytorch", "repeat", "square"}
    | {"tensorflow", "tensorrt", "tensorrtllm", "vllm"}
    # Platforms: older names for backends.
    | {"libtorch", "pytorch_libtorch", "tensorflow_graphdef", "tensorflow_savedmodel"}
    | {"tensorrt_plan", "torch_aoti"}
)


def naming(model: ModelFolder) -> Iterator[Finding]:
    """Check the model's name, and that its platform fits its backend."""
    config, message, folder = model.config, model.config.message, model.folder.name
    if message.name and message.name != folder:
        said = f"unexpected directory name '{folder}' for model '{message.name}', "
        said += "directory name must equal model name"
        fix = f'write name: "{folder}", or rename the folder'
        yield config.finding("name", "error", "name", said, fix, INITIALIZE)
    if message.platform not in ("", ONNX_PLATFORM) and message.backend == "onnxruntime":
        said = "unexpected 'platform' and 'backend' pair, got:"
        said += f"{message.platform}, {message.backend}"
        fix = f'leave platform out, or write "{ONNX_PLATFORM}"'
        yield config.finding("backend", "error", "platform", said, fix, VALIDATE)


def batching(model: ModelFolder) -> Iterator[Finding]:
    """Check the largest batch size and the batcher's preferred sizes."""
    config, message = model.config, model.config.message
    largest = message.max_batch_size
    if largest < 0:
        said = f"'max_batch_size' must be non-negative value for {model.folder.name}"
        fix = "0 means that the model takes no batches"
        yield config.finding("max-batch-size", "error", "max_batch_size", said, fix, VALIDATE)
    for where, sizes in (
        ("dynamic_batching", message.dynamic_batching.preferred_batch_size),
        ("sequence_batching.oldest", message.sequence_batching.oldest.preferred_batch_size),
    ):
        for index, size in enumerate(sizes):
            if not 0 < size <= largest:
                rule = "be positive" if size <= 0 else "be <= max batch size"
                said = f"{where.partition('_')[0]} batching preferred size must {rule}, got {size}"
                fix = f"take sizes from 1 to {largest}" if largest > 0 else "set max_batch_size"
                at = f"{where}.preferred_batch_size[{index}]"
                yield config.finding("preferred-sizes", "error", at, said, fix, VALIDATE)
    # If the config is not complete, Triton fills in max_batch_size.
    if message.HasField("dynamic_batching") and 0 <= largest <= 1 and model.is_complete:
        said = f"nothing is ever batched with a max_batch_size of {largest}"
        fix = "raise max_batch_size, or leave dynamic_batching out"
        yield config.finding("no-batching", "warning", "dynamic_batching", said, fix)


def scheduling(model: ModelFolder) -> Iterator[Finding]:
    """Check the priorities and the response cache."""
    message, batcher = model.config.message, model.config.message.dynamic_batching
    levels = batcher.priority_levels
    wrong = []
    if levels and not 1 <= batcher.default_priority_level <= levels:
        said = f"default priority level must be in range [1, {levels}]"
        wrong.append(("dynamic_batching.priority_levels", said, "set default_priority_level"))
    for level in batcher.priority_queue_policy:
        if levels and not 1 <= level <= levels:
            said = f"priority queue policy must have priority level in range [1, {levels}]"
            at = f"dynamic_batching.priority_queue_policy[{level}]"
            wrong.append((at, said, "choose another level"))
    if batcher.preserve_ordering and levels > 1:
        said = "Only one priority level is allowed when 'preserve_ordering' is true"
        wrong.append(("dynamic_batching.preserve_ordering", said, "leave one of them out"))
    for is_used, what in (
        (message.HasField("sequence_batching"), "sequence batching scheduler"),
        (message.model_transaction_policy.decoupled, "'decoupled' transaction policy"),
    ):
        if message.response_cache.enable and is_used:
            said = f"Response Cache does not currently support a model with {what}"
            wrong.append(("response_cache", said, "disable the response cache"))
    for at, said, fix in wrong:
        yield model.config.finding("scheduling", "error", at, said, fix, VALIDATE)


def tensors(model: ModelFolder) -> Iterator[Finding]:
    """Check each input and output by itself, and that no name is described twice."""
    for kind, tensor, where in model_tensors(model):
        for field, said, fix in _tensor(kind, tensor, model.config.message.max_batch_size):
            at = f"{where}.{field}" if field else where
            yield model.config.finding(
                "tensor", "error", at, said, fix, f"{CORE} ValidateModel{kind.title()}"
            )
    for kind in ("input", "output"):
        names = [tensor.name for tensor in getattr(model.config.message, kind)]
        level: Level = "error" if kind == "input" else "warning"
        for index, name in enumerate(names):
            if name and name in names[:index]:
                at, said = f"{kind}[{index}]", f"the {kind} '{name}' is described twice"
                yield model.config.finding("tensor", level, at, said, "describe each once", INPUTS)


def model_tensors(model: ModelFolder) -> Iterator[tuple[str, Any, str]]:
    """Yield each tensor of the config: "input" or "output", the message, and its field path."""
    for kind in ("input", "output"):
        for index, tensor in enumerate(getattr(model.config.message, kind)):
            yield kind, tensor, f"{kind}[{index}]"


def _tensor(kind: str, tensor: Any, largest: int) -> Iterator[tuple[str, str, str]]:
    """Yield the problems of one tensor: (field, what is wrong, fix)."""
    called = f"model {kind} '{tensor.name}' "
    if not tensor.name:
        yield "", f"model {kind} must specify 'name'", "name it as the model does"
    if not tensor.data_type:
        yield "", f"{called}must specify 'data_type'", "such as data_type: TYPE_FP32"
    if not tensor.dims:
        yield "", f"{called}must specify 'dims'", "give the shape without the batch"
    for index, dim in enumerate(tensor.dims):
        if dim < 1 and dim != -1:
            said = "dimension must be integer >= 1, or -1 to indicate a variable-size dimension"
            yield f"dims[{index}]", f"{called}{said}, got {dim}", "write -1 where it is open"
    shape = list(tensor.reshape.shape)
    if tensor.HasField("reshape") and (said := _misfit(list(tensor.dims), shape, largest)):
        yield "reshape", called + said, "both must hold as many elements"
    pictures = model_config_pb2.ModelInput
    formats = (pictures.FORMAT_NHWC, pictures.FORMAT_NCHW)
    if kind == "input" and tensor.format in formats and len(tensor.dims) != 3:
        said = f"model input NHWC/NCHW require 3 dims, '{tensor.name}' has {len(tensor.dims)}"
        yield "format", said, "leave format out"
    if tensor.is_shape_tensor:
        said = "shape tensors are only supported for TensorRT platform"
        yield "is_shape_tensor", said, "leave it out"
    if tensor.is_non_linear_format_io:
        said = "Non-linear IO format is only supported for the TensorRT platform"
        yield "is_non_linear_format_io", said, "leave it out"


def _misfit(dims: list[int], shape: list[int], largest: int) -> str:
    """Return why `dims` cannot be reshaped to `shape`; "" if they can."""
    if not shape and largest == 0:
        return (
            "cannot have empty reshape for non-batching model as scalar tensors are not supported"
        )
    if any(dim < 1 and dim != -1 for dim in shape):
        return "reshape dimensions must be integer >= 1, or -1"
    if dims.count(-1) != shape.count(-1):
        return "has different number of variable-size dimensions for dims and reshape"
    if _chunks(dims) != _chunks(shape):
        return "has different size for dims and reshape"
    return ""


def _chunks(dims: list[int]) -> list[int]:
    """Return the numbers of elements before, between and after the variable-size dimensions."""
    found = [1]
    for dim in dims:
        found = [*found, 1] if dim == -1 else [*found[:-1], found[-1] * dim]
    return found


def instances(model: ModelFolder) -> Iterator[Finding]:
    """Check the instance groups, and that all threads together fit this machine's cores."""
    config, source = model.config, f"{CORE} ValidateInstanceGroup"
    message = config.message
    for index, group in enumerate(message.instance_group):
        kind, at = KINDS.Kind.Name(group.kind), f"instance_group[{index}]"
        if group.gpus and kind in ("KIND_CPU", "KIND_MODEL"):
            said = f"instance group of model {model.folder.name} has kind {kind} but specifies one "
            said += "or more GPUs"
            fix = "leave gpus out, or write kind: KIND_GPU"
            yield config.finding("instance-group", "error", f"{at}.gpus", said, fix, source)
        if group.profile:
            said = "specifies profile field which is only supported for TensorRT models"
            fix = "leave it out; the TensorRT accelerator has trt_profile_* parameters"
            yield config.finding("instance-group", "error", f"{at}.profile", said, fix, source)
    on_cpu = (group for group in message.instance_group if group.kind == KINDS.KIND_CPU)
    count = sum(group.count if group.count > 0 else CPU_COUNT for group in on_cpu)
    sessions = count * max(1, len(model.selected))
    text = config_pbtxt.parameter(message, "intra_op_thread_count") or ""
    cores, threads = machine.cores(), int(text) if text.isdecimal() else 0
    if sessions * (threads or cores) > cores and (sessions > 1 or threads > cores):
        each = f"{threads} threads" if threads else "a thread for each core"
        said = f"{sessions} instances with {each} share the {cores} cores here"
        fix = f"set intra_op_thread_count to {max(1, cores // max(1, sessions))}, or count lower"
        at = "parameters[intra_op_thread_count]" if threads else "instance_group"
        yield config.finding("threads", "warning", at, said, fix)


def labels(model: ModelFolder) -> Iterator[Finding]:
    """Check the label files against the number of classes."""
    for index, output in enumerate(model.config.message.output):
        path = model.folder / output.label_filename
        if not output.label_filename:
            continue
        said, fix, source = "", "", "core src/label_provider.cc AddLabels"
        if not path.resolve().is_relative_to(model.folder.resolve()):
            said = f"label file path '{output.label_filename}' is outside model directory"
            fix, source = "put the file into the model's folder", "core src/model.cc Init"
        elif not path.is_file():
            said = f"failed to open text file for read {output.label_filename}"
            fix = "write one label a line there, or leave label_filename out"
            if path.exists():
                fix = f"that is no file: remove it, and {fix}"
        if said:
            at = f"output[{index}].label_filename"
            yield model.config.finding("labels", "error", at, said, fix, source)
        elif output.dims and -1 not in output.dims:
            yield from _labels(path, output.name, math.prod(output.dims))


def _labels(path: Path, output: str, classes: int) -> Iterator[Finding]:
    lines = path.read_bytes().split(b"\n")
    count = len(lines) - (not lines[-1])
    said = f"has {count} labels for the {classes} classes of '{output}'"
    if count < classes:
        said += ": the classification extension answers with an empty label for the others"
        yield Finding("labels", "error", path, said, "write one label a line", count or None)
    elif count > classes:
        fix = "check that line n is the label of class n - 1"
        yield Finding("labels", "warning", path, said, fix, classes + 1)
    elif any(line.endswith(b"\r") for line in lines):
        said = "has Windows line ends, which Triton keeps as a part of the labels"
        yield Finding("labels", "warning", path, said, "save it with plain line ends", 1)


def backend_names(name: str) -> str:
    """Return the backend whose name is closest; "" if Triton has this backend, or none is close."""
    if name == "onnxruntime" or name in OTHER_BACKENDS:
        return ""
    if name.startswith("onnxruntime"):
        return "onnxruntime"
    close = difflib.get_close_matches(name, ["onnxruntime", *OTHER_BACKENDS], n=1)
    return close[0] if close else ""
