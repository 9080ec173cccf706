"""The model's signature: its input and output tensors. Imports nothing heavy."""

import unicodedata
from dataclasses import dataclass
from typing import Any

MNIST_CLASSES = tuple("0123456789")
PICTURES = ("digit", "whole", "line")  # how pictures become images: see pictures_of
SCORES = "scores"  # the second output of an exact variant: whole numbers, int32


@dataclass(frozen=True)
class TensorSpec:
    """The name, type and shape (without the batch) of an input or output of the model."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} [batch, {', '.join(map(str, self.shape))}])"

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "TensorSpec":
        """Return the tensor that a manifest's record describes."""
        return cls(record["name"], record["dtype"], tuple(record["shape"]))


# The signature. 0 is paper, 255 is ink; scaling and normalizing happen inside the model.
IMAGES = TensorSpec("images", "uint8", (1, 28, 28))
# That of a model which reads numbers: strips of at most so many digits.
STRIPS = TensorSpec("images", "uint8", (1, 28, 280))
TEXT_LENGTH = 13
STEPS = 94  # of its answer: one for every three columns


def is_label(name: str) -> bool:
    """Return whether `name` can be a class: Triton keeps each as a line of a UTF-8 text file."""
    categories = {unicodedata.category(letter) for letter in name}
    return bool(name) and categories.isdisjoint({"Cc", "Cs", "Zl", "Zp"})


def log_probabilities(classes: int, steps: int = 0) -> TensorSpec:
    """Return the output tensor: natural logarithms of probabilities, one for each class.

    With `steps`, the model answers a string: at each step a probability for each class, and for
    the blank after them (see `strings.py`).
    """
    shape = (steps, classes + 1) if steps else (classes,)
    return TensorSpec("log_probabilities", "float32", shape)


def tensors_of(dataset: str, classes: int) -> tuple[TensorSpec, TensorSpec]:
    """Return the input and the output tensor of a network that was trained on the data set."""
    if pictures_of(dataset) == "line":
        return STRIPS, log_probabilities(classes, STEPS)
    return IMAGES, log_probabilities(classes)


def pictures_of(dataset: str) -> str:
    """Return how pictures become a model's images: `digit` for MNIST, `whole` for most others.

    MNIST joined with a folder is MNIST. For `numbers` it is `line`: a line of digits.

    A digit is cleaned, cropped and centred in the way MNIST was made. A whole picture keeps its
    gray levels and positions: one of 28 x 28 pixels is used unchanged.
    """
    return {"mnist": "digit", "numbers": "line"}.get(dataset.partition("+")[0], "whole")
