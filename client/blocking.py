"""`Client`: calls that block, and streams that are iterators."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Unpack, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..errors import DeadlineExceeded
from ..protos.v1 import generation_pb2 as pb
from ..protos.v1 import generation_pb2_grpc as pb_grpc
from .channel import AS_USUAL, SERVICE, TLS, Metadata, Retry, credentials, key_metadata, options
from .failures import translated
from .messages import (
    Fields,
    Labels,
    Messages,
    Prompt,
    embed_request,
    generate_request,
    tokenize_request,
)
from .messages import token_ids as ids_message

_LOOK_EVERY = 0.2
"""Seconds between two looks at whether a server is ready."""


class Client:
    """Calls one server. Safe to use from several threads; close it, or use `with`.

    Args:
      address: HOST:PORT, or anything else that grpc takes as a target ("unix:…", "dns:///…").
      api_key: sent with each call. Without TLS anybody on the way can read it.
      tls: how to talk TLS; True trusts whom the system trusts, False is plain text.
      timeout: seconds that a call may take where it does not say itself; None is any time.
      retry: what to do when the server is UNAVAILABLE.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: TLS | bool = False,
        timeout: float | None = None,
        retry: Retry = AS_USUAL,
    ):
        self.address = address
        self._timeout = timeout
        self._metadata = key_metadata(api_key)
        secrets = credentials(tls)
        self._channel = (
            grpc.insecure_channel(address, options=options(retry))
            if secrets is None
            else grpc.secure_channel(address, secrets, options=options(retry))
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
        return cast(
            pb.GenerateResponse, self._call(self._stub.Generate, request, timeout, metadata)
        )

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
        return Stream(
            self._stub.StreamGenerate(
                request,
                timeout=self._timeout if timeout is None else timeout,
                metadata=(*self._metadata, *metadata),
            )
        )

    def embed(
        self,
        inputs: Sequence[Prompt],
        *,
        timeout: float | None = None,
        metadata: Metadata = (),
        **labels: Unpack[Labels],
    ) -> pb.EmbedResponse:
        """An embedding of each input, of length 1; other arguments as of `generate`."""
        request = embed_request(inputs, labels)
        return cast(pb.EmbedResponse, self._call(self._stub.Embed, request, timeout, metadata))

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
        return cast(pb.TokenizeResponse, self._call(self._stub.Tokenize, request, timeout))

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(skip_special_tokens=skip_special_tokens)
        request.token_ids.extend(ids_message("token_ids", token_ids).ids)
        return str(self._call(self._stub.Detokenize, request, timeout).text)

    def model_info(self, *, timeout: float | None = None) -> pb.ModelInfo:
        """What is served, with which limits and defaults."""
        request = pb.GetModelInfoRequest()
        return cast(pb.ModelInfo, self._call(self._stub.GetModelInfo, request, timeout))

    def ready(self, *, timeout: float = 5.0) -> bool:
        """Whether the server says that it serves."""
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            status = self._health.Check(request, timeout=timeout).status
        except grpc.RpcError:
            return False
        return bool(status == health_pb2.HealthCheckResponse.SERVING)

    def wait_ready(self, timeout: float) -> None:
        """Returns when the server serves.

        Raises:
          DeadlineExceeded: it did not within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while not self.ready():
            if time.monotonic() >= end:
                raise DeadlineExceeded(f"{self.address}: not ready within {timeout:g} s")
            time.sleep(_LOOK_EVERY)

    def close(self) -> None:
        """Ends calls that run, and the connection."""
        self._channel.close()

    def _call(
        self, method: Any, request: Any, timeout: float | None, metadata: Metadata = ()
    ) -> Any:
        with translated():
            return method(
                request,
                timeout=self._timeout if timeout is None else timeout,
                metadata=(*self._metadata, *metadata),
            )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Stream(Iterator[pb.GenerateChunk]):
    """Chunks of one call. Closing it early, by `close`, `with` or dropping the last reference to
    it, ends the request."""

    def __init__(self, call: Any):
        self._call = call

    def __next__(self) -> pb.GenerateChunk:
        with translated():
            return cast(pb.GenerateChunk, next(self._call))

    def close(self) -> None:
        self._call.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
