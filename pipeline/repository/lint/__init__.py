"""Static checks of whether Triton would load a model repository and serve it correctly.

Read `check.py` first, which applies the rules of the other modules to each model; `text.py` reads a
config.pbtxt with its line numbers. Every rule names the source file of Triton that it follows. No
rule starts a server: `serving/scratch.py` does.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.repository.lint.check import lint_repository as lint_repository

__getattr__ = lazily(__name__)
