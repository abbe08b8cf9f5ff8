"""A client process of `quire bench frontend`; not for people.

    python -P -m quire.tools.bench.frontend_client ADDRESS STREAMS TOKENS VOCAB BEGIN END

Opens its streams at once, reads messages, and looks at what came between BEGIN and END (seconds of
time.monotonic). Prints one JSON object. It does as little as it can: it may share cores with what
is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter

import grpc

from ...protos.v1 import generation_pb2 as pb
from ...serving.collector import quiet_collector
from .paced_engine import Clock


class Seen:
    """What came."""

    def __init__(self) -> None:
        self.messages = 0
        self.tokens = 0
        self.delays: Counter[int] = Counter()  # ms since a token was made, how often


async def _read(
    channel: grpc.aio.Channel, request: bytes, seen: Seen, vocab: int, begin: float, end: float
) -> None:
    method = "/quire.v1.GenerationService/StreamGenerate"
    calls = channel.unary_stream(method, request_serializer=None, response_deserializer=None)
    call = calls(request)
    clock = Clock(vocab)
    async for message in call:
        now = time.monotonic()
        tokens = pb.GenerateChunk.FromString(message).token_ids
        ages = [clock.age(token, now) for token in tokens]
        if begin <= now < end:
            seen.messages += 1
            seen.tokens += len(tokens)
            seen.delays.update(ages)


async def main(
    address: str, streams: int, tokens: int, vocab: int, begin: float, end: float
) -> None:
    """Runs the streams to their end."""
    request = pb.GenerateRequest(
        text="Say something.",
        sampling=pb.SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens),
    ).SerializeToString()
    seen = Seen()
    quiet_collector()
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(
            *(_read(channel, request, seen, vocab, begin, end) for _ in range(streams))
        )
    said = {"messages": seen.messages, "tokens": seen.tokens, "delays": dict(seen.delays)}
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    where, *numbers = sys.argv[1:]
    first, second, third = map(int, numbers[:3])
    asyncio.run(main(where, first, second, third, *map(float, numbers[3:])))
