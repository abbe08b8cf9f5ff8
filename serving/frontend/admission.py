"""What every call of the service passes before its method sees it: a bound on how many there are,
and that its message can be read. The outermost of a frontend's grpc.aio interceptors.

Calls count from their first byte to their last, so that those which say nothing more count too.
Health checks and reflection are not counted: a frontend that has enough to do is healthy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ...errors import InvalidRequest, Overloaded, QuireError
from ...protos.v1 import generation_pb2 as pb
from .status import end_with, let_go

SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]


class Admission(grpc.aio.ServerInterceptor):
    """Of one frontend.

    Args:
      most: calls at once.
      refused: hears why a call was turned away.
      came: hears that one came in, before it is read.
    """

    def __init__(
        self, most: int, refused: Callable[[QuireError], None], came: Callable[[], None]
    ) -> None:
        self._most, self._refused, self._came = most, refused, came
        self._running = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        service, _, method = str(handler_call_details.method).lstrip("/").partition("/")
        if service != SERVICE.full_name or handler is None:
            return handler
        if self._running >= self._most:
            return self._refusal()
        task = asyncio.current_task()  # in which all of the call happens
        assert task is not None
        self._running += 1
        self._came()
        task.add_done_callback(self._ended)
        return handler if handler.request_deserializer is None else self._reading(handler, method)

    def _ended(self, _: object) -> None:
        self._running -= 1

    def _refusal(self) -> grpc.RpcMethodHandler:
        """Ends the call at once: for grpc a handler of streams, because those read nothing before
        they are called."""
        why = f"calls: got one more than {self._most} at once on this frontend, must be at most "
        error = Overloaded(f"{why}{self._most} (max_calls); retry in 1 s")

        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            self._refused(error)
            await end_with(context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _reading(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        """The same method; a message that cannot be read is the caller's fault, where grpc would
        say UNKNOWN."""
        read, wanted = handler.request_deserializer, SERVICE.methods_by_name[method].input_type
        assert read is not None
        streams = handler.response_streaming
        answer: Any = handler.unary_stream if streams else handler.unary_unary

        def read_or_not(sent: bytes) -> Any:
            try:
                return read(sent)
            except (DecodeError, UnicodeDecodeError):
                return _Unreadable(len(sent))

        async def run(message: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                if isinstance(message, _Unreadable):
                    error = InvalidRequest(
                        f"request: got {message.size} bytes, must be a {wanted.full_name} as "
                        "protobuf spells it, with text in UTF-8"
                    )
                    self._refused(error)
                    await end_with(context, error)
                return await answer(message, context)
            except BaseException as why:
                let_go(why)
                raise
            finally:
                del message  # as `let_go` does in the frames below

        make = (
            grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        )
        return make(run, read_or_not, handler.response_serializer)


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a message of so many bytes."""

    size: int
