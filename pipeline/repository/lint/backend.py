"""Rules for a config's warm-up and parameters, as Triton and its onnxruntime backend read them.

Includes the options of CUDA and TensorRT, for which the native backend's source is the only
reference.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tritonclient.grpc import model_config_pb2

from pipeline.repository.config_pbtxt import MIN_PROBABILITY
from pipeline.repository.lint.config import KINDS
from pipeline.repository.lint.files import ModelFolder
from pipeline.repository.lint.text import Finding, Level

WARMUP = "core src/backend_model_instance.cc GenerateWarmupData"
BACKEND = "onnxruntime_backend src/onnxruntime.cc"
SIZES = {"BOOL": 1, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}
SIZES |= {f"{sign}INT{bits}": bits // 8 for sign in ("", "U") for bits in (8, 16, 32, 64)}

Problems = Iterator[tuple[str, str, str]]  # (field, what is wrong, fix)


def triton_type(number: int) -> str:
    """Return Triton's name of a data type; TYPE_INVALID for an unknown number."""
    names = model_config_pb2.DataType
    return str(names.Name(number)) if number in names.values() else "TYPE_INVALID"


def warmups(model: ModelFolder) -> Iterator[Finding]:
    """Check the warm-up requests, which each instance answers before it is ready."""
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
        given, problems = {tensor.name: tensor for tensor in config.message.input}, []
        for tensor in given.values():
            if not tensor.optional and tensor.name not in sample.inputs:
                said = f"missing required input(s) ['{tensor.name}']"
                problems.append(("", said, "give every input"))
        for name, entry in sample.inputs.items():
            if given and name not in given and not config.message.HasField("sequence_batching"):
                said = f"unexpected inference input '{name}'"
                problems.append((f".inputs[{name}]", said, f"the inputs are: {', '.join(given)}"))
            for field, said, fix in _entry(model, name, entry, given.get(name)):
                problems.append((f".inputs[{name}].value.{field}", said, fix))
        for field, said, fix in problems:
            what = f"{called}: {said}"
            yield config.finding("warmup", "error", f"{at}{field}", what, fix, WARMUP)


def _entry(model: ModelFolder, name: str, entry: Any, tensor: Any) -> Problems:
    """Yield the problems of one input of a warm-up sample."""
    kind, dims = triton_type(entry.data_type), list(entry.dims)
    if tensor is not None and entry.data_type != tensor.data_type:
        wanted = triton_type(tensor.data_type)
        yield "data_type", f"input '{name}' is {wanted}, its warmup {kind}", f"write {wanted}"
    if any(dim < 1 for dim in dims):
        said = f"warmup setting expects all variable-size dimensions are specified for '{name}'"
        yield "dims", said, "write the numbers of one real request, without the batch"
        return
    if tensor is not None and not (
        len(dims) == len(tensor.dims)
        and all(allowed in (-1, dim) for dim, allowed in zip(dims, tensor.dims, strict=True))
    ):
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


SWITCHES = ("true", "on", "1", "false", "off", "0")
_NUMBERS = ("execution_mode", "intra_op_thread_count", "inter_op_thread_count")
_TEXTS = ("memory.enable_memory_arena_shrinkage", "session.use_device_allocator_for_initializers")
_FLAGS = ("enable_mem_arena", "enable_mem_pattern")
_FOR_CUDA = {"cudnn_conv_algo_search": 2, "arena_extend_strategy": 1}  # largest valid values
OF_CUDA = (*_FOR_CUDA, "gpu_mem_limit", "do_copy_in_default_stream")
KNOWN = (*_NUMBERS, *_FLAGS, *_TEXTS, *OF_CUDA)


def parameters(model: ModelFolder) -> Iterator[Finding]:
    """Check the parameters that the backend reads, and names close to theirs; ignore all others."""
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


def threshold(model: ModelFolder) -> Iterator[Finding]:
    """Check min_probability, below which our clients report that the model is not sure."""
    for key, holder in model.config.message.parameters.items():
        if key.partition(".")[0] != MIN_PROBABILITY:
            continue
        with contextlib.suppress(ValueError):
            if 0 <= float(holder.string_value) <= 1:
                continue
        said = f"'{holder.string_value}' is no probability, and clients take 0 for it"
        at, fix = f"parameters[{key}]", "write a number from 0 to 1, or package the model again"
        yield model.config.finding("min-probability", "error", at, said, fix)


def _parameter(key: str, value: str) -> str:
    """Return what is wrong with the value of a parameter that the backend reads; "" if nothing."""
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
    """Return whether the config asks for an instance on a GPU, on any machine."""
    return any(group.kind == KINDS.KIND_GPU for group in message.instance_group)


Check = Callable[[Any, dict[str, str]], Problems]


# TensorRT's parameters, by the kind of their value.
_TENSORRT_KINDS = {
    "switch": """
        int8_use_native_calibration_table trt_build_heuristics_enable
        trt_context_memory_sharing_enable trt_cuda_graph_enable trt_detailed_build_log
        trt_dla_enable trt_dump_ep_context_model trt_dump_subgraphs trt_engine_cache_enable
        trt_force_sequential_engine_build trt_force_timing_cache trt_layer_norm_fp32_fallback
        trt_sparsity_enable trt_timing_cache_enable
    """,
    "number": """
        max_workspace_size_bytes trt_auxiliary_streams trt_builder_optimization_level trt_dla_core
        trt_ep_context_embed_mode trt_max_partition_iterations trt_min_subgraph_size
    """,
    "text": """
        int8_calibration_table_name trt_engine_cache_path trt_engine_cache_prefix
        trt_ep_context_file_path trt_extra_plugin_lib_paths trt_profile_max_shapes
        trt_profile_min_shapes trt_profile_opt_shapes trt_tactic_sources trt_timing_cache_path
    """,
    "precision": "precision_mode",
}
_TENSORRT = {key: kind for kind, keys in _TENSORRT_KINDS.items() for key in keys.split()}
_PROFILES = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")


_CUDA_OPTIONS = """
    arena_extend_strategy cudnn_conv1d_pad_to_nc1d cudnn_conv_algo_search
    cudnn_conv_use_max_workspace default_memory_arena_cfg device_id do_copy_in_default_stream
    enable_cuda_graph enable_skip_layer_norm_strict_mode fuse_conv_bias gpu_external_alloc
    gpu_external_empty_cache gpu_external_free gpu_mem_limit has_user_compute_stream prefer_nhwc
    sdpa_kernel tunable_op_enable tunable_op_max_tuning_duration_ms tunable_op_tuning_enable
    use_ep_level_unified_stream use_tf32 user_compute_stream
"""


_CUDA = frozenset(_CUDA_OPTIONS.split())


def accelerators(model: ModelFolder) -> Iterator[Finding]:
    """Check the accelerators and their options against the backend's source.

    Without a GPU, the source is the only reference for CUDA and TensorRT.
    """
    config, source = model.config, f"{BACKEND} LoadModel"
    asked = config.message.optimization.execution_accelerators
    kinds = {group.kind for group in config.message.instance_group} or {KINDS.KIND_AUTO}
    may_be_on_gpu = bool(kinds & {KINDS.KIND_GPU, KINDS.KIND_AUTO})
    of_gpu: dict[str, Check] = {"cuda": _cuda, "tensorrt": _tensorrt}
    of_cpu: dict[str, Check] = {"openvino": lambda message, given: iter(())}
    for device, accelerators, known in (
        ("gpu", asked.gpu_execution_accelerator, of_gpu),
        ("cpu", asked.cpu_execution_accelerator, of_cpu),
    ):
        level: Level = "error" if device == "cpu" or may_be_on_gpu else "warning"
        for index, one in enumerate(accelerators):
            at = f"optimization.execution_accelerators.{device}_execution_accelerator[{index}]"
            said = f"unknown Execution Accelerator '{one.name}' is requested"
            problems: Problems = iter([("name", said, f"there are: {', '.join(known)}")])
            if one.name in known:
                problems = known[one.name](config.message, dict(one.parameters))
            for field, said, fix in problems:
                yield config.finding("accelerator", level, f"{at}.{field}", said, fix, source)
            for key in OF_CUDA if (device, one.name) == ("gpu", "cuda") else ():
                if key in one.parameters:
                    said = f"{key} of the accelerator is overwritten by the one in parameters, or "
                    field, fix = f"{at}.parameters[{key}]", "set it in the config's parameters"
                    yield config.finding(
                        "accelerator", "warning", field, f"{said}none", fix, source
                    )


def _tensorrt(message: Any, given: dict[str, str]) -> Problems:
    for key, value in given.items():
        kind, at = _TENSORRT.get(key), f"parameters[{key}]"
        if not kind:
            said = f"unknown parameter '{key}' is provided for TensorRT Execution Accelerator"
            yield at, said, _nearest(key, _TENSORRT)
        elif kind == "switch" and value.lower() not in SWITCHES:
            yield at, f"failed to convert '{value}' to boolean, as {key}", 'write "true" or "false"'
        elif kind == "number" and not re.match(r"\s*[+-]?\d", value):
            said = f"failed to convert '{value}' to integral number, as {key}"
            yield at, said, "write a number"
        elif kind == "precision" and value not in ("FP32", "FP16", "BF16", "INT8"):
            said = f"unsupported precision mode '{value}' is requested"
            yield at, said, "there are FP32, FP16, BF16 and INT8"
    # The shapes for which TensorRT builds its engine: NAME:1x3x8, with commas between inputs.
    names = {tensor.name for tensor in message.input}
    shapes = {key: given[key] for key in _PROFILES if key in given}
    for key, value in shapes.items():
        if len(shapes) < len(_PROFILES):
            said = "TensorRT needs the shapes of a profile all together"
            yield f"parameters[{key}]", said, f"give {', '.join(_PROFILES)}"
        for part in value.split(","):
            name, _, shape = part.rpartition(":")
            if not re.fullmatch(r"\d+(x\d+)*", shape) or (names and name not in names):
                fix = f"write NAME:1x3x8 for the inputs {', '.join(sorted(names))}"
                yield f"parameters[{key}]", f"'{part}' is no input with its shape", fix


def _cuda(message: Any, given: dict[str, str]) -> Problems:
    for key, value in given.items():
        at = f"parameters[{key}]"
        if key not in _CUDA:
            said = f"CUDA's provider does not know the option '{key}'"
            yield at, said, _nearest(key, _CUDA)
        flags = ("do_copy_in_default_stream", "use_ep_level_unified_stream")
        if key in flags and value.lower() not in SWITCHES:
            yield at, f"failed to convert '{value}' to boolean, as {key}", 'write "true" or "false"'


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, known, 1)
    return f"did you mean {close[0]}?" if close else "leave it out"
