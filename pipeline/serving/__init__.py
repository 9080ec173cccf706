"""A local tritonserver that answers its golden sets correctly: find, start, watch, change, stop it.

Read `serve.py` first, then `tritonserver.py` (which server can run here) and `supervise.py` (the
server that `pipeline serve` keeps running); `swap.py` promotes a version under load. The files in
`backend/` run inside the server and import nothing from this package. This room knows nothing about
training or about how an export is validated.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.serving.settings import ServeConfig as ServeConfig
    from pipeline.serving.supervise import serve_repository as serve_repository

__getattr__ = lazily(__name__)
