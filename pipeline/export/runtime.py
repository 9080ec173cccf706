"""Predictors that run an ONNX file in ONNX Runtime, on the requested provider and no other."""

import contextlib
import io
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnxruntime

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.evaluate import Predictor

onnxruntime.disable_telemetry_events()  # no data of a user may leave the machine

# What ONNX Runtime raises; their common base class is not public.
RUNTIME_ERRORS = (
    onnxruntime.capi.onnxruntime_pybind11_state.Fail,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
    onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException,
)
_CPU = "CPUExecutionProvider"
# TF32 off, so that a GPU's answers differ from a CPU's by rounding only.
_CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})
PROVIDERS: dict[str, list[Any]] = {
    "cpu": [_CPU],
    "cuda": [_CUDA, _CPU],
    "tensorrt": [("TensorrtExecutionProvider", {"trt_fp16_enable": "False"}), _CUDA, _CPU],
}


def onnx_predictor(content: bytes, threads: int = 0, provider: str = "cpu") -> Predictor:
    """Return a predictor that runs the ONNX model in `content`; 0 threads means all cores.

    Raises PipelineError when the provider (cpu, cuda or tensorrt) is not available, and
    CheckFailedError when a node would run on another provider, or when ONNX Runtime refuses the
    model. The predictor raises CheckFailedError when ONNX Runtime refuses an input.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # fatal only: errors are raised, fallbacks are checked below
    if provider != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # TensorRT has no option of its own for it
        onnxruntime.set_default_logger_severity(4)  # fallbacks are checked below
        with contextlib.redirect_stdout(io.StringIO()) as lacking:  # standard output is for results
            onnxruntime.preload_dlls()  # the CUDA libraries that were installed with torch
    try:
        session = onnxruntime.InferenceSession(content, options, PROVIDERS[provider])
    except RUNTIME_ERRORS as error:
        raise CheckFailedError(f"ONNX Runtime does not load the model: {error}") from error
    if provider != "cpu":
        placed = [
            (str(part.ep_name), f"{node.op_type} {node.name}".strip())
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
        first = next(iter(lacking.getvalue().splitlines()), "")
        require_provider(provider, session.get_providers(), placed, first)
    (images,) = session.get_inputs()

    def predict(rows: np.ndarray) -> np.ndarray:
        try:
            (outputs,) = session.run(None, {images.name: np.ascontiguousarray(rows)})
        except RUNTIME_ERRORS as error:
            message = f"ONNX Runtime fails on a batch of {len(rows)}: {error}"
            raise CheckFailedError(message) from error
        result: np.ndarray = outputs
        return result

    return predict


def require_provider(
    provider: str, loaded: Iterable[str], placed: Iterable[tuple[str, str]], lacking: str = ""
) -> None:
    """Raise unless the provider was loaded and runs every node: no node may fall back silently.

    Raises PipelineError when the provider was not loaded, and CheckFailedError with the names of
    the nodes that fell back. `placed` has the provider and the description of each node.
    """
    wanted = PROVIDERS[provider][0][0] if provider != "cpu" else _CPU
    if wanted not in loaded:
        raise PipelineError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load its {wanted} here: it needs an "
            "NVIDIA GPU and the CUDA (and TensorRT) libraries that it was built for"
            f"{f' ({lacking})' if lacking else ''}; '--provider cpu' needs neither"
        )
    fallen = [f"{node} on {where}" for where, node in placed if where != wanted]
    if fallen:
        shown = ", ".join(fallen[:10]) + (" ..." if len(fallen) > 10 else "")
        raise CheckFailedError(f"{len(fallen)} nodes do not run on {wanted}: {shown}")
