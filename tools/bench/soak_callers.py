"""Callers of every kind, good and bad, for soak.py: each makes one call and says how it ended.

What a server must never do raises Misbehaved: an answer that ends twice or not at all, a wrong
count of tokens, a bad request that is served, an error that nobody caused.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...client import AsyncClient, AsyncStream, Retry
from ...errors import DeadlineExceeded, InvalidRequest, Overloaded, QuireError, Unavailable
from ...protos.v1 import generation_pb2 as pb
from .soak_ledger import Ledger, Seen

MOST_TOKENS = 200
ONCE = Retry(attempts=1)


class Misbehaved(Exception):
    """The server did what it must not."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call, and where what came of it is noted."""

    client: AsyncClient
    rng: random.Random
    request_id: str
    ledger: Ledger

    def stream(self, client: AsyncClient | None = None, **how: Any) -> AsyncStream:
        """Asks for something; over another client where told."""
        fields = _sampling(self.rng) | how
        return (client or self.client).stream(
            _prompt(self.rng), request_id=self.request_id, **fields
        )

    async def noted(self, stream: AsyncStream) -> AsyncIterator[pb.GenerateChunk]:
        """What comes of it."""
        async for chunk in stream:
            self.ledger.note(self.request_id, Seen.BEGUN)
            yield chunk
        self.ledger.note(self.request_id, Seen.WHOLE)


async def reads_all(call: Call) -> str:
    _check_stream([chunk async for chunk in call.noted(call.stream())])
    return "whole streams"


async def waits(call: Call) -> str:
    rng = call.rng
    response = await call.client.generate(
        _prompt(rng), request_id=call.request_id, **_sampling(rng)
    )
    call.ledger.note(call.request_id, Seen.WHOLE)
    if not response.finish_reason or response.usage.completion_tokens < len(response.token_ids):
        raise Misbehaved(f"an answer without an end: {response}")
    return "whole answers"


async def reads_slowly(call: Call) -> str:
    chunks = []
    async for chunk in call.noted(call.stream()):
        chunks.append(chunk)
        await asyncio.sleep(call.rng.uniform(0, 0.2))
    _check_stream(chunks)
    return "slow readers"


async def cancels(call: Call) -> str:
    left = call.rng.randint(0, 20)
    async with call.stream() as stream:
        async for _ in call.noted(stream):
            left -= 1
            if left < 0:
                break
    return "cancelled"


async def has_no_time(call: Call) -> str:
    try:
        timeout = call.rng.choice((0.002, 0.02, 0.2, 1.0))
        async for _ in call.noted(call.stream(timeout=timeout)):
            pass
    except DeadlineExceeded:
        return "past their deadline"
    return "within their deadline"


async def vanishes(call: Call) -> str:
    """Its connection breaks in the middle, without a word to the server."""
    left = call.rng.randint(0, 5)
    async with (
        Cable(call.client.address) as cable,
        AsyncClient(cable.address, retry=ONCE) as own,
    ):
        try:
            async for _ in call.noted(call.stream(own)):
                left -= 1
                if left < 0:
                    cable.cut()
        except Unavailable:
            return "disconnected"
    return "whole streams"  # it was shorter than that


class Cable:
    """A TCP connection by way of this process, so that it can be cut.

    Attributes:
      address: where to connect instead.
    """

    def __init__(self, address: str):
        self._host, _, self._port = address.rpartition(":")
        self._ends: list[asyncio.StreamWriter] = []
        self.address = ""

    async def __aenter__(self) -> Cable:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection(self._host, int(self._port))
        self._ends += [writer, here]
        await asyncio.gather(self._carry(reader, here), self._carry(there, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while some := await reader.read(1 << 16):
                writer.write(some)
                await writer.drain()
        except OSError:
            pass  # it was cut
        writer.transport.abort()

    def cut(self) -> None:
        for end in self._ends:
            end.transport.abort()


async def asks_wrongly(call: Call) -> str:
    fields, prompt = call.rng.choice(_WRONG)
    fields = {"request_id": call.request_id, **fields}
    try:
        if call.rng.random() < 0.5:
            await call.client.generate(prompt, **fields)
        else:
            async for _ in call.client.stream(prompt, **fields):
                pass
    except InvalidRequest:
        call.ledger.note(call.request_id, Seen.REFUSED)
        return "bad requests"
    raise Misbehaved(f"served, and should not be: {fields}")


_WRONG: tuple[tuple[Any, Any], ...] = (
    ({"temperature": -1.0}, "x"),
    ({"top_p": 0.0}, "x"),
    ({"max_tokens": 0}, "x"),
    ({"logit_bias": {4_000_000: 1.0}}, "x"),
    ({"stop": [""]}, "x"),
    ({"n": 1000}, "x"),
    ({"max_tokens": 8}, ""),
    ({"max_tokens": 8}, [4_000_000]),
    ({"max_tokens": 8}, "x " * 100_000),
)

Caller = Callable[[Call], Awaitable[str]]

CALLERS: tuple[tuple[Caller, int], ...] = (
    (reads_all, 45),
    (waits, 10),
    (reads_slowly, 5),
    (cancels, 15),
    (has_no_time, 10),
    (vanishes, 5),
    (asks_wrongly, 10),
)
"""And how many of a hundred are such."""


async def call_until(
    ends: Callable[[], bool],
    address: str,
    seed: int,
    ledger: Ledger,
    ended: Callable[[str], None],
) -> None:
    """Makes one call after the other; tells how each ended, and notes it.

    Raises:
      Misbehaved: the server did what it must not.
    """
    rng, number = random.Random(seed), 0
    callers, weights = zip(*CALLERS, strict=True)
    async with AsyncClient(address, retry=ONCE, timeout=300) as client:
        while not ends():
            (caller,) = rng.choices(callers, weights)
            call, number = Call(client, rng, f"soak-{seed}-{number}", ledger), number + 1
            ledger.note(call.request_id, Seen.NOTHING)
            try:
                ended(await caller(call))
            except Overloaded as refused:
                ledger.note(call.request_id, Seen.REFUSED)
                ended("refused for now")
                await asyncio.sleep(min(refused.retry_after, 1.0))
            except QuireError as error:
                raise Misbehaved(f"{caller.__name__}: {type(error).__name__}: {error}") from error


def _prompt(rng: random.Random) -> list[int]:
    """Random ids; every other one begins as some others do."""
    shared = [rng.randrange(8)] * rng.choice((0, 40, 100))
    return shared + [rng.randrange(256) for _ in range(rng.randint(1, 60))]


def _sampling(rng: random.Random) -> Any:
    chosen: dict[str, Any] = {"max_tokens": rng.randint(1, MOST_TOKENS), "ignore_eos": True}
    if rng.random() < 0.3:
        chosen |= {"temperature": 1.0, "top_p": 0.9, "seed": rng.randrange(1000)}
    if rng.random() < 0.1:
        chosen |= {"logprobs": 2, "frequency_penalty": 0.5}
    if rng.random() < 0.1:
        chosen |= {"n": 2}
    if rng.random() < 0.2:
        chosen |= {"stop": ["a", "the "]}
    return chosen


def _check_stream(chunks: Iterable[pb.GenerateChunk]) -> None:
    chunks = list(chunks)
    ends: dict[int, int] = {}
    for at, chunk in enumerate(chunks):
        if chunk.finish_reason:
            ends[chunk.index] = ends.get(chunk.index, 0) + 1
        if chunk.HasField("usage") != (at == len(chunks) - 1):
            raise Misbehaved(f"usage on message {at} of {len(chunks)}")
    answers = {chunk.index for chunk in chunks}
    if not answers or ends != dict.fromkeys(answers, 1):
        raise Misbehaved(f"answers {answers} ended so often: {ends}")
    tokens = sum(len(chunk.token_ids) for chunk in chunks)
    if tokens != chunks[-1].usage.completion_tokens:
        raise Misbehaved(f"{tokens} tokens came, of {chunks[-1].usage.completion_tokens}")
