"""Equality of an exact model's scores: in eager PyTorch, and at each level of ONNX Runtime."""

# Shape letters: N rows, S scores.

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor, predict
from pipeline.export.runtime import onnx_predictor

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
THREADS = (1, 2)


def scores_predictor(network: nn.Module, dtype: torch.dtype = torch.float32) -> Predictor:
    """Return a predictor of an exact network's scores in eager PyTorch.

    Without NNPACK, whose convolution by Winograd computes with fractions, so that it rounds.
    """
    copied = copy.deepcopy(network).to(dtype)

    def predict_scores(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.backends.nnpack.flags(enabled=False):
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
    for level in LEVELS:
        for threads in THREADS:
            predictor = onnx_predictor(content, threads, outputs=(1,), level=level)
            if problem := find_unequal(scores, predict(predictor, rows)):
                yield f"{level}, {threads} threads: {problem}"


def find_unequal(expected: np.ndarray, scores: np.ndarray) -> str:
    """Return which rows of scores (N, S) are not equal, the first by name; empty if all are."""
    if scores.shape != expected.shape:
        return f"the scores have shape {list(scores.shape)}, not {list(expected.shape)}"
    rows = np.flatnonzero((scores != expected).any(axis=1))
    return (
        f"{len(rows):,} of {len(scores):,} are not equal, the first is {rows[0]}"
        if len(rows)
        else ""
    )
