"""ONNX Runtime's settings from a model's config, as the native backend reads it; the session."""

import os
import re
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils

SWITCHES = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
CUDA_WORDS = {  # parameters of CUDA's provider: its words by their numbers; default first
    "cudnn_conv_algo_search": {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"},
    "arena_extend_strategy": {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"},
}
CUDA_VALUES = {"gpu_mem_limit": str(2**64 - 1), "do_copy_in_default_stream": "1"}
CUDA_SWITCHES = ("do_copy_in_default_stream", "use_ep_level_unified_stream")
TENSORRT_PRECISIONS = ("FP32", "FP16", "BF16", "INT8")
TENSORRT_RENAMED = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
TENSORRT_NUMBERS = {
    *("max_workspace_size_bytes", "trt_max_partition_iterations", "trt_min_subgraph_size"),
    *("trt_dla_core", "trt_builder_optimization_level", "trt_auxiliary_streams"),
    "trt_ep_context_embed_mode",
}
TENSORRT_SWITCHES = {
    *("int8_use_native_calibration_table", "trt_dla_enable", "trt_engine_cache_enable"),
    *("trt_dump_subgraphs", "trt_force_sequential_engine_build", "trt_timing_cache_enable"),
    *("trt_context_memory_sharing_enable", "trt_layer_norm_fp32_fallback"),
    *("trt_force_timing_cache", "trt_detailed_build_log", "trt_build_heuristics_enable"),
    *("trt_sparsity_enable", "trt_cuda_graph_enable", "trt_dump_ep_context_model"),
}
TENSORRT_TEXTS = {
    *("int8_calibration_table_name", "trt_engine_cache_path", "trt_engine_cache_prefix"),
    *("trt_timing_cache_path", "trt_tactic_sources", "trt_extra_plugin_lib_paths"),
    *("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"),
    "trt_ep_context_file_path",
}

Config = dict[str, Any]  # config.pbtxt in Triton's JSON form
Provider = tuple[str, dict[str, str]]  # an execution provider's name and options
CPU: Provider = ("CPUExecutionProvider", {})


class LoadError(Exception):
    """A model cannot be loaded; the message is one line that a client may see."""


def _parameter(config: Config, name: str, default: str = "") -> str:
    return str(config.get("parameters", {}).get(name, {}).get("string_value", default))


def _number(value: str) -> int:
    if not re.fullmatch(r"\s*[+-]?\d+\s*", value):
        raise LoadError(f"failed to convert '{value}' to integral number")
    return int(value)


def _switch(value: str) -> bool:
    if value.lower() not in SWITCHES:
        raise LoadError(f"failed to convert '{value}' to boolean")
    return SWITCHES[value.lower()]


def make_session_options(config: Config) -> onnxruntime.SessionOptions:
    """Return the config's parameters and graph level as ONNX Runtime's session options."""
    mode = _number(_parameter(config, "execution_mode", "0"))
    if mode not in (0, 1):
        raise LoadError(
            "Invalid configuration value provided. Expected values for execution_mode are 0 or 1 "
            f"but got {mode} ."
        )
    levels = onnxruntime.GraphOptimizationLevel
    named = {-1: levels.ORT_ENABLE_BASIC, 1: levels.ORT_ENABLE_EXTENDED, 2: levels.ORT_DISABLE_ALL}
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = named.get(level, levels.ORT_ENABLE_ALL)
    options.execution_mode = onnxruntime.ExecutionMode(mode)
    options.intra_op_num_threads = max(_number(_parameter(config, "intra_op_thread_count", "0")), 0)
    options.inter_op_num_threads = max(_number(_parameter(config, "inter_op_thread_count", "0")), 0)
    options.enable_cpu_mem_arena = _switch(_parameter(config, "enable_mem_arena", "on"))
    options.enable_mem_pattern = _switch(_parameter(config, "enable_mem_pattern", "on"))
    key = "session.use_device_allocator_for_initializers"
    if key in config.get("parameters", {}):
        options.add_session_config_entry(key, _parameter(config, key))
    for library in config.get("model_operations", {}).get("op_library_filename", []):
        options.register_custom_ops_library(library)
    return options


def make_run_options(config: Config) -> onnxruntime.RunOptions | None:
    """Return the options of each run; None if the config has none."""
    key = "memory.enable_memory_arena_shrinkage"
    if key not in config.get("parameters", {}):
        return None
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(key, _parameter(config, key))
    return options


def choose_providers(config: Config, kind: str, device: str) -> list[Provider]:
    """Return the execution providers that the config asks for, preferred first, the CPU last."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    chosen: list[Provider] = []
    if kind in ("GPU", "AUTO"):
        options: dict[str, str] = {}
        for accelerator in accelerators.get("gpu_execution_accelerator", []):
            parameters = accelerator.get("parameters", {})
            if accelerator["name"] == "tensorrt":
                tensorrt = _read_tensorrt(parameters) | {"device_id": device}
                chosen.append(("TensorrtExecutionProvider", tensorrt))
            elif accelerator["name"] == "cuda":
                for name in CUDA_SWITCHES:
                    _switch(parameters.get(name, "on"))
                options |= {name: value for name, value in parameters.items() if value}
            else:
                raise _make_unknown_error(accelerator)
        if "parameters" in config:  # these four override the accelerator's, even if not set
            options |= {
                name: _parameter(config, name, usual) for name, usual in CUDA_VALUES.items()
            }
            for name, words in CUDA_WORDS.items():
                value = str(_number(_parameter(config, name, "0")))
                if value not in words:
                    raise LoadError(f"unsupported {name} value '{value}' is requested")
                options[name] = words[value]
        chosen.append(("CUDAExecutionProvider", options | {"device_id": device}))
    for accelerator in accelerators.get("cpu_execution_accelerator", []):
        if accelerator["name"] != "openvino":
            raise _make_unknown_error(accelerator)
        chosen.append(("OpenVINOExecutionProvider", {"device_type": "CPU"}))
    return [*chosen, CPU]


def _make_unknown_error(accelerator: Config) -> LoadError:
    return LoadError(f"unknown Execution Accelerator '{accelerator['name']}' is requested")


def _read_tensorrt(parameters: dict[str, str]) -> dict[str, str]:
    """Return TensorRT's options by ONNX Runtime's names; its Python accepts only True, False."""
    options = {}
    for key, value in parameters.items():
        name = TENSORRT_RENAMED.get(key, key)
        if key == "precision_mode":
            if value not in TENSORRT_PRECISIONS:
                raise LoadError(f"unsupported precision mode '{value}' is requested")
            options |= {} if value == "FP32" else {f"trt_{value.lower()}_enable": "True"}
        elif key in TENSORRT_SWITCHES:
            options[name] = str(_switch(value))
        elif key in TENSORRT_NUMBERS:
            options[name] = str(_number(value))
        elif key in TENSORRT_TEXTS:
            options |= {name: value} if value else {}
        else:
            raise LoadError(
                f"unknown parameter '{key}' is provided for TensorRT Execution Accelerator"
            )
    return options


def require_present(chosen: list[Provider]) -> None:
    """Raise LoadError if a provider is missing; ONNX Runtime itself would continue without."""
    for name, _ in chosen:
        if name not in onnxruntime.get_available_providers():
            raise LoadError(f"ONNX Runtime has no {name} here")


def open_session(config: Config, chosen: list[Provider]) -> onnxruntime.InferenceSession:
    """Open the model's session; raise LoadError unless all chosen providers start."""
    folder = pb_utils.get_model_dir()
    path = os.path.join(folder, config.get("default_model_filename") or "model.onnx")
    if os.path.isdir(path):
        path = os.path.join(path, "model.onnx")
    if not os.path.isfile(path):
        raise LoadError(f"unable to find '{os.path.relpath(path, os.path.dirname(folder))}'")
    require_present(chosen)
    options = make_session_options(config)
    # Without fallback: or the CPU silently replaces a GPU that fails later.
    session = onnxruntime.InferenceSession(path, options, chosen, enable_fallback=0)
    for name, _ in chosen:
        if name not in session.get_providers():  # ONNX Runtime itself only warns
            raise LoadError(f"ONNX Runtime cannot start its {name}")
    return session
