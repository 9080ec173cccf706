"""Data sets: the available ones, their sources, and their images as splits in memory.

Read `catalog.py` for the list and `splits.py` for what training and validation get; `fetch.py`,
`archives.py` and `folders.py` bring files into the cache and check their digests. Knows nothing of
networks or training recipes.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.data.splits import Split as Split
    from pipeline.data.splits import load_split as load_split

__getattr__ = lazily(__name__)
