"""Clients of a served model over HTTP and gRPC, for programs, commands and the gateway.

Read `async_client.py` first: batching, retries, deadlines. `client.py` runs it in a thread for
programs without asyncio; `faults.py` lists what can go wrong. Needs no extra: it imports neither
torch nor ONNX Runtime (but for `LocalClient`), and starts no server.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.client.async_client import AsyncClient as AsyncClient
    from pipeline.client.client import Client as Client
    from pipeline.client.endpoint import Certificates as Certificates
    from pipeline.client.local import LocalClient as LocalClient
    from pipeline.client.prediction import Prediction as Prediction

__getattr__ = lazily(__name__)
