"""Rules for a config's warm-up and parameters, as Triton and its onnxruntime backend read them.

Includes the options of CUDA and TensorRT, for which the native backend's source is the only
reference.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tritonclient.grpc import model_config_pb2

from pipeline.repository import config_pbtxt, ort_values
from pipeline.repository.config_pbtxt import MIN_PROBABILITY
from pipeline.repository.lint.config import KINDS
from pipeline.repository.lint.files import ModelFolder
from pipeline.repository.lint.text import Finding, Level, Problems

WARMUP = "core src/backend_model_instance.cc GenerateWarmupData"
BACKEND = "onnxruntime_backend src/onnxruntime.cc"
SIZES = {"BOOL": 1, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}
SIZES |= {f"{sign}INT{bits}": bits // 8 for sign in ("", "U") for bits in (8, 16, 32, 64)}


def triton_type(number: int) -> str:
    """Return Triton's name of a data type; TYPE_INVALID for an unknown number."""
    names = model_config_pb2.DataType
    return str(names.Name(number)) if number in names.values() else "TYPE_INVALID"


def check_warmups(model: ModelFolder) -> Iterator[Finding]:
    """Check the warm-up requests, which each instance answers before it is ready."""
    config, largest = model.config, max(1, model.max_batch_size)
    for index, sample in enumerate(config.message.model_warmup):
        at, named = f"model_warmup[{index}]", f"warmup sample '{sample.name}'"
        if sample.batch_size == 0:
            problem = f"{named} has no batch_size: Triton skips it"
            yield config.finding("warmup", at, problem, "write batch_size: 1", WARMUP, "warning")
            continue
        if sample.batch_size > largest:
            problem = f"batch size {sample.batch_size} of {named}, max allowed is {largest}"
            fix, source = f"use at most {largest}", f"{BACKEND} ProcessRequests"
            yield config.finding("warmup-batch", f"{at}.batch_size", problem, fix, source)
        for field, problem, fix in _check_sample(model, sample):
            yield config.finding("warmup", f"{at}{field}", f"{named}: {problem}", fix, WARMUP)


def _check_sample(model: ModelFolder, sample: Any) -> Problems:
    message = model.config.message
    inputs = {tensor.name: tensor for tensor in message.input}
    for tensor in inputs.values():
        if not tensor.optional and tensor.name not in sample.inputs:
            yield "", f"missing required input(s) ['{tensor.name}']", "give every input"
    for name, entry in sample.inputs.items():
        if inputs and name not in inputs and not message.HasField("sequence_batching"):
            fix = f"the inputs are: {', '.join(inputs)}"
            yield f".inputs[{name}]", f"unexpected inference input '{name}'", fix
        for field, problem, fix in _check_entry(model, name, entry, inputs.get(name)):
            yield f".inputs[{name}].value.{field}", problem, fix


def _check_entry(model: ModelFolder, name: str, entry: Any, tensor: Any) -> Problems:
    """Yield the problems of one input of a warm-up sample."""
    kind, dims = triton_type(entry.data_type), list(entry.dims)
    if tensor is not None and entry.data_type != tensor.data_type:
        expected = triton_type(tensor.data_type)
        yield "data_type", f"input '{name}' is {expected}, its warmup {kind}", f"write {expected}"
    if any(dim < 1 for dim in dims):
        problem = f"warmup setting expects all variable-size dimensions are specified for '{name}'"
        yield "dims", problem, "write the shape of one real request, without the batch"
        return
    if tensor is not None and not (
        len(dims) == len(tensor.dims)
        and all(allowed in (-1, dim) for dim, allowed in zip(dims, tensor.dims, strict=True))
    ):
        problem = f"input '{name}' has dims {list(tensor.dims)}, its warmup {dims}"
        yield "dims", problem, "write them without the batch"
    if not entry.WhichOneof("input_data_type"):
        problem = f"warmup setting expects input '{name}' to have input_data_type set"
        yield "", problem, "add zero_data: true, random_data: true or input_data_file"
    if not (file := entry.input_data_file):
        return
    path = model.folder / "warmup" / file
    needed = math.prod(dims) * SIZES.get(kind.removeprefix("TYPE_"), 0)
    if not path.is_file():
        problem = f"failed to open text file for read warmup/{file}"
        yield "input_data_file", problem, f"write the request's bytes to {path}"
    elif (size := path.stat().st_size) < needed:
        problem = f"warmup setting expects {needed} bytes, but {file} only has {size} bytes"
        yield "input_data_file", problem, "write a whole request"


OF_CUDA = [key for key in ort_values.PARAMETERS if key in ort_values.CUDA]
BF16_PRECISION, BF16_TENSORS = "26.02", "26.03"  # the first releases that have them
MOST_THREADS = 4096  # of a session; more take minutes to start, or do not start
_FIXES = dict.fromkeys(("switch", "flag"), 'write "true" or "false"')
_FIXES |= {"size": "write a plain number of bytes", "precision": "write FP32, FP16, BF16 or INT8"}


def check_parameters(model: ModelFolder) -> Iterator[Finding]:
    """Check the parameters that the backend reads, and names close to theirs; ignore all others."""
    config, on_gpu = model.config, runs_on_gpu(model.config.message)
    for key, holder in config.message.parameters.items():
        at, reader = f"parameters[{key}]", "LoadModel" if key in OF_CUDA else "ModelState"
        if key in ort_values.PARAMETERS:
            for problem, fix, level in _check_parameter(model, key, holder.string_value):
                unused: Level = "warning" if key in OF_CUDA and not on_gpu else level
                problem, source = f"{key}: {problem}", f"{BACKEND} {reader}"
                yield config.finding("parameters", at, problem, fix, source, unused)
            continue
        close = difflib.get_close_matches(key, ort_values.PARAMETERS, 1, 0.85)
        if close or key.startswith(("session.", "memory.", "ep.")):  # ONNX Runtime's own options
            problem = f"the backend ignores the parameter {key}"
            fix = f"did you mean {close[0]}?" if close else "leave it out"
            yield config.finding("parameters", at, problem, fix, level="warning")
    graph_level = config.message.optimization.graph.level
    if graph_level not in (-1, 0, 1, 2):
        problem = f"the backend ignores the level {graph_level} (-1 is basic, 1 extended, 2 none)"
        at, fix = "optimization.graph.level", "write 0 for all optimizations"
        yield config.finding("parameters", at, problem, fix, level="warning")


def _check_parameter(model: ModelFolder, key: str, value: str) -> Iterator[tuple[str, str, Level]]:
    """Yield what is wrong with the value of a parameter, how to fix it, and the level."""
    kind, message = ort_values.PARAMETERS[key], model.config.message
    if problem := ort_values.find_problem(kind, value):
        yield problem, _FIXES.get(kind.removeprefix("runtime "), 'such as "1"'), "error"
    elif key == ort_values.DEVICE_ALLOCATOR and value not in ("0", "1"):
        yield f"ONNX Runtime reads '{value}' as 0", 'write "1" or "0"', "warning"
    elif key == ort_values.SHRINKAGE and value:
        arena = config_pbtxt.parameter(message, "enable_mem_arena") or "on"
        has_arena = ort_values.SWITCHES.get(arena.lower(), True)
        names = r"cpu(:|:-?0+(:.*)?)?" * has_arena
        on_cpu = {KINDS.KIND_CPU} == {group.kind for group in message.instance_group}
        names += r"|gpu(:\d*)?" * (not on_cpu)
        for name in value.removesuffix(";").split(";"):
            if not re.fullmatch(names, name, re.ASCII):
                problem = f"every run fails, since '{name}' is not a memory arena of the model"
                fix = 'write "cpu:0"' if has_arena else "switch enable_mem_arena on"
                yield problem, fix, "error"
    elif kind == "number":
        (number, rest), choices = ort_values.read_integer(value), ort_values.CHOICES.get(key)
        if choices and number not in range(len(choices)):
            problem = f"unsupported value '{value}', expected are 0 to {len(choices) - 1}"
            yield problem, 'such as "1"', "error"
        elif key == "intra_op_thread_count" and number > MOST_THREADS:
            yield f"a session with {number} threads may never start", 'such as "1"', "error"
        elif rest.strip() or number < 0:
            meaning = f"{number}, and ignores the rest" if rest.strip() else "0, the default"
            fix = f'write "{max(0, number)}"'
            yield f"the backend reads '{value}' as {meaning}", fix, "warning"


def check_threshold(model: ModelFolder) -> Iterator[Finding]:
    """Check min_probability, below which our clients report that the model is not sure."""
    for key, holder in model.config.message.parameters.items():
        if key.partition(".")[0] != MIN_PROBABILITY:
            continue
        with contextlib.suppress(ValueError):
            if 0 <= float(holder.string_value) <= 1:
                continue
        problem = f"'{holder.string_value}' is not a probability, and clients ignore it"
        fix = "write a number from 0 to 1, or package the model again"
        yield model.config.finding("min-probability", f"parameters[{key}]", problem, fix)


def runs_on_gpu(message: Any) -> bool:
    """Return whether the config asks for an instance on a GPU, on any machine."""
    return any(group.kind == KINDS.KIND_GPU for group in message.instance_group)


# For each device and accelerator, the kinds of its parameters; without kinds, any parameter.
_ACCELERATORS: dict[str, dict[str, dict[str, str]]] = {
    "gpu": {"cuda": ort_values.CUDA, "tensorrt": ort_values.TENSORRT},
    "cpu": {"openvino": {}},
}
_PROFILES = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")


def check_accelerators(model: ModelFolder) -> Iterator[Finding]:
    """Check the accelerators and their options against the backend's source.

    Without a GPU, the source is the only reference for ort_values.CUDA and TensorRT.
    """
    config, source = model.config, f"{BACKEND} LoadModel"
    requested = config.message.optimization.execution_accelerators
    kinds = {group.kind for group in config.message.instance_group} or {KINDS.KIND_AUTO}
    may_be_on_gpu = bool(kinds & {KINDS.KIND_GPU, KINDS.KIND_AUTO})
    for device, supported in _ACCELERATORS.items():
        level: Level = "error" if device == "cpu" or may_be_on_gpu else "warning"
        field = f"{device}_execution_accelerator"
        for index, accelerator in enumerate(getattr(requested, field)):
            at = f"optimization.execution_accelerators.{field}[{index}]"
            for part, problem, fix in _check_accelerator(accelerator, supported, model):
                yield config.finding("accelerator", f"{at}.{part}", problem, fix, source, level)
            for key in OF_CUDA if (device, accelerator.name) == ("gpu", "cuda") else ():
                if key in accelerator.parameters:
                    place, fix = f"{at}.parameters[{key}]", "set it in the config's parameters"
                    problem = f"the backend overwrites {key} of the accelerator"
                    yield config.finding("accelerator", place, problem, fix, source, "warning")


def _check_accelerator(
    accelerator: Any, supported: Mapping[str, Mapping[str, str]], model: ModelFolder
) -> Problems:
    name, given = accelerator.name, dict(accelerator.parameters)
    if name not in supported:
        problem = f"unknown Execution Accelerator '{name}' is requested"
        yield "name", problem, f"there are: {', '.join(supported)}"
        return
    kind_of = supported[name]
    for key, value in given.items() if kind_of else ():
        if value == "BF16" and model.target and model.target.first < BF16_PRECISION:
            problem = f"Triton {model.target.first} has no BF16"
            yield f"parameters[{key}]", problem, f"serve with {BF16_PRECISION} or later"
        elif key not in kind_of:
            problem = f"unknown parameter '{key}' is provided for the accelerator '{name}'"
            close = difflib.get_close_matches(key, kind_of, 1)
            fix = f"did you mean {close[0]}?" if close else "leave it out"
            yield f"parameters[{key}]", problem, fix
        elif problem := ort_values.find_problem(kind_of[key], value):
            kind = kind_of[key].removeprefix("runtime ")
            at, fix = f"parameters[{key}]", _FIXES.get(kind, "write a plain number")
            if value or kind == kind_of[key]:  # empty, it is not passed on to ONNX Runtime
                yield at, f"{key}: {problem}", fix
    # The shapes for which TensorRT builds its engine: NAME:1x3x8, with commas between inputs.
    inputs = {tensor.name for tensor in model.config.message.input}
    shapes = {key: given[key] for key in _PROFILES if key in given and name == "tensorrt"}
    for key, value in shapes.items():
        if len(shapes) < len(_PROFILES):
            problem = "TensorRT needs all three shapes of a profile"
            yield f"parameters[{key}]", problem, f"give {', '.join(_PROFILES)}"
        for part in value.split(","):
            tensor, _, shape = part.rpartition(":")
            if not re.fullmatch(r"[0-9]+(x[0-9]+)*", shape) or (inputs and tensor not in inputs):
                fix = f"write NAME:1x3x8 for the inputs {', '.join(sorted(inputs))}"
                yield f"parameters[{key}]", f"'{part}' is not an input with its shape", fix
