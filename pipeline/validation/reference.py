"""Reference of a validation: a module in float64, run twice to check its steadiness."""

# Shape letters: N rows, B batch, K classes.

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.evaluate import Predictor, judge
from pipeline.validation.compare import Criterion, compute_bounds, shift

_WIDE = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64)


class _InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Mode that runs every operation in float64, even `.float()` or `dtype=torch.float32`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, dict(kwargs or {}))
        given = tree_map_only(Tensor, lambda x: x.to(_WIDE.get(x.dtype, x.dtype)), given)
        args, kwargs = tree_map_only(torch.dtype, lambda dtype: _WIDE.get(dtype, dtype), given)
        return func(*args, **kwargs)


def reference_predictor(model: nn.Module) -> Predictor:
    """Return a predictor that runs a copy of `model` in float64, on the CPU.

    The predictor raises PipelineError when the module cannot run in float64, or still answers in
    another type.
    """
    double = copy.deepcopy(model).double().cpu()
    double.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster

    def predict(images: np.ndarray) -> np.ndarray:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad(), _InDouble():  # type: ignore[no-untyped-call]
                outputs = double(torch.from_numpy(images))
        except RuntimeError as error:
            raise PipelineError(f"validation cannot run the module in float64: {error}") from error
        finally:
            torch.set_default_dtype(usual)
        if outputs.dtype != torch.float64:
            raise PipelineError(f"the module answers in {outputs.dtype} when it runs in float64")
        return np.asarray(outputs)

    return predict


def require_steady(
    predictor: Predictor, rows: np.ndarray, criterion: Criterion, what: str
) -> np.ndarray:
    """Run a module twice on rows (N, ...) and return its first answers (N, K).

    Both rounds use a random order of batches and random places in memory; the second round has
    another number of threads. Raises CheckFailedError when a row's two answers differ by more than
    float32 rounding: then the module keeps state, draws random numbers, or depends on how it is
    run. Answers that are not finite are returned unchecked.
    """
    # At most 64 rows, and at least 16 calls, so that a module that counts its calls is found out.
    size = min(64, max(1, len(rows) // 16))
    starts = range(0, len(rows), size)
    rng = np.random.default_rng(0)
    usual = torch.get_num_threads()
    rounds = []
    try:
        for number in (usual, 1 if usual > 1 else 2):
            torch.set_num_threads(number)
            answers: dict[int, np.ndarray] = {}
            for start in rng.permutation(starts):
                images = rows[start : start + size]
                answers[start] = predictor(shift(images) if rng.random() < 0.5 else images)
            rounds.append(np.concatenate([answers[start] for start in starts]))
    finally:
        torch.set_num_threads(usual)
    first, second = rounds
    if not np.isfinite(first).all():
        return first  # the caller refuses it and names the row
    judgement = judge(first, second, compute_bounds(first, 0.0, criterion))
    if judgement.is_beyond.any():
        row = int(judgement.errors.argmax())
        raise CheckFailedError(
            f"the module's second answer ({what}) differs from its first in "
            f"{judgement.is_beyond.sum():,} of {len(rows):,} rows (row {row} by "
            f"{judgement.errors[row]:.3g}). Call .eval() on it; it must not depend on random "
            "numbers, threads, memory addresses or earlier calls"
        )
    return first
