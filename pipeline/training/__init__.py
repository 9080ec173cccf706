"""Training of a network by a recipe: from the splits of a data set to a run with its records.

Read `loop.py` first, where the five lines of a training step are, then `recipes.py` and
`networks.py`; the command calls `run.py`. An interrupted run resumes exactly or not at all
(`checkpoint.py`). This room knows nothing of ONNX, Triton or servers.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.training.recipes import Recipe as Recipe
    from pipeline.training.recipes import TrainConfig as TrainConfig
    from pipeline.training.run import train_run as train_run

__getattr__ = lazily(__name__)
