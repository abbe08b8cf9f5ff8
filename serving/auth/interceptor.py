"""Lets calls with a known API key pass, and only those. One of a frontend's grpc.aio interceptors.

A key comes as metadata `authorization: Bearer KEY` or `x-api-key: KEY`. Health checks need none,
because load balancers have none; all else does, reflection too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from ...errors import QuireError, Unauthenticated
from .caller import set_tenant
from .key_file import KeyTable

_EXEMPT = "/grpc.health.v1.Health/"

_HOW = "send metadata `authorization: Bearer KEY` or `x-api-key: KEY`"


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Knows no key until it is given some.

    Attributes:
      refused: hears why a call was turned away.
    """

    def __init__(self) -> None:
        self._table = KeyTable()
        self.refused: Callable[[QuireError], None] = lambda error: None

    def use(self, table: KeyTable) -> None:
        """The keys in force from now on."""
        self._table = table

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if str(handler_call_details.method).startswith(_EXEMPT):
            return handler
        try:
            tenant = self._tenant(handler_call_details.invocation_metadata)
        except Unauthenticated as error:
            self.refused(error)
            return _refusal(handler, str(error))
        set_tenant(tenant)
        return handler

    def _tenant(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        given = {text for name, value in metadata if (text := _key_in(name, value)) is not None}
        if not given:
            raise Unauthenticated(f"API key: got none; {_HOW}")
        if len(given) > 1:
            raise Unauthenticated(f"API key: got several; {_HOW}")
        key = self._table.find(given.pop())
        if key is None:
            raise Unauthenticated("API key: not known")
        return key.tenant


def _key_in(name: str, value: str | bytes) -> str | None:
    """The key in an entry of a call's metadata, empty where there should be one; else None."""
    text = value if isinstance(value, str) else ""
    if name == "x-api-key":
        return text.strip()
    if name == "authorization":
        scheme, _, key = text.strip().partition(" ")
        return key.strip() if scheme.lower() == "bearer" else ""
    return None


def _refusal(handler: grpc.RpcMethodHandler | None, why: str) -> grpc.RpcMethodHandler:
    """A handler of the same kind that ends the call at once."""

    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    streams = (False, False)
    if handler is not None:  # else there is no such method, of which strangers are not told
        streams = (bool(handler.request_streaming), bool(handler.response_streaming))
    return make[streams](refuse)
