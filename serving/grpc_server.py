"""The gRPC service over one engine in this process: parsing, answering, ending calls.

    engine thread:  Engine --Mailbox.deliver(outputs of a step)--> event loop: one queue per request
    handler:        parse -> Intake -> Engine.submit -> queue -> Choices -> messages

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
from ..sched.engine import Engine
from ..sched.request import Request, RequestOutput
from .answer import Chunk, Completion
from .choices import Choices, best, check_streamable
from .intake import MAX_NAME_LENGTH, Intake, Prompt
from .wire import chunk_message, labels_of, prompt_of, response_message, sampling_of

log = logging.getLogger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

_LONG_TEXT = 16_384
"""Characters from which on a prompt is tokenized off the event loop (a millisecond or more)."""

_MOST_DETAILS = 6_000
"""Bytes of an error's message; clients drop a call whose trailers take more than 8 KiB."""


class Mailbox:
    """Brings the engine thread's outputs to the handlers on the event loop, once per step."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._queues: dict[str, asyncio.Queue[RequestOutput]] = {}

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Called on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._sort, outputs)
        except RuntimeError:
            # The loop was closed under a running engine; then nobody is left to tell.
            if not self._loop.is_closed():
                raise

    def _sort(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            queue = self._queues.get(output.request_id)
            if queue is not None:  # else the caller has gone
                queue.put_nowait(output)

    @contextmanager
    def queue(self, request_id: str) -> Iterator[asyncio.Queue[RequestOutput]]:
        """The queue of a request that is about to be submitted."""
        queue: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._queues[request_id] = queue
        try:
            yield queue
        finally:
            del self._queues[request_id]


class GenerationService(pb_grpc.GenerationServiceServicer):
    """`quire.v1.GenerationService`. UNAVAILABLE before `open` and after `refuse`."""

    def __init__(self) -> None:
        self._backend: tuple[Engine, Intake, Mailbox] | None = None
        self._closed_because = "the engine is starting; try again when health says SERVING"
        self._names: set[str] = set()  # what callers call their unfinished requests
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, engine: Engine, intake: Intake, mailbox: Mailbox) -> None:
        """Starts answering."""
        self._backend = engine, intake, mailbox

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
        engine, intake, mailbox = self._backend
        prompt = await _tokens(intake, prompt_of(message))
        sampling = intake.default_sampling(len(prompt), **sampling_of(message))
        if streamed:
            check_streamable(sampling)
        left = context.time_remaining()
        deadline = None if left is None else time.monotonic() + left
        request = intake.request(prompt, sampling, labels_of(message, deadline))
        choices = intake.choices(sampling)
        with self._name(message.request_id), mailbox.queue(request.id) as queue:
            engine.submit(request)
            try:
                while True:
                    outputs = [await queue.get()]
                    while not queue.empty():
                        outputs.append(queue.get_nowait())
                    chunks, error = _joined(choices, outputs)
                    # Of stop strings the engine does not know.
                    for reason, choice in choices.news():
                        engine.finish(request.id, reason, choice)
                    for chunk in chunks:
                        yield request, chunk, choices.finished and chunk is chunks[-1]
                    if error is not None:
                        raise error
                    if choices.finished:
                        return
            finally:
                # Nor of callers who went away.
                for reason, choice in choices.news(leaving=True):
                    engine.finish(request.id, reason, choice)

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


def _joined(
    choices: Choices, outputs: list[RequestOutput]
) -> tuple[list[Chunk], QuireError | None]:
    """The chunks of several outputs as one for each answer, so that a slow caller gets fewer and
    larger messages; and the error that ended the request, to be raised when the caller has what
    came before it."""
    pending: dict[int, list[Chunk]] = {}
    error = None
    for output in outputs:
        try:
            chunk = choices.push(output)
        except QuireError as reason:
            error = reason
            break
        if chunk is not None:
            pending.setdefault(chunk.index, []).append(chunk)
    return [_sum(chunks) for chunks in pending.values()], error


def _sum(chunks: list[Chunk]) -> Chunk:
    first, last = chunks[0], chunks[-1]
    logprobs = None
    if last.logprobs is not None:
        logprobs = [position for c in chunks for position in c.logprobs or ()]
    sums = [c.sum_logprob for c in chunks if c.sum_logprob is not None]
    return Chunk(
        text="".join([c.text for c in chunks]),
        token_ids=[token for c in chunks for token in c.token_ids],
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cached_tokens=last.cached_tokens,
        index=last.index,
        sum_logprob=sum(sums) if sums else None,
        prompt_logprobs=first.prompt_logprobs,
    )


def _usage(request: Request, completion_tokens: int, last: Chunk) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=len(request.prompt),
        completion_tokens=completion_tokens,
        cached_tokens=last.cached_tokens,
    )
