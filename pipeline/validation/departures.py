"""Where the constants of an ONNX graph depart from what they should be, in words."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

FEW = 4  # values of a mean or a scale, which are told even where all of them changed


def from_weights(
    weights: Mapping[str, np.ndarray], found: onnx.ModelProto, few: int = FEW
) -> list[str]:
    """Where single constants of `found` depart from the module's weights of that name, in words.

    A tensor of more than `few` values of which half changed is passed over: an exporter may have
    fused it. Zeros do not count, since they stay what they are then.
    """
    there = _constants(found)
    said = []
    for name in weights.keys() & there.keys():
        wanted, other = weights[name], there[name]
        if wanted.shape == other.shape and (
            wanted.size <= few or (wanted != other).sum() < 0.5 * np.count_nonzero(wanted)
        ):
            said.append(_changed(name, wanted, other))
    return sorted(filter(None, said))


def between(made: onnx.ModelProto, found: onnx.ModelProto) -> list[str]:
    """Where `found` departs from the graph that was `made`, in words."""
    wanted, there = _constants(made), _constants(found)
    said = [_changed(name, wanted[name], there[name]) for name in wanted.keys() & there.keys()]
    gone, new = wanted.keys() - there.keys(), there.keys() - wanted.keys()
    if len(gone) + len(new) > FEW:
        said.append(f"{len(gone)} tensors are missing and {len(new)} are new")
    else:
        said += [f"{name} is missing" for name in gone] + [f"{name} is added" for name in new]
    operators = [[node.op_type for node in model.graph.node] for model in (made, found)]
    if operators[0] != operators[1]:
        said.append("it has other operators")
    return sorted(filter(None, said))


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _changed(name: str, wanted: np.ndarray, found: np.ndarray) -> str:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return f"{name} is {found.dtype} {found.shape} instead of {wanted.dtype} {wanted.shape}"
    changed = np.atleast_1d(wanted != found)
    if not changed.any():
        return ""
    if wanted.size == 1:
        return f"{name} is {found.flat[0]:.6g} instead of {wanted.flat[0]:.6g}"
    at = int(changed.ravel().argmax())
    return (
        f"{name} differs in {int(changed.sum()):,} of {wanted.size:,} values, the first "
        f"{found.flat[at]:.6g} instead of {wanted.flat[at]:.6g}"
    )
