"""A picture file of any size to the model's image: uint8, 28 x 28, made as MNIST was made.

Read `read.py` first: it decodes a file, then `ink.py` finds what was written and `crop.py` centres
it, by the rules of RULES.md in whole numbers. Knows pillow and numpy; nothing of data sets, of
models, or of what an image is read for.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.images.read import read_image as read_image

__getattr__ = lazily(__name__, {"read_image": "read"})
