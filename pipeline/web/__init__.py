"""The page to draw on, and the gateway between it and Triton.

Read `gateway.py` first, then `guard.py` and `limits.py`, which refuse requests from other sites,
too large pictures and too many requests; `collect.py` stores what is corrected on the page, which
is in `page/`. Only this room uses starlette. It trusts no input, and never reveals Triton's own
port.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.web.server import serve_page as serve_page
    from pipeline.web.settings import GatewayConfig as GatewayConfig

__getattr__ = lazily(__name__)
