"""A client process of `quire bench frontend`; not for people.

    python -P -m quire.tools.bench.frontend_client ADDRESS STREAMS TOKENS VOCAB BEGIN END

Opens its streams at once, on one connection, reads messages, and looks at what came between BEGIN
and END (seconds of time.monotonic). Prints one JSON object.

It shares cores with what is measured, so it does as little as it can (http2.py). A message is there
when its last byte was read from the socket.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter

import uvloop

from ...protos.v1 import generation_pb2 as pb
from ...serving.collector import quiet_collector
from .http2 import Streams
from .paced_engine import Clock

_METHOD = "/quire.v1.GenerationService/StreamGenerate"


class Stream:
    """One answer, as far as it came."""

    def __init__(self, vocab: int) -> None:
        self.clock = Clock(vocab)
        self.tokens = 0


class Connection(Streams):
    """Asks for answers and reads them.

    Args:
      request: one for each answer.
      tokens: that each answer has.
      begin, end: what comes between is counted, time.monotonic().

    Attributes:
      messages, tokens: how many were counted.
      delays: milliseconds since a token was made, and how often.
      ended: when all answers did, or with the error that kept one from it.
    """

    def __init__(
        self, streams: int, request: bytes, tokens: int, vocab: int, begin: float, end: float
    ) -> None:
        super().__init__()
        self._request, self._wanted, self._begin, self._end = request, tokens, begin, end
        self._count, self._vocab = streams, vocab
        self._answers: dict[int, Stream] = {}  # by the call's number
        self._now = 0.0  # when the last data came
        self.messages = self.tokens = 0
        self.delays: Counter[int] = Counter()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        for _ in range(self._count):
            self._answers[self.call(_METHOD, self._request)] = Stream(self._vocab)

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        super().data_received(data)

    def came(self, number: int, message: bytes) -> None:
        stream, now = self._answers[number], self._now
        tokens = pb.GenerateChunk.FromString(message).token_ids
        ages = [stream.clock.age(token, now) for token in tokens]
        stream.tokens += len(ages)
        if self._begin <= now < self._end:
            self.messages += 1
            self.tokens += len(ages)
            self.delays.update(ages)

    def over(self, number: int, headers: dict[str, str]) -> None:
        got = self._answers.pop(number).tokens
        if got != self._wanted:
            self.lost(f"a stream ended after {got} of {self._wanted} tokens")
        elif not self._answers and not self.ended.done():
            self.ended.set_result(None)

    def lost(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(why))


async def main(
    address: str, streams: int, tokens: int, vocab: int, begin: float, end: float
) -> None:
    """Runs the streams to their end."""
    request = pb.GenerateRequest(
        text="Say something.",
        sampling=pb.SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens),
    ).SerializeToString()
    host, _, port = address.rpartition(":")
    quiet_collector()
    transport, seen = await asyncio.get_running_loop().create_connection(
        lambda: Connection(streams, request, tokens, vocab, begin, end), host, int(port)
    )
    await seen.ended
    transport.abort()
    said = {"messages": seen.messages, "tokens": seen.tokens, "delays": dict(seen.delays)}
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    where, *numbers = sys.argv[1:]
    first, second, third = map(int, numbers[:3])
    uvloop.run(main(where, first, second, third, *map(float, numbers[3:])))
