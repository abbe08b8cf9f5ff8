"""`Client`: calls that block, and streams that are iterators."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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


class Client:
    """Calls one server. Safe to use from several threads; close it, or use `with`.

    Args:
      address: HOST:PORT, or anything else that grpc takes as a target ("unix:…", "dns:///…").
      api_key: sent with each call. Without TLS anybody on the way can read it.
      tls: how to talk TLS; True trusts whom the system trusts, False is plain text.
      timeout: seconds that a call may take where it does not say itself; None is any time.
      retry: what to do when the server is UNAVAILABLE.
      look_after: seconds of silence during a call after which the server is looked at; one that
        does not answer within 10 s is UNAVAILABLE. None never looks: for servers and proxies, other
        than Quire's, that send away who does.
    """

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
        self._to = Connection(address, api_key, tls, timeout, retry, look_after)
        self.address = address
        self._closed = False
        credentials, options = self._to.credentials, self._to.options
        self._channel = (
            grpc.insecure_channel(address, options=options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=options)
        )
        self._stub = pb_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        metadata: Metadata = (),
        **fields: Unpack[Fields],
    ) -> pb.GenerateResponse:
        """The whole answer to one prompt.

        Args:
          prompt: text, token ids, messages of a chat, or what `chat` makes of such.
          timeout: seconds; then the request ends on the server, too.
          metadata: more of it, such as ("traceparent", …).
          fields: the rest of GenerateRequest, and SamplingParams, by their names there.

        Raises:
          QuireError: as `quire.errors` says.
        """
        request = generate_request(prompt, fields)
        return self._call(self._stub.Generate, request, timeout, metadata)

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        metadata: Metadata = (),
        **fields: Unpack[Fields],
    ) -> Stream:
        """The answer in pieces, as they come; arguments as of `generate`."""
        request = generate_request(prompt, fields)
        return Stream(self._stub.StreamGenerate(request, **self._how(timeout, metadata)))

    def embed(
        self,
        inputs: Sequence[Prompt],
        *,
        timeout: float | None = None,
        metadata: Metadata = (),
        **labels: Unpack[Labels],
    ) -> pb.EmbedResponse:
        """An embedding of each input, of length 1; other arguments as of `generate`."""
        return self._call(self._stub.Embed, embed_request(inputs, labels), timeout, metadata)

    def tokenize(
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
        return self._call(self._stub.Tokenize, request, timeout)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        request = detokenize_request(token_ids, skip_special_tokens)
        response: pb.DetokenizeResponse = self._call(self._stub.Detokenize, request, timeout)
        return response.text

    def model_info(self, *, timeout: float | None = None) -> pb.ModelInfo:
        """What is served, with which limits and defaults."""
        return self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest(), timeout)

    def ready(self, *, timeout: float = 5.0) -> bool:
        """Whether the server says that it serves."""
        seconds = checks.timeout("timeout", timeout)
        return not self._why_not_ready(seconds)

    def wait_ready(self, timeout: float) -> None:
        """Returns when the server serves.

        Raises:
          DeadlineExceeded: it did not within `timeout` seconds.
        """
        wait = Wait(self.address, timeout)
        while why := self._why_not_ready(wait.next_look()):
            wait.saw(why)
            time.sleep(LOOK_EVERY)

    def close(self) -> None:
        """Ends calls that run, and the connection. Those that are made then are errors."""
        self._closed = True
        self._channel.close()

    def _call(
        self, method: Any, request: Any, timeout: float | None, metadata: Metadata = ()
    ) -> Any:
        with translated():
            return method(request, **self._how(timeout, metadata))

    def _why_not_ready(self, seconds: float | None) -> str:
        self._check_open()
        try:
            return why_not(self._health.Check(QUESTION, timeout=seconds))
        except grpc.RpcError as error:
            return why_no_answer(error)

    def _how(self, timeout: float | None, metadata: Metadata) -> dict[str, Any]:
        self._check_open()
        return self._to.how(timeout, metadata)

    def _check_open(self) -> None:
        """Of a closed channel grpc raises errors of its own, each kind another."""
        if self._closed:
            raise QuireError("client: it was closed, and makes no more calls")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(Iterator[pb.GenerateChunk]):
    """Chunks of one call. Closing it early, by `close`, `with` or dropping the last reference to
    it, ends the request."""

    def __init__(self, call: Any):
        self._call = call

    def __next__(self) -> pb.GenerateChunk:
        with translated():
            chunk: pb.GenerateChunk = next(self._call)
            return chunk

    def close(self) -> None:
        self._call.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
