"""Warm-up, parameters and accelerators of a config, as the onnxruntime backend reads them."""

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from tritonclient.grpc import model_config_pb2

from pipeline.lint_config import KINDS
from pipeline.lint_files import Model
from pipeline.lint_text import Finding, Level

WARMUP = "core src/backend_model_instance.cc GenerateWarmupData"
BACKEND = "onnxruntime_backend src/onnxruntime.cc"
SIZES = {"BOOL": 1, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}
SIZES |= {f"{sign}INT{bits}": bits // 8 for sign in ("", "U") for bits in (8, 16, 32, 64)}


def type_name(number: int) -> str:
    """Triton's name of a data type; TYPE_INVALID for a number that has none."""
    names = model_config_pb2.DataType
    return str(names.Name(number)) if number in names.values() else "TYPE_INVALID"


def warmups(model: Model) -> Iterator[Finding]:
    """The requests that each instance answers before it is ready."""
    config, largest = model.config, max(1, model.max_batch_size)
    given = {tensor.name: tensor for tensor in config.message.input}
    for index, sample in enumerate(config.message.model_warmup):
        at = f"model_warmup[{index}]"
        if sample.batch_size == 0:
            said = f"warmup sample '{sample.name}' has no batch_size: Triton skips it"
            yield config.finding("warmup", "warning", at, said, "write batch_size: 1", WARMUP)
            continue
        if sample.batch_size > largest:
            said = f"batch size {sample.batch_size} of warmup sample '{sample.name}', max allowed "
            yield config.finding(
                "warmup-batch", "error", f"{at}.batch_size", f"{said}is {largest}",
                f"take at most {largest}", f"{BACKEND} ProcessRequests",
            )  # fmt: skip
        required = {tensor.name for tensor in config.message.input if not tensor.optional}
        for name in sorted(required - set(sample.inputs)):
            said = f"warmup sample '{sample.name}' lacks the input '{name}'"
            yield config.finding("warmup", "error", at, said, "give every input", WARMUP)
        for name, entry in sample.inputs.items():
            if given and name not in given:
                said = f"unexpected inference input '{name}' in warmup sample '{sample.name}'"
                fix = f"the inputs are: {', '.join(given)}"
                yield config.finding("warmup", "error", f"{at}.inputs[{name}]", said, fix, WARMUP)
            for field, said, fix in _entry(model, name, entry, given.get(name)):
                where = f"{at}.inputs[{name}].value.{field}"
                yield config.finding("warmup", "error", where, said, fix, WARMUP)


def _entry(model: Model, name: str, entry: Any, tensor: Any) -> Iterator[tuple[str, str, str]]:
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
_OF_CUDA = (*_FOR_CUDA, "gpu_mem_limit", "do_copy_in_default_stream")
KNOWN = (*_NUMBERS, *_FLAGS, *_TEXTS, *_OF_CUDA)


def parameters(model: Model) -> Iterator[Finding]:
    """The parameters that the backend reads. All others are free to say anything."""
    config = model.config
    on_gpu = runs_on_gpu(config.message)
    for key, holder in config.message.parameters.items():
        value, at, fix = holder.string_value, f"parameters[{key}]", "such as string_value: "
        source = f"{BACKEND} ModelState"
        if key in (*_NUMBERS, *_FOR_CUDA):
            level: Level = "error" if key in _NUMBERS or on_gpu else "warning"
            largest = {"execution_mode": 1, **_FOR_CUDA}.get(key)
            if not re.match(r"\s*[+-]?\d", value):
                said = f"failed to convert '{value}' to integral number, as {key}"
                yield config.finding("parameters", level, at, said, f'{fix}"1"', source)
            elif largest is not None and not 0 <= int(re.findall(r"-?\d+", value)[0]) <= largest:
                said = f"unsupported {key} value '{value}', expected are 0 to {largest}"
                yield config.finding("parameters", level, at, said, f'{fix}"0"', source)
        elif key in _FLAGS and value.lower() not in SWITCHES:
            said = f"failed to convert '{value}' to boolean, as {key}"
            yield config.finding("parameters", "error", at, said, f'{fix}"1"', source)
        elif key not in KNOWN and (close := difflib.get_close_matches(key, KNOWN, 1, 0.85)):
            said = f"the backend does not know the parameter {key} and ignores it"
            yield config.finding("parameters", "warning", at, said, f"did you mean {close[0]}?")
    level_of_graph = config.message.optimization.graph.level
    if level_of_graph not in (-1, 0, 1, 2):
        said = f"the backend does not know the graph level {level_of_graph} and ignores it"
        fix = "-1 is basic, 1 extended, 2 none"
        yield config.finding("parameters", "warning", "optimization.graph.level", said, fix)


def runs_on_gpu(message: Any) -> bool:
    """Whether some instance is asked to be on a GPU, wherever the server is."""
    return any(group.kind == KINDS.KIND_GPU for group in message.instance_group)


def may_run_on_gpu(message: Any) -> bool:
    """Whether some instance would be on a GPU where there is one."""
    kinds = {group.kind for group in message.instance_group} or {KINDS.KIND_AUTO}
    return bool(kinds & {KINDS.KIND_GPU, KINDS.KIND_AUTO})


_TENSORRT = {  # what each parameter is
    **dict.fromkeys(
        ("trt_dla_enable", "trt_engine_cache_enable", "trt_dump_subgraphs", "trt_sparsity_enable"),
        "switch",
    ),
    **dict.fromkeys(
        ("trt_force_sequential_engine_build", "trt_context_memory_sharing_enable"), "switch"
    ),
    **dict.fromkeys(("trt_layer_norm_fp32_fallback", "trt_timing_cache_enable"), "switch"),
    **dict.fromkeys(("trt_force_timing_cache", "trt_detailed_build_log"), "switch"),
    **dict.fromkeys(("trt_build_heuristics_enable", "trt_cuda_graph_enable"), "switch"),
    **dict.fromkeys(("trt_dump_ep_context_model", "int8_use_native_calibration_table"), "switch"),
    **dict.fromkeys(("max_workspace_size_bytes", "trt_max_partition_iterations"), "number"),
    **dict.fromkeys(("trt_min_subgraph_size", "trt_dla_core", "trt_auxiliary_streams"), "number"),
    **dict.fromkeys(("trt_builder_optimization_level", "trt_ep_context_embed_mode"), "number"),
    **dict.fromkeys(("int8_calibration_table_name", "trt_engine_cache_path"), "text"),
    **dict.fromkeys(("trt_engine_cache_prefix", "trt_timing_cache_path"), "text"),
    **dict.fromkeys(("trt_tactic_sources", "trt_extra_plugin_lib_paths"), "text"),
    **dict.fromkeys(("trt_profile_min_shapes", "trt_profile_opt_shapes"), "text"),
    **dict.fromkeys(("trt_profile_max_shapes", "trt_ep_context_file_path"), "text"),
    "precision_mode": "precision",
}
_PROFILES = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
_CUDA = frozenset(
    {"arena_extend_strategy", "cudnn_conv1d_pad_to_nc1d", "cudnn_conv_algo_search", "device_id"}
    | {"cudnn_conv_use_max_workspace", "do_copy_in_default_stream", "enable_cuda_graph"}
    | {"enable_skip_layer_norm_strict_mode", "fuse_conv_bias", "gpu_mem_limit", "prefer_nhwc"}
    | {"sdpa_kernel", "tunable_op_enable", "tunable_op_max_tuning_duration_ms", "use_tf32"}
    | {"tunable_op_tuning_enable", "use_ep_level_unified_stream", "user_compute_stream"}
    | {"default_memory_arena_cfg", "gpu_external_alloc", "gpu_external_empty_cache"}
    | {"gpu_external_free", "has_user_compute_stream"}
)


def accelerators(model: Model) -> Iterator[Finding]:
    """What the config asks of CUDA and TensorRT. Without a GPU, nothing but the source tells."""
    config, message = model.config, model.config.message
    level: Level = "error" if may_run_on_gpu(message) else "warning"
    asked = message.optimization.execution_accelerators
    for index, one in enumerate(asked.gpu_execution_accelerator):
        at = f"optimization.execution_accelerators.gpu_execution_accelerator[{index}]"
        if one.name not in ("cuda", "tensorrt"):
            said = f"unknown Execution Accelerator '{one.name}' is requested"
            fix = 'there are "tensorrt" and "cuda"'
            yield config.finding(
                "accelerator", level, f"{at}.name", said, fix, f"{BACKEND} LoadModel"
            )
        check = _tensorrt if one.name == "tensorrt" else _cuda
        if one.name in ("cuda", "tensorrt"):
            for key, said, fix in check(message, dict(one.parameters)):
                where = f"{at}.parameters[{key}]"
                yield config.finding("accelerator", level, where, said, fix, f"{BACKEND} LoadModel")
    for index, one in enumerate(asked.cpu_execution_accelerator):
        if one.name != "openvino":
            said = f"unknown Execution Accelerator '{one.name}' is requested"
            at = f"optimization.execution_accelerators.cpu_execution_accelerator[{index}]"
            yield config.finding(
                "accelerator", "error", at, said, 'there is "openvino"', f"{BACKEND} LoadModel"
            )


def _tensorrt(message: Any, given: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    for key, value in given.items():
        kind = _TENSORRT.get(key)
        if not kind:
            close = difflib.get_close_matches(key, _TENSORRT, 1)
            said = f"unknown parameter '{key}' is provided for TensorRT Execution Accelerator"
            yield key, said, f"did you mean {close[0]}?" if close else "leave it out"
        elif kind == "switch" and value.lower() not in SWITCHES:
            yield (
                key,
                f"failed to convert '{value}' to boolean, as {key}",
                'write "true" or "false"',
            )
        elif kind == "number" and not re.match(r"\s*[+-]?\d", value):
            yield key, f"failed to convert '{value}' to integral number, as {key}", "write a number"
        elif kind == "precision" and value not in ("FP32", "FP16", "BF16", "INT8"):
            said = f"unsupported precision mode '{value}' is requested"
            yield key, said, "there are FP32, FP16, BF16 and INT8"
    shapes = [given[key] for key in _PROFILES if key in given]
    if shapes and len(shapes) < len(_PROFILES):
        said = "TensorRT needs the shapes of a profile all together"
        yield next(iter(given)), said, f"give {', '.join(_PROFILES)}"
    names = {tensor.name for tensor in message.input}
    for key in _PROFILES:
        for part in filter(None, given.get(key, "").split(",")):
            name, _, shape = part.rpartition(":")
            if not re.fullmatch(r"\d+(x\d+)*", shape) or (names and name not in names):
                said = f"'{part}' is no input with its shape"
                yield key, said, f"write NAME:1x3x8 for the inputs {', '.join(sorted(names))}"


def _cuda(message: Any, given: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    for key, value in given.items():
        if key not in _CUDA:
            close = difflib.get_close_matches(key, _CUDA, 1)
            said = f"CUDA's provider does not know the option '{key}'"
            yield key, said, f"did you mean {close[0]}?" if close else "leave it out"
        flags = ("do_copy_in_default_stream", "use_ep_level_unified_stream")
        if key in flags and value.lower() not in SWITCHES:
            yield (
                key,
                f"failed to convert '{value}' to boolean, as {key}",
                'write "true" or "false"',
            )
