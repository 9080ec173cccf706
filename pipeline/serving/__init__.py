"""A tritonserver that answers its golden sets correctly: found, started, watched, changed, stopped.

Read `serve.py` first, then `tritonserver.py` (which server runs here) and `supervise.py` (what
`pipeline serve` keeps); `swap.py` promotes a version under load. `backend/` runs inside the server
and imports nothing of ours. Knows nothing of training or of how a proof is made.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.serving.settings import ServeConfig as ServeConfig
    from pipeline.serving.supervise import serve_repository as serve_repository

__getattr__ = lazily(__name__, {"ServeConfig": "settings", "serve_repository": "supervise"})
