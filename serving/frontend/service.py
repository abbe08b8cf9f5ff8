"""The methods of the gRPC service, over one engine, wherever that runs.

    call -> Admission -> method: Reader -> answers (EngineLink, Choices) -> messages -> status

A call that ends early, for whatever reason, ends its request in the engine, which frees its pages.
serving/frontend/server.py gives the service its life from bind to drain.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import grpc

from ...errors import QuireError, Unavailable
from ...protos.v1 import generation_pb2 as pb
from ...protos.v1 import generation_pb2_grpc as pb_grpc
from ...sched.request import Request
from ..answer import Chunk, Completion
from ..auth.caller import own_tenant
from ..choices import best
from ..intake import Intake
from .answering import Piece, answers
from .calls import Calls
from .embedding import embed_all
from .engine_link import EngineLink
from .model_info import model_info
from .reading import Reader
from .wire import check_known, chunk_message, embed_message, response_message
from .workers import Workers


class GenerationService(pb_grpc.GenerationServiceServicer):
    """`quire.v1.GenerationService`. UNAVAILABLE before `open` and after `refuse`.

    Attributes:
      calls: those that run.
    """

    def __init__(self) -> None:
        self._backend: tuple[EngineLink, Intake, Reader] | None = None
        self._workers = Workers()
        self._info = pb.ModelInfo()
        self._closed_because = "the engine is starting; try again when health says SERVING"
        self.calls = Calls(self.account)

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

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        async with (
            self.calls.run(context, request),
            self._asked(request, context) as (asked, pieces),
        ):
            completions: dict[int, Completion] = {}
            scores = None
            async for piece in pieces:
                chunk = piece.chunk
                completions.setdefault(chunk.index, Completion(chunk.index)).add(chunk)
                scores = scores or chunk.prompt_logprobs
                if piece.is_last:
                    made = [completions[index] for index in sorted(completions)]
                    total = sum(len(answer.token_ids) for answer in made)
                    response = response_message(
                        best(made, asked.sampling),
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
        async with (
            self.calls.run(context, request),
            self._asked(request, context, streamed=True) as (asked, pieces),
        ):
            total, request_id = 0, request.request_id or asked.id
            async for piece in pieces:
                chunk = piece.chunk
                total += len(chunk.token_ids)
                message = chunk_message(
                    chunk,
                    asked.sampling,
                    prompt=asked.prompt,
                    request_id=request_id,
                    usage=_usage(asked, total, chunk) if piece.is_last else None,
                )
                request_id = ""  # said once
                await context.write(message)

    @asynccontextmanager
    async def _asked(
        self,
        message: pb.GenerateRequest,
        context: grpc.aio.ServicerContext,
        *,
        streamed: bool = False,
    ) -> AsyncIterator[tuple[Request, AsyncGenerator[Piece, None]]]:
        """A request, and the pieces of its answers; leaving the block ends it."""
        link, intake, reader = self._open_backend()
        request = await reader.request(message, context, streamed=streamed)
        following = answers(link, intake.choices(request.sampling), request)
        with self.calls.named(request.tenant, message.request_id):
            async with aclosing(following) as pieces:
                yield request, pieces

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        response = pb.TokenizeResponse()
        async with self.calls.run(context, request):
            _, _, reader = self._open_backend()
            response = await reader.tokenized(request)
        return response

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        response = pb.DetokenizeResponse()
        async with self.calls.run(context, request):
            _, _, reader = self._open_backend()
            response = await reader.detokenized(request)
        return response

    async def Embed(
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbedResponse:
        response = pb.EmbedResponse()
        async with self.calls.run(context, request):
            link, _, reader = self._open_backend()
            asked = await reader.embeddings(request, context)
            with self.calls.named(asked[0].tenant, request.request_id):
                outputs = await embed_all(link, asked)
            request_id = request.request_id or asked[0].id
            response = embed_message(request_id, asked, outputs)
        return response

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInfo:
        async with self.calls.run(context, request):
            self._open_backend()
            check_known(request)
        return self._info

    def _open_backend(self) -> tuple[EngineLink, Intake, Reader]:
        if self._backend is None:
            raise Unavailable(self._closed_because)
        return self._backend

    def account(self, error: QuireError, request_id: str = "", tenant: str | None = None) -> None:
        """Lets metrics and log have an error that the engine process does not know of.

        Args:
          tenant: None is that of the call which this is called from.
        """
        if self._backend is not None:
            who = (own_tenant() or "") if tenant is None else tenant
            self._backend[0].refused(error, request_id, who)


def _usage(request: Request, completion_tokens: int, last: Chunk) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=len(request.prompt),
        completion_tokens=completion_tokens,
        cached_tokens=last.cached_tokens,
    )
