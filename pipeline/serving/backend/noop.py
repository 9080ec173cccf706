"""A model that answers zeros: what a server and its Python backend cost when nothing is computed.

The benchmark serves it beside a real model, as model.py of `backend: "python"`.
"""

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Zeros of the shape that the config promises, one row for each image."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read which output to fill."""
        (self._output,) = json.loads(args["model_config"])["output"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """An answer of zeros to each request."""
        name, dims = self._output["name"], self._output["dims"]
        answers = []
        for request in requests:
            rows = request.inputs()[0].shape()[0]
            zeros = np.zeros((rows, *dims), np.float32)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor(name, zeros)]))
        return answers
