"""Conversion of a picture file of any size to the model's image: uint8, 28 x 28, as in MNIST.

Read `read.py` first: it decodes a file, then `ink.py` finds the ink and `crop.py` centres it, by
the rules of RULES.md, in integer arithmetic. `rule.py` prepares it for a third-party network. Uses
pillow and numpy; knows nothing of data sets, of models, or of the purpose of an image.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.images.read import read_image as read_image

__getattr__ = lazily(__name__)
