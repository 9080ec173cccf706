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


SWITCHES = ("true", "on", "1", "false", "off", "0")
_NUMBERS = ("execution_mode", "intra_op_thread_count", "inter_op_thread_count")
_TEXTS = ("memory.enable_memory_arena_shrinkage", "session.use_device_allocator_for_initializers")
_FLAGS = ("enable_mem_arena", "enable_mem_pattern")
_FOR_CUDA = {"cudnn_conv_algo_search": 2, "arena_extend_strategy": 1}  # largest valid values
OF_CUDA = (*_FOR_CUDA, "gpu_mem_limit", "do_copy_in_default_stream")
KNOWN = (*_NUMBERS, *_FLAGS, *_TEXTS, *OF_CUDA)


def check_parameters(model: ModelFolder) -> Iterator[Finding]:
    """Check the parameters that the backend reads, and names close to theirs; ignore all others."""
    config, on_gpu = model.config, runs_on_gpu(model.config.message)
    for key, holder in config.message.parameters.items():
        at, value, problem = f"parameters[{key}]", holder.string_value, ""
        largest, number = {"execution_mode": 1, **_FOR_CUDA}.get(key), re.match(_NUMBER, value)
        if key in _FLAGS:
            problem = _check_value("switch", key, value)
        elif number and largest is not None and not 0 <= int(number[0]) <= largest:
            problem = f"unsupported {key} value '{value}', expected are 0 to {largest}"
        elif key in (*_NUMBERS, *_FOR_CUDA):
            problem = _check_value("number", key, value)
        if problem:
            level: Level = "warning" if key in _FOR_CUDA and not on_gpu else "error"
            source = f"{BACKEND} {'LoadModel' if key in _FOR_CUDA else 'ModelState'}"
            yield config.finding("parameters", at, problem, 'such as "1"', source, level)
        elif key not in KNOWN and (close := difflib.get_close_matches(key, KNOWN, 1, 0.85)):
            problem, fix = f"the backend ignores the parameter {key}", f"did you mean {close[0]}?"
            yield config.finding("parameters", at, problem, fix, level="warning")
    graph_level = config.message.optimization.graph.level
    if graph_level not in (-1, 0, 1, 2):
        at, problem = "optimization.graph.level", f"the backend ignores the level {graph_level}"
        fix = "-1 is basic, 1 extended, 2 none"
        yield config.finding("parameters", at, problem, fix, level="warning")


def check_threshold(model: ModelFolder) -> Iterator[Finding]:
    """Check min_probability, below which our clients report that the model is not sure."""
    for key, holder in model.config.message.parameters.items():
        if key.partition(".")[0] != MIN_PROBABILITY:
            continue
        with contextlib.suppress(ValueError):
            if 0 <= float(holder.string_value) <= 1:
                continue
        problem = f"'{holder.string_value}' is not a probability, and clients use 0 instead"
        fix = "write a number from 0 to 1, or package the model again"
        yield model.config.finding("min-probability", f"parameters[{key}]", problem, fix)


_NUMBER = r"\s*[+-]?\d+"


def _check_value(kind: str, key: str, value: str) -> str:
    """Return what is wrong with a value that must be of this kind (see _FIXES); "" if nothing."""
    if kind == "switch" and value.lower() not in SWITCHES:
        return f"failed to convert '{value}' to boolean, as {key}"
    if kind == "number" and not re.match(_NUMBER, value):
        return f"failed to convert '{value}' to integral number, as {key}"
    if kind == "precision" and value not in ("FP32", "FP16", "BF16", "INT8"):
        return f"unsupported precision mode '{value}' is requested"
    return ""


def runs_on_gpu(message: Any) -> bool:
    """Return whether the config asks for an instance on a GPU, on any machine."""
    return any(group.kind == KINDS.KIND_GPU for group in message.instance_group)


# TensorRT's parameters, by the kind of their value.
_TENSORRT_KINDS = {
    "switch": """int8_use_native_calibration_table trt_build_heuristics_enable trt_cuda_graph_enable
        trt_context_memory_sharing_enable trt_detailed_build_log trt_dla_enable trt_dump_subgraphs
        trt_dump_ep_context_model trt_engine_cache_enable trt_force_sequential_engine_build
        trt_force_timing_cache trt_layer_norm_fp32_fallback trt_sparsity_enable
        trt_timing_cache_enable""",
    "number": """max_workspace_size_bytes trt_auxiliary_streams trt_builder_optimization_level
        trt_dla_core trt_ep_context_embed_mode trt_max_partition_iterations
        trt_min_subgraph_size""",
    "text": """int8_calibration_table_name trt_engine_cache_path trt_engine_cache_prefix
        trt_ep_context_file_path trt_extra_plugin_lib_paths trt_profile_max_shapes
        trt_profile_min_shapes trt_profile_opt_shapes trt_tactic_sources trt_timing_cache_path""",
    "precision": "precision_mode",
}
# CUDA's, of which the backend converts two.
_CUDA_KINDS = {
    "switch": "do_copy_in_default_stream use_ep_level_unified_stream",
    "text": """arena_extend_strategy cudnn_conv1d_pad_to_nc1d cudnn_conv_algo_search device_id
        cudnn_conv_use_max_workspace default_memory_arena_cfg enable_cuda_graph fuse_conv_bias
        enable_skip_layer_norm_strict_mode gpu_external_alloc gpu_external_empty_cache
        gpu_external_free gpu_mem_limit has_user_compute_stream prefer_nhwc sdpa_kernel
        tunable_op_enable tunable_op_max_tuning_duration_ms tunable_op_tuning_enable use_tf32
        user_compute_stream""",
}
_FIXES = {
    "switch": 'write "true" or "false"',
    "number": "write a number",
    "precision": "there are FP32, FP16, BF16 and INT8",
}
# For each device and accelerator, the kinds of its parameters; without kinds, any parameter.
_ACCELERATORS: dict[str, dict[str, dict[str, str]]] = {
    "gpu": {"cuda": _CUDA_KINDS, "tensorrt": _TENSORRT_KINDS},
    "cpu": {"openvino": {}},
}
_PROFILES = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")


def check_accelerators(model: ModelFolder) -> Iterator[Finding]:
    """Check the accelerators and their options against the backend's source.

    Without a GPU, the source is the only reference for CUDA and TensorRT.
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
            for part, problem, fix in _check_accelerator(accelerator, supported, config.message):
                yield config.finding("accelerator", f"{at}.{part}", problem, fix, source, level)
            for key in OF_CUDA if (device, accelerator.name) == ("gpu", "cuda") else ():
                if key in accelerator.parameters:
                    place, fix = f"{at}.parameters[{key}]", "set it in the config's parameters"
                    problem = f"the backend overwrites {key} of the accelerator"
                    yield config.finding("accelerator", place, problem, fix, source, "warning")


def _check_accelerator(
    accelerator: Any, supported: Mapping[str, Mapping[str, str]], message: Any
) -> Problems:
    name, given = accelerator.name, dict(accelerator.parameters)
    if name not in supported:
        problem = f"unknown Execution Accelerator '{name}' is requested"
        yield "name", problem, f"there are: {', '.join(supported)}"
        return
    kind_of = {key: kind for kind, keys in supported[name].items() for key in keys.split()}
    for key, value in given.items() if kind_of else ():
        if key not in kind_of:
            problem = f"unknown parameter '{key}' is provided for the accelerator '{name}'"
            close = difflib.get_close_matches(key, kind_of, 1)
            fix = f"did you mean {close[0]}?" if close else "leave it out"
            yield f"parameters[{key}]", problem, fix
        elif problem := _check_value(kind_of[key], key, value):
            yield f"parameters[{key}]", problem, _FIXES[kind_of[key]]
    # The shapes for which TensorRT builds its engine: NAME:1x3x8, with commas between inputs.
    inputs = {tensor.name for tensor in message.input}
    shapes = {key: given[key] for key in _PROFILES if key in given and name == "tensorrt"}
    for key, value in shapes.items():
        if len(shapes) < len(_PROFILES):
            problem = "TensorRT needs all three shapes of a profile"
            yield f"parameters[{key}]", problem, f"give {', '.join(_PROFILES)}"
        for part in value.split(","):
            tensor, _, shape = part.rpartition(":")
            if not re.fullmatch(r"\d+(x\d+)*", shape) or (inputs and tensor not in inputs):
                fix = f"write NAME:1x3x8 for the inputs {', '.join(sorted(inputs))}"
                yield f"parameters[{key}]", f"'{part}' is not an input with its shape", fix
