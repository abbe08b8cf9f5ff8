"""The gRPC service over one engine, wherever that runs: parsing, answering, ending calls.

    handler:  parse -> Intake -> EngineLink.open -> Pending -> Choices -> messages

A call that ends early, for whatever reason, ends its request in the engine, which frees its pages.
serving/server.py gives the service its life from bind to drain.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from urllib.parse import quote

import grpc

from ..errors import Internal, Overloaded, QuireError, Unavailable, invalid
from ..protos.v1 import generation_pb2 as pb
from ..protos.v1 import generation_pb2_grpc as pb_grpc
from ..sched.request import Request, RequestOutput
from .answer import Chunk, Completion
from .choices import Choices, best, check_streamable
from .engine_link import EngineLink
from .intake import MAX_NAME_LENGTH, Intake, Prompt
from .wire import chunk_message, labels_of, prompt_of, response_message, sampling_of

log = logging.getLogger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

_LONG_TEXT = 16_384
"""Characters from which on a prompt is tokenized off the event loop (a millisecond or more)."""

_MOST_DETAILS = 6_000
"""Bytes of an error's message; clients drop a call whose trailers take more than 8 KiB."""


class GenerationService(pb_grpc.GenerationServiceServicer):
    """`quire.v1.GenerationService`. UNAVAILABLE before `open` and after `refuse`."""

    def __init__(self) -> None:
        self._backend: tuple[EngineLink, Intake] | None = None
        self._closed_because = "the engine is starting; try again when health says SERVING"
        self._names: set[str] = set()  # what callers call their unfinished requests
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, link: EngineLink, intake: Intake) -> None:
        """Starts answering."""
        self._backend = link, intake

    def refuse(self, why: str) -> None:
        """Takes no more calls; those that run are not touched."""
        self._backend, self._closed_because = None, why

    async def idle(self) -> None:
        """Returns when no call runs."""
        await self._idle.wait()

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        chunks_of = self._chunks(request, context)
        async with self._call(request, context), aclosing(chunks_of) as chunks:
            completions: dict[int, Completion] = {}
            scores = None
            async for asked, chunk, is_last in chunks:
                completions.setdefault(chunk.index, Completion(chunk.index)).add(chunk)
                scores = scores or chunk.prompt_logprobs
                if is_last:
                    answers = [completions[index] for index in sorted(completions)]
                    total = sum(len(answer.token_ids) for answer in answers)
                    response = response_message(
                        best(answers, asked.sampling),
                        asked.sampling,
                        prompt=asked.prompt,
                        prompt_logprobs=scores,
                        request_id=request.request_id or asked.id,
                        usage=_usage(asked, total, chunk),
                    )
        return response

    # Writes to the context instead of yielding: grpc does not close a generator whose call was
    # cancelled while a message was being sent, and its request would run on.
    async def StreamGenerate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        chunks_of = self._chunks(request, context, streamed=True)
        async with self._call(request, context), aclosing(chunks_of) as chunks:
            total, request_id = 0, None
            async for asked, chunk, is_last in chunks:
                total += len(chunk.token_ids)
                first, request_id = request_id is None, request.request_id or asked.id
                message = chunk_message(
                    chunk,
                    asked.sampling,
                    prompt=asked.prompt,
                    request_id=request_id if first else "",
                    usage=_usage(asked, total, chunk) if is_last else None,
                )
                await context.write(message)

    async def _chunks(
        self,
        message: pb.GenerateRequest,
        context: grpc.aio.ServicerContext,
        *,
        streamed: bool = False,
    ) -> AsyncGenerator[tuple[Request, Chunk, bool], None]:
        """Submits a request and yields its chunks, and whether each is the last; what is pending
        together for one answer comes as one."""
        if self._backend is None:
            raise Unavailable(self._closed_because)
        link, intake = self._backend
        prompt = await _tokens(intake, prompt_of(message))
        sampling = intake.default_sampling(len(prompt), **sampling_of(message))
        if streamed:
            check_streamable(sampling)
        left = context.time_remaining()
        deadline = None if left is None else time.monotonic() + left
        request = intake.request(prompt, sampling, labels_of(message, deadline))
        choices = intake.choices(sampling)
        with self._name(message.request_id), link.open(request) as pending:
            try:
                while True:
                    chunks, error = _pushed(choices, await pending.take())
                    # Of stop strings the engine does not know.
                    for reason, choice in choices.news():
                        link.finish(request.id, reason, choice)
                    for chunk in chunks:
                        yield request, chunk, choices.finished and chunk is chunks[-1]
                    if error is not None:
                        raise error
                    if choices.finished:
                        return
            finally:
                # Nor of callers who went away.
                for reason, choice in choices.news(leaving=True):
                    link.finish(request.id, reason, choice)

    @asynccontextmanager
    async def _call(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[None]:
        """Counts a call, and ends it with the status that an error stands for.

        Of a fault of ours the caller gets the request's id, and the log what it was.
        """
        self._calls += 1
        self._idle.clear()
        try:
            yield
        except QuireError as error:
            if isinstance(error, Overloaded):
                context.set_trailing_metadata((("retry-after", f"{error.retry_after:g}"),))
            if isinstance(error, Internal):
                log.error("a call failed: %s", error)
            await context.abort(getattr(grpc.StatusCode, error.grpc_code), _details(error))
        except grpc.aio.AbortError:
            raise
        except Exception:
            name = request.request_id[:MAX_NAME_LENGTH] or secrets.token_hex(8)
            log.exception("request %r: a call failed", name)
            why = f"request {name!r}: a fault in Quire; the server's log says more"
            await context.abort(grpc.StatusCode.INTERNAL, why)
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    @contextmanager
    def _name(self, name: str) -> Iterator[None]:
        """Holds the name a caller gave a request, while it runs."""
        if not name:
            yield
            return
        if name in self._names:
            raise invalid("request_id", name, "unlike that of every unfinished request")
        self._names.add(name)
        try:
            yield
        finally:
            self._names.discard(name)


def _details(error: QuireError) -> str:
    """The message, cut where it would not fit into trailers: callers would get another error."""
    text = str(error)
    while len(quote(text)) > _MOST_DETAILS:  # that is how it travels
        text = text[: len(text) * 3 // 4] + "..."
    return text


async def _tokens(intake: Intake, prompt: Prompt) -> tuple[int, ...]:
    if isinstance(prompt, str) and len(prompt) >= _LONG_TEXT:
        return await asyncio.to_thread(intake.tokens_of, prompt)
    return intake.tokens_of(prompt)


def _pushed(
    choices: Choices, outputs: list[RequestOutput]
) -> tuple[list[Chunk], QuireError | None]:
    """The chunks that outputs make; and the error that ended the request, to be raised when the
    caller has what came before it."""
    chunks: list[Chunk] = []
    for output in outputs:
        try:
            chunk = choices.push(output)
        except QuireError as error:
            return chunks, error
        if chunk is not None:
            chunks.append(chunk)
    return chunks, None


def _usage(request: Request, completion_tokens: int, last: Chunk) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=len(request.prompt),
        completion_tokens=completion_tokens,
        cached_tokens=last.cached_tokens,
    )
