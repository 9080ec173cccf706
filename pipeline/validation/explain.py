"""Why a file does not say what its module says, in words: each cause is tried and recognized.

Where the constants of an ONNX graph depart from what they should be, in words.
"""

# Shape letters: B batch, K classes.

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor, judge

IMAGES = 64  # that are tried
# A cause is recognized when its reversal takes away all but this share of the usual difference.
REMAINS = 0.02
ROUNDING = 1e-5  # of the largest output: rows differ by this much for no cause of ours
MOVED = 0.01  # of it, by which a row may differ between a batch of its own and a larger one
Change = Callable[[np.ndarray], np.ndarray]


def _log_softmax(outputs: np.ndarray) -> np.ndarray:
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    normalized: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalized


# What would be right if the file did this to its images, or left this out of its answers.
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


# What would make its answers the expected ones.
ANSWERS: dict[str, Change] = {
    "the final log-softmax is missing": _log_softmax,
    "the final softmax is missing": _softmax,
    "it answers probabilities, not their logarithms": (
        lambda outputs: np.log(np.maximum(outputs, 1e-300))
    ),
    "it answers logarithms, not probabilities": lambda outputs: np.exp(np.minimum(outputs, 700)),
}
# What would make the expected answers its own.
ADDED: dict[str, Change] = {
    "a softmax was added at its end": _softmax,
    "a log-softmax was added at its end": _log_softmax,
}


def diagnose(
    candidate: Predictor, images: np.ndarray, expected: np.ndarray, classes: Sequence[str]
) -> list[str]:
    """The causes that explain why answers to images (B, ...) are not as expected (B, K).

    None when no cause that is known here explains it.
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
    # Which classes changed places, if that explains it.
    apart = np.abs(expected[:, :, np.newaxis] - outputs[:, np.newaxis]).mean(axis=0)  # (K, K)
    order = apart.argmin(axis=1)  # where each class's answer stands
    moved = [index for index in range(len(order)) if order[index] != index]
    is_order = len(set(order)) == len(order)
    if not moved or not is_order or _apart(expected, outputs[:, order]) >= REMAINS * usual:
        return []
    named = ", ".join(f"{classes[order[index]]} for {classes[index]}" for index in moved[:6])
    return [f"labels are swapped: it says {named}"]


def _apart(expected: np.ndarray, outputs: np.ndarray) -> float:
    """The median of the rows' largest differences."""
    return float(np.median(judge(expected, outputs).errors))


def _ask(candidate: Predictor, images: np.ndarray, like: np.ndarray) -> np.ndarray | None:
    """The answers, if they are of the right shape and finite."""
    try:
        outputs = candidate(images)
    except CheckFailedError:
        return None
    is_whole = outputs.shape == (len(images), like.shape[1]) and np.isfinite(outputs).all()
    return outputs if is_whole else None


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
