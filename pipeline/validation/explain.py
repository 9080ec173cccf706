"""Explanations of why a file does not answer as its module does: known causes are tried in turn.

Also lists where the constants of an ONNX graph differ from the expected ones.
"""

# Shape letters: B batch, K classes.

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor, judge

IMAGES = 64  # images that the causes are tried on
# A cause is recognized when reversing it leaves at most this share of the median difference.
REMAINS = 0.02
ROUNDING = 1e-5  # of the largest output: smaller differences need no cause
MOVED = 0.01  # of the median difference: how far a row alone may differ from it in a batch
Change = Callable[[np.ndarray], np.ndarray]


def _log_softmax(outputs: np.ndarray) -> np.ndarray:
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    normalized: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalized


# Changes of the images that would make the file's answers the expected ones.
PICTURES: dict[str, Change] = {
    "the ink is inverted: it answers rightly for negatives": (
        lambda images: (
            255 - images if images.dtype == np.uint8 else images.max() + images.min() - images
        )
    ),
    "images are transposed: it answers rightly when rows and columns change places": (
        lambda images: images.swapaxes(-1, -2)
    ),
    "images are mirrored from left to right": lambda images: images[..., ::-1],
    "images are upside down": lambda images: images[..., ::-1, :],
    "the colour channels are in reverse order": lambda images: images[:, ::-1],
}


def _softmax(outputs: np.ndarray) -> np.ndarray:
    chances: np.ndarray = np.exp(_log_softmax(outputs))
    return chances


# Changes of the file's answers that would make them the expected ones.
ANSWERS: dict[str, Change] = {
    "the final log-softmax is missing": _log_softmax,
    "the final softmax is missing": _softmax,
    "it answers probabilities, not their logarithms": (
        lambda outputs: np.log(np.maximum(outputs, 1e-300))
    ),
    "it answers logarithms, not probabilities": lambda outputs: np.exp(np.minimum(outputs, 700)),
}
# Changes of the expected answers that would make them the file's.
ADDED: dict[str, Change] = {
    "a softmax was added at its end": _softmax,
    "a log-softmax was added at its end": _log_softmax,
}


def diagnose(
    candidate: Predictor, images: np.ndarray, expected: np.ndarray, classes: Sequence[str]
) -> list[str]:
    """Return the cause that explains why the answers to images (B, ...) are not as expected (B, K).

    The list is empty when no known cause explains it.
    """
    images = images[:IMAGES]
    expected = expected[: len(images)]
    together = _ask(candidate, images, expected)
    if together is None:
        return []
    usual = _apart(expected, together)
    one_by_one = [_ask(candidate, images[row : row + 1], expected[:1]) for row in range(8)]
    alone = [answer for answer in one_by_one if answer is not None]
    is_more_than_rounding = usual > ROUNDING * max(1, float(np.abs(expected).max()))
    if is_more_than_rounding and len(alone) == len(one_by_one):
        between = judge(np.concatenate(alone), together[:8])
        if between.errors.max() > MOVED * usual:
            return [
                "a row's answer depends on its batch or place: a reshape mixes rows, or something "
                "normalizes over the batch; keep the batch axis first and apart"
            ]
    left = {}
    for what, change in PICTURES.items() if images.ndim == 4 else ():
        answer = _ask(candidate, np.ascontiguousarray(change(images)), expected)
        left[what] = np.inf if answer is None else _apart(expected, answer)
    outputs = together.astype(np.float64)
    left |= {what: _apart(expected, change(outputs)) for what, change in ANSWERS.items()}
    added = {what: _apart(change(expected), outputs) for what, change in ADDED.items()}
    for causes in (left, added):
        best = min(causes, key=lambda what: causes[what])
        if causes[best] < REMAINS * usual:
            return [best]
    # The classes that changed places, if that explains the difference.
    apart = np.abs(expected[:, :, np.newaxis] - outputs[:, np.newaxis]).mean(axis=0)  # (K, K)
    order = apart.argmin(axis=1)  # the column that has each class's answer
    moved = [index for index in range(len(order)) if order[index] != index]
    is_order = len(set(order)) == len(order)
    if not moved or not is_order or _apart(expected, outputs[:, order]) >= REMAINS * usual:
        return []
    named = ", ".join(f"{classes[order[index]]} for {classes[index]}" for index in moved[:6])
    return [f"labels are swapped: it says {named}"]


def _apart(expected: np.ndarray, outputs: np.ndarray) -> float:
    """Return the median of the rows' largest differences."""
    return float(np.median(judge(expected, outputs).errors))


def _ask(candidate: Predictor, images: np.ndarray, like: np.ndarray) -> np.ndarray | None:
    """Return the answers, or None if they have the wrong shape or are not finite."""
    try:
        outputs = candidate(images)
    except CheckFailedError:
        return None
    is_whole = outputs.shape == (len(images), like.shape[1]) and np.isfinite(outputs).all()
    return outputs if is_whole else None


FEW = 4  # values: so small a tensor is reported even if all of it changed


def from_weights(
    weights: Mapping[str, np.ndarray], found: onnx.ModelProto, few: int = FEW
) -> list[str]:
    """List where constants of `found` differ from the module's weights of the same name.

    A tensor of more than `few` values is skipped if half of its nonzero values changed: an exporter
    may have fused it, which leaves zeros as they are.
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
    """List where the graph `found` differs from the expected graph `made`."""
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
