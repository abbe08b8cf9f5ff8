"""The gRPC service over one engine in this process, and its life from bind to drain.

    engine thread:  Engine --deliver(outputs of a step)--> event loop: one queue per request
    handler:        parse -> Intake -> Engine.submit -> queue -> Answer -> messages

A call that ends early, for whatever reason, ends its request in the engine, which frees its pages.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ..errors import Internal, Overloaded, QuireError, Unavailable, invalid
from ..protos.v1 import generation_pb2 as pb
from ..protos.v1 import generation_pb2_grpc as pb_grpc
from ..sched.engine import Engine
from ..sched.request import Request, RequestOutput
from .answer import Answer, Chunk, Completion
from .assemble import Assembled, Deliver
from .intake import Intake
from .wire import chunk_message, labels_of, prompt_of, response_message, sampling_of

log = logging.getLogger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name


class Mailbox:
    """Brings the engine thread's outputs to the handlers on the event loop, once per step."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._queues: dict[str, asyncio.Queue[RequestOutput]] = {}

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._sort, outputs)

    def _sort(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            queue = self._queues.get(output.request_id)
            if queue is not None:  # else the caller has gone
                queue.put_nowait(output)

    def open(self, request_id: str) -> asyncio.Queue[RequestOutput]:
        """A queue for a request about to be submitted."""
        if request_id in self._queues:
            raise invalid("request_id", request_id, "unlike that of every unfinished request")
        queue: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._queues[request_id] = queue
        return queue

    def close(self, request_id: str) -> None:
        self._queues.pop(request_id, None)


class GenerationService(pb_grpc.GenerationServiceServicer):
    """`quire.v1.GenerationService`. UNAVAILABLE until `open` is called."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._intake: Intake | None = None
        self._mailbox: Mailbox | None = None

    def open(self, engine: Engine, intake: Intake, mailbox: Mailbox) -> None:
        """Starts answering."""
        self._engine, self._intake, self._mailbox = engine, intake, mailbox

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        async with _errors_as_status(context):
            completion = Completion(index=0)
            usage = pb.Usage()
            request_id = ""
            async for engine_request, chunk in self._chunks(request, context):
                completion.add(chunk)
                request_id = engine_request.id
                if chunk.finish_reason is not None:
                    usage = _usage(engine_request, len(completion.token_ids), chunk)
            return response_message(completion, request_id, usage)
        raise AssertionError("abort raises")  # for the type checker

    async def StreamGenerate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        async with _errors_as_status(context):
            total, first = 0, True
            async for engine_request, chunk in self._chunks(request, context):
                total += len(chunk.token_ids)
                usage = _usage(engine_request, total, chunk) if chunk.finish_reason else None
                yield chunk_message(chunk, engine_request.id if first else "", usage)
                first = False

    async def _chunks(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[tuple[Request, Chunk]]:
        """Submits a request and yields its chunks; what is pending together comes as one."""
        engine, intake, mailbox = self._engine, self._intake, self._mailbox
        if engine is None or intake is None or mailbox is None:
            raise Unavailable("the engine is starting; try again when health says SERVING")
        prompt = intake.tokens_of(prompt_of(message))
        sampling = sampling_of(message, intake.default_sampling)
        left = context.time_remaining()
        deadline = None if left is None else time.monotonic() + left
        request = intake.request(prompt, sampling, labels_of(message, deadline))
        answer = intake.answer(sampling)
        queue = mailbox.open(request.id)
        try:
            engine.submit(request)
            while not answer.finished:
                outputs = [await queue.get()]
                while not queue.empty():
                    outputs.append(queue.get_nowait())
                chunk = _joined(answer, outputs)
                if chunk is not None:
                    yield request, chunk
        finally:
            mailbox.close(request.id)
            # Harmless when the engine ended the request itself; needed when the caller went away or
            # a stop string, which only the text shows, ended the answer.
            engine.finish(request.id)


def _joined(answer: Answer, outputs: list[RequestOutput]) -> Chunk | None:
    """The chunks of several outputs as one, so that a slow caller gets fewer, larger messages."""
    chunks = [c for c in map(answer.push, outputs) if c is not None]
    if not chunks:
        return None
    last = chunks[-1]
    return Chunk(
        text="".join(c.text for c in chunks),
        token_ids=[t for c in chunks for t in c.token_ids],
        logprobs=[p for c in chunks if c.logprobs is not None for p in c.logprobs]
        if any(c.logprobs is not None for c in chunks)
        else None,
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


@asynccontextmanager
async def _errors_as_status(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Ends the call with the status an error stands for."""
    try:
        yield
    except QuireError as error:
        if isinstance(error, Overloaded):
            context.set_trailing_metadata((("retry-after", f"{error.retry_after:g}"),))
        await context.abort(getattr(grpc.StatusCode, error.grpc_code), str(error))
    except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
        raise
    except Exception:
        log.exception("a call failed")
        await context.abort(grpc.StatusCode.INTERNAL, str(Internal("a fault in Quire; see its log")))


class Server:
    """Binds at once, so that a taken port is known before the model loads; serves once opened."""

    def __init__(self, host: str, port: int):
        self._address = f"{host}:{port}"
        self._server = grpc.aio.server()
        self._health = health.aio.HealthServicer()
        self._service = GenerationService()
        pb_grpc.add_GenerationServiceServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = 0

    async def bind(self) -> int:
        """Starts listening, NOT_SERVING; returns the port.

        Raises:
          Unavailable: the address cannot be bound.
        """
        try:
            self.port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise Unavailable(f"address: cannot bind {self._address}: {error}") from error
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        return self.port

    async def open(self, build: Callable[[Deliver], Assembled]) -> Assembled:
        """Builds the engine off the event loop, then serves it.

        Args:
          build: called with where the engine is to deliver outputs; returns it started.
        """
        loop = asyncio.get_running_loop()
        mailbox = Mailbox(loop)
        parts = await loop.run_in_executor(None, build, mailbox.deliver)
        self._service.open(parts.engine, parts.intake, mailbox)
        await self._say(health_pb2.HealthCheckResponse.SERVING)
        return parts

    async def drain(self, timeout: float) -> None:
        """Takes no more calls, lets the running ones end for `timeout` seconds, then ends them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace=timeout)

    async def _say(self, status: Any) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)
