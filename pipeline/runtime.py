"""An ONNX file as a predictor, in ONNX Runtime on the CPU."""

import numpy as np
import onnxruntime

from pipeline.config import IMAGES
from pipeline.errors import CheckFailedError
from pipeline.evaluate import Predictor

onnxruntime.disable_telemetry_events()  # nothing of a user's leaves the machine

# What ONNX Runtime raises; its common base is no public name.
RUNTIME_ERRORS = (
    onnxruntime.capi.onnxruntime_pybind11_state.Fail,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
    onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException,
)


def onnx_predictor(content: bytes, threads: int = 0, name: str = IMAGES.name) -> Predictor:
    """A predictor that runs the ONNX model in `content` on its input `name`; 0 threads: all cores.

    Raises CheckFailedError when ONNX Runtime refuses the model or, later, an input.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; they reach us as exceptions anyway
    try:
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise CheckFailedError(f"ONNX Runtime does not load the model: {error}") from error

    def predict(images: np.ndarray) -> np.ndarray:
        try:
            (outputs,) = session.run(None, {name: np.ascontiguousarray(images)})
        except RUNTIME_ERRORS as error:
            raise CheckFailedError(
                f"ONNX Runtime fails on a batch of {len(images)}: {error}"
            ) from error
        result: np.ndarray = outputs
        return result

    return predict
