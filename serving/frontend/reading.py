"""From what a call sends to the engine's requests, or to text, where no engine is needed.

Used by the service's methods (serving/frontend/service.py). What is large is read by the workers'
threads, so that the event loop goes on with other calls.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TypeAlias

import grpc

from ...errors import InvalidRequest, invalid
from ...protos.v1 import generation_pb2 as pb
from ...sched.request import Request
from ..choices import check_streamable
from ..intake import Intake, Labels, check_labels
from ..telemetry.traceparent import trace_context_of
from .wire import check_known, labels_of, prompt_of, sampling_of
from .workers import LARGE, Workers

MAX_INPUTS = 2_048
"""Of one call of Embed."""

_Prompted: TypeAlias = pb.GenerateRequest | pb.TokenizeRequest


class Reader:
    """Reads for one model.

    Args:
      intake: makes the requests.
      workers: for what is large.
    """

    def __init__(self, intake: Intake, workers: Workers) -> None:
        self._intake, self._workers = intake, workers

    async def request(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext, *, streamed: bool
    ) -> Request:
        """The request of a call that generates.

        Raises:
          InvalidRequest: it cannot be served as it is.
          Overloaded: too much waits to be read.
        """
        read = partial(self._request, message, _labels(message, context), streamed)
        return await self._workers.run(read, _effort(message))

    def _request(self, message: pb.GenerateRequest, labels: Labels, streamed: bool) -> Request:
        check_known(message)
        prompt = self._intake.tokens_of(prompt_of(message))
        sampling = self._intake.default_sampling(len(prompt), **sampling_of(message))
        if streamed:
            check_streamable(sampling)
        return self._intake.request(prompt, sampling, labels)

    async def embeddings(
        self, message: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> list[Request]:
        """One request an input of a call, in order; raises as `request`, naming the input."""
        if not 0 < len(message.inputs) <= MAX_INPUTS:
            raise invalid("inputs", f"{len(message.inputs)} inputs", f"1 to {MAX_INPUTS}")
        read = partial(self._embeddings, message, _labels(message, context))
        return await self._workers.run(read, max(message.ByteSize(), LARGE))

    def _embeddings(self, message: pb.EmbedRequest, labels: Labels) -> list[Request]:
        check_known(message)
        check_labels(labels)
        requests = []
        for at, given in enumerate(message.inputs):
            try:
                tokens = self._intake.tokens_of(prompt_of(given), pooled=True)
                requests.append(self._intake.embedding(tokens, labels))
            except InvalidRequest as error:
                raise InvalidRequest(f"inputs[{at}]: {error}") from error
        return requests

    async def tokenized(self, message: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """The answer to a call of Tokenize; raises as `request`."""
        return await self._workers.run(partial(self._tokenized, message), _effort(message))

    def _tokenized(self, message: pb.TokenizeRequest) -> pb.TokenizeResponse:
        check_known(message)
        intake, prompt = self._intake, prompt_of(message)
        if isinstance(prompt, str):
            special = message.add_special_tokens or not message.HasField("add_special_tokens")
            tokens = intake.encode(prompt, add_special_tokens=special)
        elif message.HasField("add_special_tokens"):
            limit = "unset with chat, whose special tokens the template writes"
            raise invalid("add_special_tokens", message.add_special_tokens, limit)
        else:
            tokens = intake.tokens_of(prompt)
        spellings = intake.spellings(tokens) if message.return_tokens else ()
        return pb.TokenizeResponse(token_ids=tokens, tokens=spellings)

    async def detokenized(self, message: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """The answer to a call of Detokenize; raises as `request`."""
        return await self._workers.run(partial(self._detokenized, message), message.ByteSize())

    def _detokenized(self, message: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        check_known(message)
        skip = message.skip_special_tokens or not message.HasField("skip_special_tokens")
        text = self._intake.decode(message.token_ids, skip_special_tokens=skip)
        return pb.DetokenizeResponse(text=text)


def _effort(message: _Prompted) -> int:
    """Its size; a chat's template may take its time whatever the size."""
    size = message.ByteSize()
    return max(size, LARGE) if message.WhichOneof("prompt") == "chat" else size


def _labels(
    message: pb.GenerateRequest | pb.EmbedRequest, context: grpc.aio.ServicerContext
) -> Labels:
    left = context.time_remaining()
    deadline = None if left is None else time.monotonic() + left
    return labels_of(message, deadline, *trace_context_of(context.invocation_metadata() or ()))
