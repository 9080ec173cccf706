"""A module in float64: what it would say if nothing were rounded."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pipeline.errors import PipelineError
from pipeline.evaluate import Predictor

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})


class _InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Every operation in float64, also where a module says `.float()` or `dtype=torch.float32`."""

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
    """A predictor that runs a copy of `model` in float64, on the CPU.

    Raises PipelineError when the module cannot be run so, or still answers in another type.
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
            raise PipelineError(
                f"the module does not run in float64, which its proof needs: {error}"
            ) from error
        finally:
            torch.set_default_dtype(usual)
        if outputs.dtype != torch.float64:
            raise PipelineError(f"in float64 the module still answers in {outputs.dtype}")
        answers: np.ndarray = outputs.numpy()
        return answers

    return predict
