"""Equality of an exact model's scores: in eager PyTorch, and at each level of ONNX Runtime."""

# Shape letters: N rows, S scores.

import copy
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor, find_unequal, predict
from pipeline.export.runtime import onnx_predictor

# Of optimization, without the highest, at which everything else runs.
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED")
THREADS = (1, 2)


def scores_predictor(
    network: nn.Module, dtype: torch.dtype = torch.float32, has_nnpack: bool = False
) -> Predictor:
    """Return a predictor of an exact network's scores in eager PyTorch.

    Without NNPACK, whose convolution by Winograd computes with fractions, so that it rounds.
    """
    copied = copy.deepcopy(network).to(dtype)
    if dtype == torch.float64:  # a third faster
        copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def predict_scores(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.backends.nnpack.flags(enabled=has_nnpack):
            return np.asarray(copied(torch.from_numpy(images))[1])

    return predict_scores


def eager_scores(network: nn.Module, rows: np.ndarray) -> np.ndarray:
    """Return an exact network's scores int32 (N, S); raise CheckFailedError if float64 differs."""
    scores, double = (
        predict(scores_predictor(network, dtype), rows) for dtype in (torch.float32, torch.float64)
    )
    if problem := find_unequal(scores, double):
        raise CheckFailedError(f"the exact network is not equal in float32 and float64: {problem}")
    return scores


def compare_levels(content: bytes, rows: np.ndarray, scores: np.ndarray) -> Iterator[str]:
    """Yield the levels of optimization at which a file's scores for rows (N, ...) are not equal."""
    for level, threads in itertools.product(LEVELS, THREADS):
        predictor = onnx_predictor(content, threads, outputs=(1,), level=level)
        if problem := find_unequal(scores, predict(predictor, rows)):
            yield f"{level}, {threads} threads: {problem}"
