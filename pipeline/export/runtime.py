"""Predictors that run an ONNX file in ONNX Runtime, on the requested provider and no other."""

import contextlib
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.evaluate import Predictor
from pipeline.core.machine import cores, quota_cores

onnxruntime.disable_telemetry_events()  # no data of a user may leave the machine

# What ONNX Runtime raises; their common base class is not public.
_ERRORS = "Fail InvalidArgument InvalidGraph InvalidProtobuf NotImplemented RuntimeException"
RUNTIME_ERRORS = tuple(getattr(onnxruntime_pybind11_state, name) for name in _ERRORS.split())
_CPU = "CPUExecutionProvider"
# TF32 off, so that a GPU's answers differ from a CPU's by rounding only.
_CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})
PROVIDERS: dict[str, list[Any]] = {
    "cpu": [_CPU],
    "cuda": [_CUDA, _CPU],
    "tensorrt": [("TensorrtExecutionProvider", {"trt_fp16_enable": "False"}), _CUDA, _CPU],
}


def onnx_predictor(
    content: bytes,
    threads: int = 0,
    provider: str = "cpu",
    outputs: Sequence[int] = (0,),
    level: str = "ORT_ENABLE_ALL",
) -> Predictor:
    """Return a predictor that runs the ONNX model in `content`; 0 threads means all cores.

    In a container with a quota, these are the cores that the quota pays for. The predictor answers
    the first output, or several, side by side. `level` is ONNX Runtime's name of how far it
    optimizes the graph.

    Raises PipelineError when the provider (cpu, cuda or tensorrt) is not available, and
    CheckFailedError when a node would run on another provider, or when ONNX Runtime refuses the
    model. The predictor raises CheckFailedError when ONNX Runtime refuses an input.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or (cores() if quota_cores() else 0)
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4  # fatal only: errors are raised, fallbacks are checked below
    if provider != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # TensorRT has no option of its own for it
        onnxruntime.set_default_logger_severity(4)  # fallbacks are checked below
        with contextlib.redirect_stdout(io.StringIO()) as printed:  # standard output is for results
            onnxruntime.preload_dlls()  # the CUDA libraries that were installed with torch
    try:
        session = onnxruntime.InferenceSession(content, options, PROVIDERS[provider])
    except RUNTIME_ERRORS as error:
        raise CheckFailedError(f"ONNX Runtime does not load the model: {error}") from error
    if provider != "cpu":
        nodes = [
            (str(part.ep_name), f"{node.op_type} {node.name}".strip())
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
        reason = next(iter(printed.getvalue().splitlines()), "")
        require_provider(provider, session.get_providers(), nodes, reason)
    (images,) = session.get_inputs()
    names = [session.get_outputs()[index].name for index in outputs]

    def predict(rows: np.ndarray) -> np.ndarray:
        try:
            answers = session.run(names, {images.name: np.ascontiguousarray(rows)})
        except RUNTIME_ERRORS as error:
            raise CheckFailedError(f"ONNX Runtime fails on {len(rows)} images: {error}") from error
        return np.asarray(answers[0] if len(answers) == 1 else np.concatenate(answers, axis=1))

    return predict


def require_provider(
    provider: str, loaded: Iterable[str], nodes: Iterable[tuple[str, str]], reason: str = ""
) -> None:
    """Raise unless the provider was loaded and runs every node: no node may fall back silently.

    Raises PipelineError when the provider was not loaded, and CheckFailedError with the names of
    the nodes that fell back. `nodes` has the provider and the description of each node; `reason`
    is why the provider was not loaded, if known.
    """
    wanted = PROVIDERS[provider][0][0] if provider != "cpu" else _CPU
    if wanted not in loaded:
        raise PipelineError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load its {wanted} here. Install the "
            "NVIDIA driver and the CUDA (and TensorRT) libraries that it was built for, or use "
            f"'--provider cpu'{f' ({reason})' if reason else ''}"
        )
    elsewhere = [f"{node} on {name}" for name, node in nodes if name != wanted]
    if elsewhere:
        shown = ", ".join(elsewhere[:10]) + (" ..." if len(elsewhere) > 10 else "")
        raise CheckFailedError(f"{len(elsewhere)} nodes do not run on {wanted}: {shown}")
