"""The gRPC service over one engine, wherever that runs: parsing, answering, ending calls.

    handler:  parse -> Intake -> EngineLink.open -> Pending -> Choices -> messages

A call that ends early, for whatever reason, ends its request in the engine, which frees its pages.
serving/server.py gives the service its life from bind to drain.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from ..errors import Internal, QuireError, Unavailable, invalid
from ..protos.v1 import generation_pb2 as pb
from ..protos.v1 import generation_pb2_grpc as pb_grpc
from ..sched.request import Request, RequestOutput
from .answer import Chunk, Completion
from .auth.caller import own_tenant
from .choices import Choices, best
from .embedding import embed_all
from .engine_link import EngineLink
from .frontend.reading import Reader
from .frontend.status import end_with
from .frontend.workers import Workers
from .intake import MAX_NAME_LENGTH, Intake
from .model_info import model_info
from .pending import Pending
from .telemetry.logs import fields
from .wire import (
    check_known,
    chunk_message,
    embed_message,
    response_message,
)

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

_TIMING_WAIT = 1.0
"""Seconds that an answer which is all there may wait for the engine to say how long it took."""


class GenerationService(pb_grpc.GenerationServiceServicer):
    """`quire.v1.GenerationService`. UNAVAILABLE before `open` and after `refuse`."""

    def __init__(self) -> None:
        self._backend: tuple[EngineLink, Intake, Reader] | None = None
        self._workers = Workers()
        self._info = pb.ModelInfo()
        self._closed_because = "the engine is starting; try again when health says SERVING"
        self._names: set[tuple[str, str]] = set()  # tenants' own names of unfinished requests
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, link: EngineLink, intake: Intake) -> None:
        """Starts answering."""
        self._info = model_info(intake)
        self._backend = link, intake, Reader(intake, self._workers)

    def refuse(self, why: str) -> None:
        """Takes no more calls; those that run are not touched."""
        self._backend, self._closed_because = None, why

    def close(self) -> None:
        """Lets go of threads, after the last call."""
        self._workers.close()

    async def idle(self) -> None:
        """Returns when no call runs."""
        await self._idle.wait()

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        chunks_of = self._chunks(request, context)
        async with self._call(context, request), aclosing(chunks_of) as chunks:
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
                        timing=chunk.timing,
                    )
        return response

    # Writes to the context instead of yielding: grpc does not close a generator whose call was
    # cancelled while a message was being sent, and its request would run on.
    async def StreamGenerate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        chunks_of = self._chunks(request, context, streamed=True)
        async with self._call(context, request), aclosing(chunks_of) as chunks:
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
                    timing=chunk.timing,
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
        link, intake, reader = self._open_backend()
        request = await reader.request(message, context, streamed=streamed)
        choices = intake.choices(request.sampling)
        with self._name(request.tenant, message.request_id), link.open(request) as pending:
            try:
                last = None
                while True:
                    outputs = await pending.take()
                    last = next((output for output in outputs if output.ended), last)
                    chunks, error = _pushed(choices, outputs)
                    # Of stop strings the engine does not know.
                    for reason, choice in choices.news():
                        link.finish(request.id, reason, choice)
                    if choices.finished and last is None and error is None:
                        last = await _last_of(pending)
                    for chunk in chunks:
                        is_last = choices.finished and chunk is chunks[-1]
                        if is_last and last is not None:
                            chunk = replace(chunk, timing=last.timing)
                        yield request, chunk, is_last
                    if error is not None:
                        raise error
                    if choices.finished:
                        return
            finally:
                # Nor of callers who went away.
                for reason, choice in choices.news(leaving=True):
                    link.finish(request.id, reason, choice)

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        response = pb.TokenizeResponse()
        async with self._call(context, request):
            _, _, reader = self._open_backend()
            response = await reader.tokenized(request)
        return response

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        response = pb.DetokenizeResponse()
        async with self._call(context, request):
            _, _, reader = self._open_backend()
            response = await reader.detokenized(request)
        return response

    async def Embed(
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbedResponse:
        response = pb.EmbedResponse()
        async with self._call(context, request):
            link, _, reader = self._open_backend()
            asked = await reader.embeddings(request, context)
            with self._name(asked[0].tenant, request.request_id):
                outputs = await embed_all(link, asked)
            request_id = request.request_id or asked[0].id
            response = embed_message(request_id, asked, outputs)
        return response

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInfo:
        async with self._call(context, request):
            self._open_backend()
            check_known(request)
        return self._info

    def _open_backend(self) -> tuple[EngineLink, Intake, Reader]:
        if self._backend is None:
            raise Unavailable(self._closed_because)
        return self._backend

    def account(self, error: QuireError, request: Any = None) -> None:
        """Lets metrics and log have an error that the engine process does not know of."""
        if self._backend is not None and not error.accounted:
            self._backend[0].refused(error, *_who(request))

    @asynccontextmanager
    async def _call(self, context: grpc.aio.ServicerContext, request: Any) -> AsyncIterator[None]:
        """Counts a call, and ends it with the status that an error stands for.

        Of a fault of ours the caller gets the request's id, and the log what it was.
        """
        self._calls += 1
        self._idle.clear()
        try:
            yield
        except QuireError as error:
            if isinstance(error, Internal) and not error.accounted:
                log.error("a call failed: %s", error)
            self.account(error, request)
            await end_with(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            request_id, tenant = _who(request)
            name = request_id or secrets.token_hex(8)
            said = fields(request_id=name, tenant=tenant)
            log.exception("request %r: a call failed", name, extra=said)
            why = f"request {name!r}: a fault in Quire; the server's log says more"
            self.account(Internal(why), request)
            await context.abort(grpc.StatusCode.INTERNAL, why)
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    @contextmanager
    def _name(self, tenant: str, name: str) -> Iterator[None]:
        """Holds the name a caller gave a request, while it runs."""
        if not name:
            yield
            return
        if (tenant, name) in self._names:
            raise invalid("request_id", name, "unlike that of every unfinished request")
        self._names.add((tenant, name))
        try:
            yield
        finally:
            self._names.discard((tenant, name))


def _who(request: Any) -> tuple[str, str]:
    """The id that a message gives, where its kind has one, and the tenant that it is of; cut where
    they are too long."""
    request_id, said = (getattr(request, name, "") for name in ("request_id", "tenant"))
    tenant = own_tenant()
    return request_id[:MAX_NAME_LENGTH], (said if tenant is None else tenant)[:MAX_NAME_LENGTH]


async def _last_of(pending: Pending) -> RequestOutput | None:
    """The last output of a request whose text ended it, which says where its time went: it comes
    with the step in which the engine hears of that."""
    try:
        async with asyncio.timeout(_TIMING_WAIT):
            while True:
                for output in await pending.take():
                    if output.ended:
                        return output
    except TimeoutError:
        return None


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
