"""Whether files and servers answer as the module that was trained: evidence, and its reasons.

Read `compare.py` first (a file against its module in float64), then `export.py`, `repository.py`
and `servers.py`: the validation of an export, of a repository, of running servers. The last of
them does without torch. Knows nothing of how a model was trained.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.validation.compare import Criterion as Criterion
    from pipeline.validation.export import prove_export as prove_export
    from pipeline.validation.repository import prove_repository as prove_repository
    from pipeline.validation.servers import prove_servers as prove_servers

__getattr__ = lazily(
    __name__,
    {
        "Criterion": "compare",
        "prove_export": "export",
        "prove_repository": "repository",
        "prove_servers": "servers",
    },
)
