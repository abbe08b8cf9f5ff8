"""Clients of Quire's gRPC service: `Client` blocks, `AsyncClient` is for asyncio.

    with Client("localhost:8000") as client:
        print(client.generate("Once upon a time", max_tokens=32).text)
        for chunk in client.stream("Once upon a time", max_tokens=32):
            print(chunk.text, end="", flush=True)

Thin: requests and answers are the messages of protos/v1/generation.proto, whose comments say what
each field means; sampling parameters are keyword arguments by their names there. Errors are those
of `quire.errors`. Used by the tests and the benchmarks, and by whoever calls a server from Python.
"""

from .asynchronous import AsyncClient, AsyncStream
from .blocking import Client, Stream
from .channel import Retry
from .messages import chat
from .tls import TLS

__all__ = ["TLS", "AsyncClient", "AsyncStream", "Client", "Retry", "Stream", "chat"]
