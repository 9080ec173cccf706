"""A model that only answers zeros, to measure the cost of a server and its Python backend.

The benchmark serves it next to a real model, as model.py of `backend: "python"`.
"""

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """A model whose output is zeros of the config's shape, one row for each image."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the output's name and dims from the config."""
        (self._output,) = json.loads(args["model_config"])["output"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with zeros."""
        name, dims = self._output["name"], self._output["dims"]
        answers = []
        for request in requests:
            rows = request.inputs()[0].shape()[0]
            zeros = np.zeros((rows, *dims), np.float32)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor(name, zeros)]))
        return answers
