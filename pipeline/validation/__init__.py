"""Validation of files and servers: whether they answer as their module does, with evidence.

Read `compare.py` first (a file against its module in float64), then `export.py`, `repository.py`
and `servers.py`: the validation of an export, of a repository, and of running servers. The last
one does not import torch. This room knows nothing of how a model was trained.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.validation.compare import Criterion as Criterion
    from pipeline.validation.export import validate_export as validate_export
    from pipeline.validation.repository import validate_repository as validate_repository
    from pipeline.validation.servers import validate_servers as validate_servers

__getattr__ = lazily(__name__)
