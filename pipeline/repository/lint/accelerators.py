"""What a config asks of CUDA and TensorRT, where nothing but the native backend's source tells."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.repository.lint.backend import BACKEND, OF_CUDA, SWITCHES, Problems, may_run_on_gpu
from pipeline.repository.lint.files import Model
from pipeline.repository.lint.text import Finding, Level

Check = Callable[[Any, dict[str, str]], Problems]
_SWITCHES = """
    int8_use_native_calibration_table trt_build_heuristics_enable trt_context_memory_sharing_enable
    trt_cuda_graph_enable trt_detailed_build_log trt_dla_enable trt_dump_ep_context_model
    trt_dump_subgraphs trt_engine_cache_enable trt_force_sequential_engine_build
    trt_force_timing_cache trt_layer_norm_fp32_fallback trt_sparsity_enable trt_timing_cache_enable
"""
_NUMBERS = """
    max_workspace_size_bytes trt_auxiliary_streams trt_builder_optimization_level trt_dla_core
    trt_ep_context_embed_mode trt_max_partition_iterations trt_min_subgraph_size
"""
_TEXTS = """
    int8_calibration_table_name trt_engine_cache_path trt_engine_cache_prefix
    trt_ep_context_file_path trt_extra_plugin_lib_paths trt_profile_max_shapes
    trt_profile_min_shapes trt_profile_opt_shapes trt_tactic_sources trt_timing_cache_path
"""
_TENSORRT = {  # what each parameter is
    **dict.fromkeys(_SWITCHES.split(), "switch"),
    **dict.fromkeys(_NUMBERS.split(), "number"),
    **dict.fromkeys(_TEXTS.split(), "text"),
    "precision_mode": "precision",
}
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


def accelerators(model: Model) -> Iterator[Finding]:
    """What the config asks of CUDA and TensorRT. Without a GPU, nothing but the source tells."""
    message = model.config.message
    asked = message.optimization.execution_accelerators
    known: dict[str, dict[str, Check]]
    known = {"gpu": {"cuda": _cuda, "tensorrt": _tensorrt}, "cpu": {"openvino": _openvino}}
    for device, ones in (
        ("gpu", asked.gpu_execution_accelerator),
        ("cpu", asked.cpu_execution_accelerator),
    ):
        level: Level = "error" if device == "cpu" or may_run_on_gpu(message) else "warning"
        for index, one in enumerate(ones):
            at = f"optimization.execution_accelerators.{device}_execution_accelerator[{index}]"
            check = known[device].get(one.name, _unknown(one.name, known[device]))
            for field, said, fix in check(message, dict(one.parameters)):
                yield model.config.finding(
                    "accelerator", level, f"{at}.{field}", said, fix, f"{BACKEND} LoadModel"
                )


def overwritten(model: Model) -> Iterator[Finding]:
    """Options of CUDA that the backend takes from elsewhere, whatever the accelerator says."""
    asked = model.config.message.optimization.execution_accelerators
    for index, one in enumerate(asked.gpu_execution_accelerator):
        for key in OF_CUDA if one.name == "cuda" else ():
            if key in one.parameters:
                at = "optimization.execution_accelerators.gpu_execution_accelerator"
                said = f"{key} of the accelerator is overwritten by the one in parameters, or none"
                yield model.config.finding(
                    "accelerator", "warning", f"{at}[{index}].parameters[{key}]", said,
                    "set it in the config's parameters", f"{BACKEND} LoadModel",
                )  # fmt: skip


def _unknown(name: str, known: Iterable[str]) -> Check:
    def check(message: Any, given: dict[str, str]) -> Problems:
        said = f"unknown Execution Accelerator '{name}' is requested"
        yield "name", said, f"there are: {', '.join(known)}"

    return check


def _openvino(message: Any, given: dict[str, str]) -> Problems:
    return iter(())


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
    yield from _profiles(message, {key: given[key] for key in _PROFILES if key in given})


def _profiles(message: Any, given: dict[str, str]) -> Problems:
    """The shapes that TensorRT is to be built for, NAME:1x3x8 with commas between the inputs."""
    names = {tensor.name for tensor in message.input}
    for key, value in given.items():
        if len(given) < len(_PROFILES):
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
