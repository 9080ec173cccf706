"""How Triton's native onnxruntime backend reads the text of a parameter.

The rules stand here once, for lint and for our python-based backend, which gets a copy of this file
next to it in the server: it imports nothing but the standard library. Sources: ParseIntValue and
ParseBoolValue in backend src/backend_common.cc, and ONNX Runtime's
include/onnxruntime/core/common/parse_string.h, which reads what the backend passes on.
"""

import re

SHRINKAGE = "memory.enable_memory_arena_shrinkage"
DEVICE_ALLOCATOR = "session.use_device_allocator_for_initializers"


def _read_kinds(table: str) -> dict[str, str]:
    """Return the kind of each key of a table, whose lines are a kind, a colon, and keys."""
    rows = (line.split(":") for line in table.splitlines())
    return {key: kind.strip() for kind, keys in rows for key in keys.split()}


# The kind of each value, see find_problem: of a config's parameters, and of two accelerators'.
PARAMETERS = _read_kinds(
    f"""number: execution_mode intra_op_thread_count inter_op_thread_count
    number: cudnn_conv_algo_search arena_extend_strategy
    switch: enable_mem_arena enable_mem_pattern
    text: {SHRINKAGE} {DEVICE_ALLOCATOR}
    runtime size: gpu_mem_limit
    runtime flag: do_copy_in_default_stream"""
)
TENSORRT = _read_kinds(
    """flag: int8_use_native_calibration_table trt_build_heuristics_enable trt_sparsity_enable
    flag: trt_context_memory_sharing_enable trt_cuda_graph_enable trt_detailed_build_log
    flag: trt_dla_enable trt_dump_ep_context_model trt_dump_subgraphs trt_engine_cache_enable
    flag: trt_force_sequential_engine_build trt_force_timing_cache trt_timing_cache_enable
    flag: trt_layer_norm_fp32_fallback
    integer: trt_auxiliary_streams trt_builder_optimization_level trt_dla_core
    integer: trt_ep_context_embed_mode trt_max_partition_iterations trt_min_subgraph_size
    size: max_workspace_size_bytes
    text: int8_calibration_table_name trt_engine_cache_path trt_engine_cache_prefix
    text: trt_ep_context_file_path trt_extra_plugin_lib_paths trt_profile_max_shapes
    text: trt_profile_min_shapes trt_profile_opt_shapes trt_tactic_sources trt_timing_cache_path
    precision: precision_mode"""
)
CUDA = _read_kinds(
    """flag: do_copy_in_default_stream use_ep_level_unified_stream
    runtime flag: cudnn_conv1d_pad_to_nc1d cudnn_conv_use_max_workspace enable_cuda_graph use_tf32
    runtime flag: enable_skip_layer_norm_strict_mode fuse_conv_bias prefer_nhwc tunable_op_enable
    runtime flag: tunable_op_tuning_enable
    runtime size: gpu_mem_limit
    text: arena_extend_strategy cudnn_conv_algo_search default_memory_arena_cfg device_id
    text: gpu_external_alloc gpu_external_empty_cache gpu_external_free has_user_compute_stream
    text: sdpa_kernel tunable_op_max_tuning_duration_ms user_compute_stream"""
)
SWITCHES = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
PRECISIONS = ("FP32", "FP16", "BF16", "INT8")
CHOICES = {  # what the numbers from 0 on mean, for ONNX Runtime
    "execution_mode": ("ORT_SEQUENTIAL", "ORT_PARALLEL"),
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
}
# What ONNX Runtime reads: the whole text, without blanks, and without "+" in newer releases.
_FORMS = {"flag": "[01]|true|True|false|False", "integer": "-?[0-9]+", "size": "[0-9]+"}


def read_integer(text: str, bits: int = 31) -> tuple[int, str]:
    """Return the integer at the start of `text`, and the rest, as std::stoi does.

    Raises ValueError if there is none, which the backend refuses, and OverflowError if it has more
    `bits`, which the backend does not catch: the whole server aborts.
    """
    match = re.match(r"\s*([+-]?)0*(\d+)", text, re.ASCII)
    if not match:
        raise ValueError(f"failed to convert '{text}' to integral number")
    number = int(match[1] + match[2][:30])  # Python refuses to convert thousands of digits
    if not -(2**bits) <= number < 2**bits:
        raise OverflowError(f"'{text[:30]}' is too large: the native backend aborts the server")
    return number, text[match.end() :]


def read_switch(text: str) -> bool:
    """Return whether a switch is on; raise ValueError, as the backend does, if it is neither."""
    if text.lower() not in SWITCHES:
        raise ValueError(f"failed to convert '{text}' to boolean")
    return SWITCHES[text.lower()]


def find_problem(kind: str, text: str) -> str:
    """Return why the backend, or ONNX Runtime after it, refuses a value; "" if neither does.

    The kinds are `number` and `switch`, which only the backend reads; `flag`, `integer` and `size`,
    which both read, but with `runtime` only ONNX Runtime; `precision`; `text`.
    """
    try:
        if kind in ("number", "integer", "size"):
            read_integer(text, 64 if kind == "size" else 31)  # std::stoull accepts a minus sign
        elif kind in ("switch", "flag"):
            read_switch(text)
    except (ValueError, OverflowError) as error:
        return str(error)
    if kind == "precision" and text not in PRECISIONS:
        return f"unsupported precision mode '{text}' is requested"
    form = _FORMS.get(kind.removeprefix("runtime "), "(?s:.*)")
    is_read = re.fullmatch(form, text) and (kind != "runtime size" or int(text[:40]) < 2**64)
    return "" if is_read else f'Failed to parse value: "{text}"'
