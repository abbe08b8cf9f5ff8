"""The gRPC service over one engine in this process: parsing, answering, ending calls.

    engine thread:  Engine --Mailbox.deliver(outputs of a step)--> event loop: one queue per request
    handler:        parse -> Intake -> Engine.submit -> queue -> Answer -> messages

A call that ends early, for whatever reason, ends its request in the engine, which frees its pages.
serving/server.py gives the service its life from bind to drain.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager

import grpc

from ..errors import Overloaded, QuireError, Unavailable, invalid
from ..protos.v1 import generation_pb2 as pb
from ..protos.v1 import generation_pb2_grpc as pb_grpc
from ..sched.engine import Engine
from ..sched.request import Request, RequestOutput
from .answer import Answer, Chunk, Completion
from .intake import Intake, Prompt
from .wire import chunk_message, labels_of, prompt_of, response_message, sampling_of

log = logging.getLogger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

_LONG_TEXT = 16_384
"""Characters from which on a prompt is tokenized off the event loop (a millisecond or more)."""


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
        async with self._call(context), aclosing(self._chunks(request, context)) as chunks:
            completion = Completion(index=0)
            async for asked, chunk in chunks:
                completion.add(chunk)
                if chunk.finish_reason is not None:
                    response = response_message(
                        completion,
                        alternatives=asked.sampling.logprobs or 0,
                        request_id=request.request_id or asked.id,
                        usage=_usage(asked, len(completion.token_ids), chunk),
                    )
        return response

    # Writes to the context instead of yielding: grpc does not close a generator whose call was
    # cancelled while a message was being sent, and its request would run on.
    async def StreamGenerate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        async with self._call(context), aclosing(self._chunks(request, context)) as chunks:
            total, request_id = 0, None
            async for asked, chunk in chunks:
                total += len(chunk.token_ids)
                first, request_id = request_id is None, request.request_id or asked.id
                message = chunk_message(
                    chunk,
                    alternatives=asked.sampling.logprobs or 0,
                    request_id=request_id if first else "",
                    usage=_usage(asked, total, chunk) if chunk.finish_reason else None,
                )
                await context.write(message)

    async def _chunks(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[tuple[Request, Chunk], None]:
        """Submits a request and yields its chunks; what is pending together comes as one."""
        if self._backend is None:
            raise Unavailable(self._closed_because)
        engine, intake, mailbox = self._backend
        prompt = await _tokens(intake, prompt_of(message))
        sampling = intake.default_sampling(len(prompt), **sampling_of(message))
        left = context.time_remaining()
        deadline = None if left is None else time.monotonic() + left
        request = intake.request(prompt, sampling, labels_of(message, deadline))
        answer = intake.answer(sampling)
        with self._name(message.request_id), mailbox.queue(request.id) as queue:
            engine.submit(request)
            try:
                while not answer.finished:
                    outputs = [await queue.get()]
                    while not queue.empty():
                        outputs.append(queue.get_nowait())
                    chunk, error = _joined(answer, outputs)
                    if chunk is not None:
                        yield request, chunk
                    if error is not None:
                        raise error
            finally:
                # The engine has to be told when the caller went away, or when a stop string, which
                # only the text shows, ended the answer.
                if answer.untold is not None:
                    engine.finish(request.id, answer.untold)

    @asynccontextmanager
    async def _call(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """Counts a call, and ends it with the status that an error stands for."""
        self._calls += 1
        self._idle.clear()
        try:
            yield
        except QuireError as error:
            if isinstance(error, Overloaded):
                context.set_trailing_metadata((("retry-after", f"{error.retry_after:g}"),))
            await context.abort(getattr(grpc.StatusCode, error.grpc_code), str(error))
        except grpc.aio.AbortError:
            raise
        except Exception:
            log.exception("a call failed")
            await context.abort(grpc.StatusCode.INTERNAL, "a fault in Quire; see the server's log")
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


async def _tokens(intake: Intake, prompt: Prompt) -> tuple[int, ...]:
    if isinstance(prompt, str) and len(prompt) >= _LONG_TEXT:
        return await asyncio.to_thread(intake.tokens_of, prompt)
    return intake.tokens_of(prompt)


def _joined(answer: Answer, outputs: list[RequestOutput]) -> tuple[Chunk | None, QuireError | None]:
    """The chunks of several outputs as one, so that a slow caller gets fewer, larger messages; and
    the error that ended the request, to be raised when the caller has what came before it."""
    chunks, error = [], None
    for output in outputs:
        try:
            chunk = answer.push(output)
        except QuireError as reason:
            error = reason
            break
        if chunk is not None:
            chunks.append(chunk)
    return _sum(chunks), error


def _sum(chunks: list[Chunk]) -> Chunk | None:
    if not chunks:
        return None
    last = chunks[-1]
    logprobs = None
    if last.logprobs is not None:
        logprobs = [position for c in chunks for position in c.logprobs or ()]
    return Chunk(
        text="".join([c.text for c in chunks]),
        token_ids=[token for c in chunks for token in c.token_ids],
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cached_tokens=last.cached_tokens,
    )


def _usage(request: Request, completion_tokens: int, last: Chunk) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=len(request.prompt),
        completion_tokens=completion_tokens,
        cached_tokens=last.cached_tokens,
    )
