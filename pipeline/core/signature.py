"""The model's signature: what goes in, what comes out. Imports nothing heavy."""

import unicodedata
from dataclasses import dataclass
from typing import Any

MNIST_CLASSES = tuple("0123456789")


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape (without the batch) of a tensor that crosses the model's border."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} [batch, {', '.join(map(str, self.shape))}])"

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "TensorSpec":
        """The tensor that a manifest describes."""
        return cls(record["name"], record["dtype"], tuple(record["shape"]))


# The signature. 0 is paper, 255 is ink; scaling and normalizing happen inside the model.
IMAGES = TensorSpec("images", "uint8", (1, 28, 28))


def is_label(name: str) -> bool:
    """Tell whether `name` can be a class: Triton keeps each in one line of a text file in UTF-8."""
    categories = {unicodedata.category(letter) for letter in name}
    return bool(name) and categories.isdisjoint({"Cc", "Cs", "Zl", "Zp"})


def log_probabilities(classes: int) -> TensorSpec:
    """The output: natural logarithms of probabilities, one for each class."""
    return TensorSpec("log_probabilities", "float32", (classes,))


def pictures_of(dataset: str) -> str:
    """How pictures become a model's images: `digit` for MNIST, `whole` for any other data set.

    A digit is cleaned, cropped and centred as MNIST was made. A whole picture keeps its gray
    levels and what stands where: one of 28 x 28 pixels is taken as it is.
    """
    return "digit" if dataset == "mnist" else "whole"
