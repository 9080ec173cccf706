"""The rules of Triton's core for any config, independent of the model, with Triton's messages."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from tritonclient.grpc import model_config_pb2

from pipeline.core import machine
from pipeline.core.text import format_count
from pipeline.repository import config_pbtxt
from pipeline.repository.lint.files import ModelFolder
from pipeline.repository.lint.text import Finding, Level, Problems

CORE = "core src/model_config_utils.cc"
VALIDATE = f"{CORE} ValidateModelConfig"
INITIALIZE = "core src/model_repository_manager/model_repository_manager.cc InitializeModelInfo"
KINDS = model_config_pb2.ModelInstanceGroup
INPUTS = "onnxruntime_backend src/onnxruntime.cc ValidateInputs"
LONGEST_DELAY = 1_000_000  # microseconds that a request may wait for others without a warning
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


def check_name(model: ModelFolder) -> Iterator[Finding]:
    """Check the model's name, and that its platform fits its backend."""
    config, message, folder = model.config, model.config.message, model.folder.name
    if message.name and message.name != folder:
        problem = f"unexpected directory name '{folder}' for model '{message.name}'"
        fix = f'write name: "{folder}", or rename the folder'
        yield config.finding("name", "name", problem, fix, INITIALIZE)
    if message.platform not in ("", ONNX_PLATFORM) and message.backend == "onnxruntime":
        problem = f"unexpected 'platform' and 'backend' pair, got:{message.platform}, onnxruntime"
        fix = f'leave platform out, or write "{ONNX_PLATFORM}"'
        yield config.finding("backend", "platform", problem, fix, VALIDATE)


def check_batching(model: ModelFolder) -> Iterator[Finding]:
    """Check the largest batch size and the batcher's preferred sizes."""
    config, message = model.config, model.config.message
    largest = message.max_batch_size
    if largest < 0:
        problem = f"'max_batch_size' must be non-negative value for {model.folder.name}"
        yield config.finding("max-batch-size", "max_batch_size", problem, "write 0", VALIDATE)
    for field, batcher in (
        ("dynamic_batching", message.dynamic_batching),
        ("sequence_batching.oldest", message.sequence_batching.oldest),
        ("sequence_batching.direct", message.sequence_batching.direct),
    ):
        for index, size in enumerate(getattr(batcher, "preferred_batch_size", ())):
            if not 0 < size <= largest:
                rule = "be positive" if size <= 0 else "be <= max batch size"
                kind, at = field.partition("_")[0], f"{field}.preferred_batch_size[{index}]"
                problem = f"{kind} batching preferred size must {rule}, got {size}"
                fix = f"use sizes from 1 to {largest}" if largest > 0 else "set max_batch_size"
                yield config.finding("preferred-sizes", at, problem, fix, VALIDATE)
        if (delay := batcher.max_queue_delay_microseconds) > LONGEST_DELAY:
            problem = f"a request waits for {delay / 1e6:,.0f} s unless others fill its batch"
            at, fix = f"{field}.max_queue_delay_microseconds", "write microseconds, such as 100"
            yield config.finding("queue-delay", at, problem, fix, level="warning")
    # If the config is not complete, Triton fills in max_batch_size.
    if message.HasField("dynamic_batching") and 0 <= largest <= 1 and model.is_complete:
        problem = f"dynamic_batching has no effect with a max_batch_size of {largest}"
        fix = "raise max_batch_size, or leave dynamic_batching out"
        yield config.finding("no-batching", "dynamic_batching", problem, fix, level="warning")


def check_scheduling(model: ModelFolder) -> Iterator[Finding]:
    """Check the priorities and the response cache."""
    message, batcher = model.config.message, model.config.message.dynamic_batching
    finding, levels = partial(model.config.finding, "scheduling"), batcher.priority_levels
    if levels and not 1 <= batcher.default_priority_level <= levels:
        at, fix = "dynamic_batching.priority_levels", "set default_priority_level"
        problem = f"default priority level must be in range [1, {levels}]"
        yield finding(at, problem, fix, VALIDATE)
    for level in batcher.priority_queue_policy:
        if levels and not 1 <= level <= levels:
            problem = f"priority queue policy must have priority level in range [1, {levels}]"
            at = f"dynamic_batching.priority_queue_policy[{level}]"
            yield finding(at, problem, "choose another level", VALIDATE)
    if batcher.preserve_ordering and levels > 1:
        problem = "Only one priority level is allowed when 'preserve_ordering' is true"
        yield finding("dynamic_batching.preserve_ordering", problem, "leave one out", VALIDATE)
    for is_used, feature in (
        (message.HasField("sequence_batching"), "sequence batching scheduler"),
        (message.model_transaction_policy.decoupled, "'decoupled' transaction policy"),
    ):
        if message.response_cache.enable and is_used:
            problem = f"Response Cache does not currently support a model with {feature}"
            yield finding("response_cache", problem, "disable the response cache", VALIDATE)


def check_tensors(model: ModelFolder) -> Iterator[Finding]:
    """Check each input and output by itself, and that no name is described twice."""
    message = model.config.message
    for kind, tensor, where in list_tensors(model):
        for field, problem, fix in _check_tensor(kind, tensor, message.max_batch_size):
            at, source = f"{where}.{field}", f"{CORE} ValidateModel{kind.title()}"
            yield model.config.finding("tensor", at, problem, fix, source)
    for kind in ("input", "output"):
        names = [tensor.name for tensor in getattr(message, kind)]
        level: Level = "error" if kind == "input" else "warning"
        for index, name in enumerate(names):
            if name and name in names[:index]:
                at, problem = f"{kind}[{index}]", f"the {kind} '{name}' is described twice"
                yield model.config.finding("tensor", at, problem, "describe it once", INPUTS, level)


def list_tensors(model: ModelFolder) -> Iterator[tuple[str, Any, str]]:
    """Yield each tensor of the config: "input" or "output", the message, and its field path."""
    for kind in ("input", "output"):
        for index, tensor in enumerate(getattr(model.config.message, kind)):
            yield kind, tensor, f"{kind}[{index}]"


def _check_tensor(kind: str, tensor: Any, largest: int) -> Problems:
    named = f"model {kind} '{tensor.name}'"
    if not tensor.name:
        yield "", f"model {kind} must specify 'name'", "name it as the model does"
    if not tensor.data_type:
        yield "", f"{named} must specify 'data_type'", "such as data_type: TYPE_FP32"
    if not tensor.dims:
        yield "", f"{named} must specify 'dims'", "give the shape without the batch"
    for index, dim in enumerate(tensor.dims):
        if dim < 1 and dim != -1:
            problem = f"{named} dimension must be integer >= 1, or -1, got {dim}"
            yield f"dims[{index}]", problem, "write -1 for a variable size"
    shape = list(tensor.reshape.shape)
    if tensor.HasField("reshape") and (problem := _find_misfit(tensor.dims, shape, largest)):
        yield "reshape", f"{named} {problem}", "give both the same number of elements"
    pictures = model_config_pb2.ModelInput
    formats = (pictures.FORMAT_NHWC, pictures.FORMAT_NCHW)
    if kind == "input" and tensor.format in formats and len(tensor.dims) != 3:
        problem = f"model input NHWC/NCHW require 3 dims, '{tensor.name}' has {len(tensor.dims)}"
        yield "format", problem, "leave format out"
    for field, feature in (
        ("is_shape_tensor", "shape tensors are"),
        ("is_non_linear_format_io", "Non-linear IO format is"),
    ):
        if getattr(tensor, field):
            yield field, f"{feature} only supported for the TensorRT platform", "leave it out"


def _find_misfit(dims: Sequence[int], shape: Sequence[int], largest: int) -> str:
    """Return why `dims` cannot be reshaped to `shape`; "" if they can."""
    if not shape and largest == 0:
        return "cannot have empty reshape for non-batching model"
    if any(dim < 1 and dim != -1 for dim in shape):
        return "reshape dimensions must be integer >= 1, or -1"
    fixed, reshaped = _count_elements(dims), _count_elements(shape)
    if len(fixed) != len(reshaped):
        return "has different number of variable-size dimensions for dims and reshape"
    return "has different size for dims and reshape" if fixed != reshaped else ""


def _count_elements(dims: Sequence[int]) -> list[int]:
    """Return the numbers of elements before, between and after the variable-size dimensions."""
    counts = [1]
    for dim in dims:
        counts = [*counts, 1] if dim == -1 else [*counts[:-1], counts[-1] * dim]
    return counts


def check_instances(model: ModelFolder) -> Iterator[Finding]:
    """Check the instance groups, and that all threads together fit this machine's cores."""
    config, message, source = model.config, model.config.message, f"{CORE} ValidateInstanceGroup"
    groups = [group for group in message.instance_group if not group.passive]
    for index, group in enumerate(message.instance_group):
        kind, at = KINDS.Kind.Name(group.kind), f"instance_group[{index}]"
        if group.gpus and kind in ("KIND_CPU", "KIND_MODEL"):
            problem = f"instance group has kind {kind} but specifies one or more GPUs"
            fix = "leave gpus out, or write kind: KIND_GPU"
            yield config.finding("instance-group", f"{at}.gpus", problem, fix, source)
        if group.passive:
            level: Level = "warning" if groups else "error"
            problem = "passive instances never run; without others, a request kills the server"
            fix, field, caller = "leave passive out", f"{at}.passive", "core src/rate_limiter.cc"
            yield config.finding("instance-group", field, problem, fix, caller, level)
        if group.profile:
            problem = "specifies profile field which is only supported for TensorRT models"
            fix = "leave it out; the TensorRT accelerator has trt_profile_* parameters"
            yield config.finding("instance-group", f"{at}.profile", problem, fix, source)
    count = sum(max(g.count, 0) or CPU_COUNT for g in groups if g.kind == KINDS.KIND_CPU)
    sessions = count * max(1, len(model.selected))
    cores, threads = machine.cores(), config_pbtxt.thread_count(message)
    if sessions * (threads or cores) > cores and (sessions > 1 or threads > cores):
        each = format_count(threads, "thread") if threads else "a thread for each core"
        problem = f"{format_count(sessions, 'instance')} with {each} for the {cores} cores here"
        fix = f"set intra_op_thread_count to {max(1, cores // max(1, sessions))}, or lower count"
        at = "parameters[intra_op_thread_count]" if threads else "instance_group"
        yield config.finding("threads", at, problem, fix, level="warning")


def check_labels(model: ModelFolder) -> Iterator[Finding]:
    """Check that label files exist in the model's folder and fit the classes."""
    for index, output in enumerate(model.config.message.output):
        path, problem = model.folder / output.label_filename, ""
        if not output.label_filename:
            continue
        if not path.resolve().is_relative_to(model.folder.resolve()):
            problem = f"label file path '{output.label_filename}' is outside model directory"
            fix, source = "put the file into the model's folder", "core src/model.cc Init"
        elif not path.is_file():
            problem = f"failed to open text file for read {output.label_filename}"
            fix = "write a file with one label on each line, or leave label_filename out"
            source = "core src/label_provider.cc AddLabels"
        if problem:
            at = f"output[{index}].label_filename"
            yield model.config.finding("labels", at, problem, fix, source)
        if problem or not output.dims or -1 in output.dims:
            continue
        lines, classes = path.read_bytes().split(b"\n"), math.prod(output.dims)
        count = len(lines) - (not lines[-1])
        problem = f"has {count} labels for the {classes} classes of '{output.name}'"
        if count < classes:
            problem += "; Triton's classification extension gives the other classes empty labels"
            fix = "write one label a line"
            yield Finding("labels", "error", path, problem, fix, count or None)
        elif count > classes:
            fix = "check that line n is the label of class n - 1"
            yield Finding("labels", "warning", path, problem, fix, classes + 1)
        elif any(line.endswith(b"\r") for line in lines):
            problem = "has Windows line ends, which Triton keeps as part of the labels"
            yield Finding("labels", "warning", path, problem, "save it with Unix line ends", 1)
