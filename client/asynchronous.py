"""`AsyncClient`: the same calls for asyncio. Names and arguments are those of `Client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Unpack

import grpc
from grpc_health.v1 import health_pb2_grpc

from ..errors import QuireError
from ..protos.v1 import generation_pb2 as pb
from ..protos.v1 import generation_pb2_grpc as pb_grpc
from . import checks
from .channel import AS_USUAL, LOOK_AFTER, Connection, Retry
from .checks import Metadata
from .failures import translated
from .health import LOOK_EVERY, QUESTION, Wait, why_no_answer, why_not
from .messages import (
    Fields,
    Labels,
    Messages,
    Prompt,
    detokenize_request,
    embed_request,
    generate_request,
    tokenize_request,
)
from .tls import TLS


class AsyncClient:
    """Calls one server. Make it on the event loop that will use it; close it, or use `async with`.
    Arguments as of `Client`."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: TLS | bool = False,
        timeout: float | None = None,
        retry: Retry = AS_USUAL,
        look_after: float | None = LOOK_AFTER,
    ):
        asyncio.get_running_loop()  # raises here where there is none, not obscurely later
        self._to = Connection(address, api_key, tls, timeout, retry, look_after)
        self.address = address
        self._closed = False
        credentials, options = self._to.credentials, self._to.options
        self._channel = (
            grpc.aio.insecure_channel(address, options=options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=options)
        )
        self._stub = pb_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def generate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        metadata: Metadata = (),
        **fields: Unpack[Fields],
    ) -> pb.GenerateResponse:
        """The whole answer to one prompt. Cancelling the task ends the request."""
        request = generate_request(prompt, fields)
        return await self._call(self._stub.Generate, request, timeout, metadata)

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        metadata: Metadata = (),
        **fields: Unpack[Fields],
    ) -> AsyncStream:
        """The answer in pieces, as they come."""
        request = generate_request(prompt, fields)
        return AsyncStream(self._stub.StreamGenerate(request, **self._how(timeout, metadata)))

    async def embed(
        self,
        inputs: Sequence[Prompt],
        *,
        timeout: float | None = None,
        metadata: Metadata = (),
        **labels: Unpack[Labels],
    ) -> pb.EmbedResponse:
        """An embedding of each input, of length 1."""
        return await self._call(self._stub.Embed, embed_request(inputs, labels), timeout, metadata)

    async def tokenize(
        self,
        prompt: str | Messages | pb.ChatPrompt,
        *,
        add_special_tokens: bool | None = None,
        return_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> pb.TokenizeResponse:
        """The token ids that a prompt becomes."""
        request = tokenize_request(
            prompt, add_special_tokens=add_special_tokens, return_tokens=return_tokens
        )
        return await self._call(self._stub.Tokenize, request, timeout)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        request = detokenize_request(token_ids, skip_special_tokens)
        response: pb.DetokenizeResponse = await self._call(self._stub.Detokenize, request, timeout)
        return response.text

    async def model_info(self, *, timeout: float | None = None) -> pb.ModelInfo:
        """What is served, with which limits and defaults."""
        return await self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest(), timeout)

    async def ready(self, *, timeout: float = 5.0) -> bool:
        """Whether the server says that it serves."""
        seconds = checks.timeout("timeout", timeout)
        return not await self._why_not_ready(seconds)

    async def wait_ready(self, timeout: float) -> None:
        """Returns when the server serves; raises DeadlineExceeded after `timeout` seconds."""
        wait = Wait(self.address, timeout)
        while why := await self._why_not_ready(wait.next_look()):
            wait.saw(why)
            await asyncio.sleep(LOOK_EVERY)

    async def close(self) -> None:
        """Ends calls that run, and the connection. Those that are made then are errors."""
        self._closed = True
        await self._channel.close(None)

    async def _call(
        self, method: Any, request: Any, timeout: float | None, metadata: Metadata = ()
    ) -> Any:
        with translated():
            return await method(request, **self._how(timeout, metadata))

    async def _why_not_ready(self, seconds: float | None) -> str:
        self._check_open()
        with translated():  # what a client that is closed meanwhile raises here
            try:
                return why_not(await self._health.Check(QUESTION, timeout=seconds))
            except grpc.RpcError as error:
                return why_no_answer(error)

    def _how(self, timeout: float | None, metadata: Metadata) -> dict[str, Any]:
        self._check_open()
        return self._to.how(timeout, metadata)

    def _check_open(self) -> None:
        """Of a closed channel grpc raises errors of its own, each kind another."""
        if self._closed:
            raise QuireError("client: it was closed, and makes no more calls")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncStream(AsyncIterator[pb.GenerateChunk]):
    """Chunks of one call. Closing it early ends the request; so does leaving an `async with`."""

    def __init__(self, call: Any):
        self._call, self._chunks = call, aiter(call)

    async def __anext__(self) -> pb.GenerateChunk:
        with translated():
            chunk: pb.GenerateChunk = await anext(self._chunks)
            return chunk

    def close(self) -> None:
        self._call.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
