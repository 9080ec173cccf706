"""ONNX Runtime's settings from a model's config, as the native backend reads it; the session."""

import os
from typing import Any

import onnxruntime
import ort_values
import triton_python_backend_utils as pb_utils
from ort_values import CHOICES, CUDA, TENSORRT, find_problem, read_integer, read_switch

CUDA_VALUES = {"gpu_mem_limit": str(2**64 - 1), "do_copy_in_default_stream": "1"}
TENSORRT_RENAMED = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}

Config = dict[str, Any]  # config.pbtxt in Triton's JSON form
Provider = tuple[str, dict[str, str]]  # an execution provider's name and options
CPU: Provider = ("CPUExecutionProvider", {})


class LoadError(Exception):
    """A model cannot be loaded; the message is one line that a client may see."""


def _parameter(config: Config, name: str, default: str = "") -> str:
    return str(config.get("parameters", {}).get(name, {}).get("string_value", default))


def _number(config: Config, name: str) -> int:
    return read_integer(_parameter(config, name, "0"))[0]


def make_session_options(config: Config) -> onnxruntime.SessionOptions:
    """Return the config's parameters and graph level as ONNX Runtime's session options."""
    mode = _number(config, "execution_mode")
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
    options.intra_op_num_threads = max(_number(config, "intra_op_thread_count"), 0)
    options.inter_op_num_threads = max(_number(config, "inter_op_thread_count"), 0)
    options.enable_cpu_mem_arena = read_switch(_parameter(config, "enable_mem_arena", "on"))
    options.enable_mem_pattern = read_switch(_parameter(config, "enable_mem_pattern", "on"))
    key = ort_values.DEVICE_ALLOCATOR
    if key in config.get("parameters", {}):
        options.add_session_config_entry(key, _parameter(config, key))
    for library in config.get("model_operations", {}).get("op_library_filename", []):
        options.register_custom_ops_library(library)
    return options


def make_run_options(config: Config) -> onnxruntime.RunOptions | None:
    """Return the options of each run; None if the config has none."""
    key = ort_values.SHRINKAGE
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
                # ONNX Runtime refuses the wrong values of other options itself.
                for name in (name for name in parameters if CUDA.get(name) == "flag"):
                    read_switch(parameters[name])
                options |= {name: value for name, value in parameters.items() if value}
            else:
                raise _make_unknown_error(accelerator)
        if "parameters" in config:  # these four override the accelerator's, even if not set
            options |= {
                name: _parameter(config, name, usual) for name, usual in CUDA_VALUES.items()
            }
            for name in ("cudnn_conv_algo_search", "arena_extend_strategy"):
                number, words = _number(config, name), CHOICES[name]
                if number not in range(len(words)):
                    raise LoadError(f"unsupported {name} value '{number}' is requested")
                options[name] = words[number]
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
        kind = TENSORRT.get(key)
        if not kind:
            raise LoadError(
                f"unknown parameter '{key}' is provided for TensorRT Execution Accelerator"
            )
        if problem := find_problem(kind, value):
            raise LoadError(problem)
        if kind == "precision":
            options |= {} if value == "FP32" else {f"trt_{value.lower()}_enable": "True"}
        elif value:
            text = str(read_switch(value)) if kind == "flag" else value
            options[TENSORRT_RENAMED.get(key, key)] = text
    return options


def require_present(chosen: list[Provider]) -> None:
    """Raise LoadError if a provider is missing; ONNX Runtime itself would continue without."""
    for name, _ in chosen:
        if name not in onnxruntime.get_available_providers():
            raise LoadError(f"ONNX Runtime has no {name} here")


def open_session(config: Config, chosen: list[Provider]) -> onnxruntime.InferenceSession:
    """Open the model's session; raise LoadError unless all chosen providers start."""
    folder = pb_utils.get_model_dir()
    # Also an absolute path is one in this folder: Triton's JoinPath only appends.
    path = f"{folder}/{config.get('default_model_filename') or 'model.onnx'}"
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
