"""The connection over HTTP."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from pipeline.client.connection import Connection
from pipeline.client.endpoint import RemoteModel
from pipeline.client.faults import Fault, of_connection, of_http, short


class _Triton(tritonclient.http.aio.InferenceServerClient):  # type: ignore[misc]
    """tritonclient's client, which raises a Fault for each status but 200 and for a redirect.

    The original follows redirects, with the headers, in which keys travel; and it drops an
    answer's headers, among them Retry-After.
    """

    async def _get(self, request_uri: str, headers: Any, query_params: Any) -> Any:
        return await self._send("GET", request_uri, headers)

    async def _post(
        self, request_uri: str, request_body: bytes, headers: Any, query_params: Any
    ) -> Any:
        return await self._send("POST", request_uri, headers, request_body)

    async def _send(
        self, verb: str, path: str, headers: Mapping[str, Any], body: bytes | None = None
    ) -> aiohttp.ClientResponse:
        if self._stub.closed:
            raise Fault("lost", "the client was closed")
        # Without this, aiohttp asks for compressed answers, which cost Triton more than they save.
        plain = {"Accept-Encoding": "identity"}
        response = await self._stub.request(
            verb,
            f"{self._url}/{path}",
            data=body,
            headers=plain | {name: str(value) for name, value in headers.items()},
            allow_redirects=False,
        )
        if response.status != 200:
            raise of_http(response.status, await response.read(), response.headers)
        return response  # type: ignore[no-any-return]


class HttpConnection(Connection):
    """A connection over HTTP or HTTPS."""

    library = tritonclient.http

    def __init__(self, target: RemoteModel) -> None:
        super().__init__(target)
        is_secure = target.endpoint.is_secure
        self.triton = _Triton(
            target.endpoint.address,
            conn_limit=0,  # no limit
            conn_timeout=None,  # the caller's deadline is around each call
            ssl=is_secure,
            ssl_context=target.certificates.context() if is_secure else True,
        )

    @contextlib.contextmanager
    def _library_faults(self) -> Iterator[None]:
        try:
            yield
        except aiohttp.ClientConnectorDNSError as error:
            raise Fault("unnamed", short(str(error.os_error))) from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise of_connection(error.certificate_error, is_connected=False) from error
        except aiohttp.ClientConnectorError as error:  # includes TLS errors
            raise of_connection(error.os_error, is_connected=False) from error
        except aiohttp.ClientConnectionError as error:  # also of a client that was closed
            raise Fault("lost", short(str(error)) or "it closed the connection") from error
        except aiohttp.ClientPayloadError as error:
            raise Fault("lost", "it closed the connection within an answer") from error
        except aiohttp.ClientResponseError as error:  # its message quotes what came, in bytes
            raise Fault("alien", "its answer is not HTTP: is this the gRPC port?") from error
        except aiohttp.ClientError as error:
            raise Fault("alien", short(str(error)) or type(error).__name__) from error
        except InferenceServerException as error:
            raise Fault("alien", short(error.message())) from error
        except OSError as error:
            raise of_connection(error, is_connected=True) from error
