"""Reference of a validation: a module in float64, run twice to check its steadiness."""

# Shape letters: N rows, B batch, K classes.

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.evaluate import Predictor, judge
from pipeline.validation.compare import Criterion, bounds, shifted

BATCH = 64  # images in a call
CALLS = 16  # calls in a round, at least

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})


class _InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Mode that runs every operation in float64, even `.float()` or `dtype=torch.float32`."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map(_widened, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    if isinstance(value, Tensor) and value.dtype in _NARROW:
        return value.double()
    return value


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
            message = f"the module does not run in float64, which its proof needs: {error}"
            raise PipelineError(message) from error
        finally:
            torch.set_default_dtype(usual)
        if outputs.dtype != torch.float64:
            raise PipelineError(f"in float64 the module still answers in {outputs.dtype}")
        answers: np.ndarray = outputs.numpy()
        return answers

    return predict


def steady_answers(
    predictor: Predictor, rows: np.ndarray, criterion: Criterion, what: str
) -> np.ndarray:
    """Run a module twice on rows (N, ...) and return its first answers (N, K).

    Both rounds use a random order of batches and random places in memory; the second round has
    another number of threads. Raises CheckFailedError when a row's two answers differ by more than
    float32 rounding: then the module keeps state, draws random numbers, or depends on how it is
    run. Answers that are not finite are returned unchecked.
    """
    # Few rows come in smaller batches, so that a module that counts its calls is called often.
    size = min(BATCH, max(1, len(rows) // CALLS))
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
                answers[start] = predictor(shifted(images) if rng.random() < 0.5 else images)
            rounds.append(np.concatenate([answers[start] for start in starts]))
    finally:
        torch.set_num_threads(usual)
    first, second = rounds
    if not np.isfinite(first).all():
        return first  # the caller refuses it and names the row
    between = judge(first, second, bounds(first, np.zeros(len(rows)), criterion))
    if between.is_beyond.any():
        row = int(between.errors.argmax())
        raise CheckFailedError(
            f"the module answers a row differently when it is asked again ({what}): "
            f"{int(between.is_beyond.sum()):,} of {len(rows):,} rows, row {row} by "
            f"{between.errors[row]:.3g}. Its answers must depend on the images alone, not on their "
            "address, earlier calls, random numbers or threads. Call .eval() on it, and keep no "
            "state in 'forward'"
        )
    return first
