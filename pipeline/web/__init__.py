"""The page to draw on, and the gateway behind it that asks Triton.

Read `gateway.py` first, then `guard.py` and `limits.py`, which hold off other sites, large pictures
and crowds; `page/` is what the browser gets. Only this room knows starlette. It trusts nothing that
comes in, and never gives Triton's own port away.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.web.server import serve_page as serve_page
    from pipeline.web.settings import GatewayConfig as GatewayConfig

__getattr__ = lazily(__name__, {"GatewayConfig": "settings", "serve_page": "server"})
