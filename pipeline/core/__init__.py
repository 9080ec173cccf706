"""The basis of every room: errors and their exit codes, paths, files, the model's signature.

Read `signature.py` and `paths.py` first; `errors.py` has one class for each kind of failure. This
room is below all others: it knows no stage of the pipeline, no runtime and no server, and needs
numpy only.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.core.errors import CheckFailedError as CheckFailedError
    from pipeline.core.errors import CorruptError as CorruptError
    from pipeline.core.errors import LostError as LostError
    from pipeline.core.errors import PipelineError as PipelineError
    from pipeline.core.errors import ServerError as ServerError
    from pipeline.core.errors import SlowError as SlowError
    from pipeline.core.paths import Paths as Paths

__getattr__ = lazily(__name__)
