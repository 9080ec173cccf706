"""Warm-up and parameters of a config, as Triton and its onnxruntime backend read them."""

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from tritonclient.grpc import model_config_pb2

from pipeline.repository.config_pbtxt import MIN_PROBABILITY
from pipeline.repository.lint.config import KINDS
from pipeline.repository.lint.files import Model
from pipeline.repository.lint.text import Finding, Level

WARMUP = "core src/backend_model_instance.cc GenerateWarmupData"
BACKEND = "onnxruntime_backend src/onnxruntime.cc"
SIZES = {"BOOL": 1, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}
SIZES |= {f"{sign}INT{bits}": bits // 8 for sign in ("", "U") for bits in (8, 16, 32, 64)}

Problems = Iterator[tuple[str, str, str]]  # at which field, what is wrong, and the fix


def type_name(number: int) -> str:
    """Triton's name of a data type; TYPE_INVALID for a number that has none."""
    names = model_config_pb2.DataType
    return str(names.Name(number)) if number in names.values() else "TYPE_INVALID"


def warmups(model: Model) -> Iterator[Finding]:
    """The requests that each instance answers before it is ready."""
    config, largest = model.config, max(1, model.max_batch_size)
    for index, sample in enumerate(config.message.model_warmup):
        at, called = f"model_warmup[{index}]", f"warmup sample '{sample.name}'"
        if sample.batch_size == 0:
            said = f"{called} has no batch_size: Triton skips it"
            yield config.finding("warmup", "warning", at, said, "write batch_size: 1", WARMUP)
            continue
        if sample.batch_size > largest:
            said = f"batch size {sample.batch_size} of {called}, max allowed is {largest}"
            fix, source = f"take at most {largest}", f"{BACKEND} ProcessRequests"
            yield config.finding("warmup-batch", "error", f"{at}.batch_size", said, fix, source)
        for field, said, fix in _sample(model, sample):
            yield config.finding(
                "warmup", "error", f"{at}{field}", f"{called}: {said}", fix, WARMUP
            )


def _sample(model: Model, sample: Any) -> Problems:
    """What is wrong with the inputs of a warm-up sample: at which field, what, and the fix."""
    given = {tensor.name: tensor for tensor in model.config.message.input}
    for tensor in given.values():
        if not tensor.optional and tensor.name not in sample.inputs:
            yield "", f"missing required input(s) ['{tensor.name}']", "give every input"
    for name, entry in sample.inputs.items():
        if given and name not in given and not model.config.message.HasField("sequence_batching"):
            said = f"unexpected inference input '{name}'"
            yield f".inputs[{name}]", said, f"the inputs are: {', '.join(given)}"
        for field, said, fix in _entry(model, name, entry, given.get(name)):
            yield f".inputs[{name}].value.{field}", said, fix


def _entry(model: Model, name: str, entry: Any, tensor: Any) -> Problems:
    """What is wrong with one input of a warm-up sample: at which field, what, and the fix."""
    kind, dims = type_name(entry.data_type), list(entry.dims)
    if tensor is not None and entry.data_type != tensor.data_type:
        wanted = type_name(tensor.data_type)
        yield "data_type", f"input '{name}' is {wanted}, its warmup {kind}", f"write {wanted}"
    if any(dim < 1 for dim in dims):
        said = f"warmup setting expects all variable-size dimensions are specified for '{name}'"
        yield "dims", said, "write the numbers of one real request, without the batch"
        return
    if tensor is not None and not _fits(dims, list(tensor.dims)):
        said = f"input '{name}' has dims {list(tensor.dims)}, its warmup {dims}"
        yield "dims", said, "write them without the batch"
    if not entry.WhichOneof("input_data_type"):
        said = f"warmup setting expects input '{name}' to have input_data_type set"
        yield "", said, "add zero_data: true, random_data: true or input_data_file"
    file = entry.input_data_file
    if not file:
        return
    path = model.folder / "warmup" / file
    if not path.is_file():
        said = f"failed to open text file for read warmup/{file}"
        yield "input_data_file", said, f"write the request's bytes to {path}"
        return
    needed = math.prod(dims) * SIZES.get(kind.removeprefix("TYPE_"), 0)
    if path.stat().st_size < needed:
        said = f"warmup setting expects {needed} bytes, but the data provided from {file} only has "
        yield "input_data_file", f"{said}{path.stat().st_size} bytes", "write a whole request"


def _fits(dims: list[int], allowed: list[int]) -> bool:
    pairs = zip(dims, allowed, strict=False)
    return len(dims) == len(allowed) and all(dim == of or of == -1 for dim, of in pairs)


SWITCHES = ("true", "on", "1", "false", "off", "0")
_NUMBERS = ("execution_mode", "intra_op_thread_count", "inter_op_thread_count")
_TEXTS = ("memory.enable_memory_arena_shrinkage", "session.use_device_allocator_for_initializers")
_FLAGS = ("enable_mem_arena", "enable_mem_pattern")
_FOR_CUDA = {"cudnn_conv_algo_search": 2, "arena_extend_strategy": 1}  # the largest that it knows
OF_CUDA = (*_FOR_CUDA, "gpu_mem_limit", "do_copy_in_default_stream")
KNOWN = (*_NUMBERS, *_FLAGS, *_TEXTS, *OF_CUDA)


def parameters(model: Model) -> Iterator[Finding]:
    """The parameters that the backend reads. All others are free to say anything."""
    config, on_gpu = model.config, runs_on_gpu(model.config.message)
    for key, holder in config.message.parameters.items():
        at, said = f"parameters[{key}]", _parameter(key, holder.string_value)
        if said:
            level: Level = "warning" if key in _FOR_CUDA and not on_gpu else "error"
            source = f"{BACKEND} {'LoadModel' if key in _FOR_CUDA else 'ModelState'}"
            yield config.finding("parameters", level, at, said, 'such as "1"', source)
        elif key not in KNOWN and (close := difflib.get_close_matches(key, KNOWN, 1, 0.85)):
            said = f"the backend does not know the parameter {key} and ignores it"
            yield config.finding("parameters", "warning", at, said, f"did you mean {close[0]}?")
    level_of_graph = config.message.optimization.graph.level
    if level_of_graph not in (-1, 0, 1, 2):
        said = f"the backend does not know the graph level {level_of_graph} and ignores it"
        fix = "-1 is basic, 1 extended, 2 none"
        yield config.finding("parameters", "warning", "optimization.graph.level", said, fix)


def threshold(model: Model) -> Iterator[Finding]:
    """The probability below which our clients say that the model is not sure."""
    for key, holder in model.config.message.parameters.items():
        if key.partition(".")[0] == MIN_PROBABILITY and not _is_share(holder.string_value):
            said = f"'{holder.string_value}' is no probability, and clients take 0 for it"
            at, fix = f"parameters[{key}]", "write a number from 0 to 1, or package the model again"
            yield model.config.finding("min-probability", "error", at, said, fix)


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _parameter(key: str, value: str) -> str:
    """What is wrong with the value of a parameter that the backend reads; empty when nothing."""
    if key in _FLAGS and value.lower() not in SWITCHES:
        return f"failed to convert '{value}' to boolean, as {key}"
    if key not in (*_NUMBERS, *_FOR_CUDA):
        return ""
    number = re.match(r"\s*([+-]?\d+)", value)
    if not number:
        return f"failed to convert '{value}' to integral number, as {key}"
    largest = {"execution_mode": 1, **_FOR_CUDA}.get(key)
    if largest is not None and not 0 <= int(number[1]) <= largest:
        return f"unsupported {key} value '{value}', expected are 0 to {largest}"
    return ""


def runs_on_gpu(message: Any) -> bool:
    """Whether some instance is asked to be on a GPU, wherever the server is."""
    return any(group.kind == KINDS.KIND_GPU for group in message.instance_group)


def may_run_on_gpu(message: Any) -> bool:
    """Whether some instance would be on a GPU where there is one."""
    kinds = {group.kind for group in message.instance_group} or {KINDS.KIND_AUTO}
    return bool(kinds & {KINDS.KIND_GPU, KINDS.KIND_AUTO})
