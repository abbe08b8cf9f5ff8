"""Callers in processes of their own, so that many tokens a second do not wait for the caller's
Python. Used by online.py and serve.py, which run this module as

    python -P -m quire.tools.bench.load_process

On stdin a line of JSON: {"address": ..., "nearby": ..., "warm": LOAD, "load": LOAD}, LOAD being
{"prompts": [...], "outputs": [...], "due": [...]} (token ids, tokens, seconds). In a closed loop
there are "streams", how many requests it has under way, and "queue", a pipe that all processes read
which to send next from; each then knows the whole load. It sends the warm-up's requests, and says
what was served of them, a line of JSON; reads another line, the time.monotonic() at which the load
begins; and says what was served of that. Before such a line there may be numbers, a line each: how
many requests have ended.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import uvloop

from ...errors import Internal
from .load import Served, run_closed, run_load
from .targets import GrpcTarget, WireTarget

_AHEAD = 0.3
"""Seconds between when all are told of the begin and the begin."""

_SAY_EVERY = 1.0
"""Seconds between words on how far it is, at least."""

_LINE = 1 << 30
"""Bytes that a line of theirs may have."""

_NUMBER = struct.Struct("i")
"""Of a request, in the pipe."""

Load = dict[str, list[Any]]


async def serve_load(
    address: str,
    clients: int,
    warm: Load,
    load: Load,
    progress: Callable[[int, int], None] = lambda done, total: None,
    streams: int | None = None,
    *,
    nearby: bool = False,
) -> tuple[list[Served], list[Served]]:
    """Sends a warm-up, waits for its end, and then a load, both spread over `clients` processes.

    Args:
      streams: requests of the load under way at once, each that ends is followed by the next
        whatever its `due`; None: each is sent when it is due.
      nearby: the server is on this machine, and spoken to by as little as can be (WireTarget).
      progress: hears how many requests of the load have ended, of how many.

    Returns:
      Those of the warm-up, and of the load, each in order.

    Raises:
      Internal: a process failed.
    """
    command = [sys.executable, "-P", "-m", f"{__package__}.load_process"]
    pipe = asyncio.subprocess.PIPE
    with _queue(0 if streams is None else len(load["prompts"])) as queue:
        processes = [
            await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, limit=_LINE, pass_fds=[queue]
            )
            for _ in range(clients)
        ]
    try:
        for at, process in enumerate(processes):
            job: dict[str, Any] = {"address": address, "warm": _part(warm, at, clients)}
            job["nearby"] = nearby
            if streams is None:
                job["load"] = _part(load, at, clients)
            else:
                part = (streams + at) // clients  # which add up to all
                job |= {"load": load, "streams": part, "queue": queue}
            await _tell(process, job)
        warmed = await asyncio.gather(*(_hear(process) for process in processes))
        begin = time.monotonic() + _AHEAD
        for process in processes:
            await _tell(process, begin)
        ended = [0] * clients

        def heard(at: int, done: int) -> None:
            ended[at] = done
            progress(sum(ended), len(load["due"]))

        served = await asyncio.gather(
            *(_hear(process, partial(heard, at)) for at, process in enumerate(processes))
        )
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
    return _merged(warmed), _merged(served)


@contextmanager
def _queue(count: int) -> Iterator[int]:
    """A pipe that holds the numbers below `count`, and then ends."""
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, max(_NUMBER.size * count, 1))  # else it could block
        for number in range(count):
            os.write(writer, _NUMBER.pack(number))
        os.close(writer)
        yield reader
    finally:
        os.close(reader)


def _taken(queue: int) -> Iterator[int]:
    """What nobody else took from such a pipe."""
    while number := os.read(queue, _NUMBER.size):
        yield _NUMBER.unpack(number)[0]


def _part(load: Load, at: int, clients: int) -> Load:
    return {name: values[at::clients] for name, values in load.items()}


async def _tell(process: asyncio.subprocess.Process, what: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what).encode() + b"\n")
    try:
        await process.stdin.drain()
    except ConnectionError as error:
        raise Internal("a caller's process ended early; see above") from error


async def _hear(
    process: asyncio.subprocess.Process, progress: Callable[[int], None] = lambda done: None
) -> list[Served]:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        said = json.loads(line)
        if not isinstance(said, int):
            return [Served(**each) for each in said]
        progress(said)
    raise Internal("a caller's process ended early; see above")


def _merged(parts: Sequence[list[Served]]) -> list[Served]:
    return sorted((each for part in parts for each in part), key=lambda each: each.due)


async def _main() -> None:
    """In the process."""
    job = json.loads(sys.stdin.readline())
    address = job["address"]
    to = WireTarget(address) if job["nearby"] else GrpcTarget(address, api_key=None, tls=False)
    async with to as target:
        _say_all(await run_load(target, **job["warm"], progress=_Progress()))
        begin = float(await asyncio.to_thread(sys.stdin.readline))
        load, progress = job["load"], _Progress()
        if "queue" in job:
            more = {"streams": job["streams"], "take": _taken(job["queue"])}
            prompts, outputs = load["prompts"], load["outputs"]
            _say_all(
                await run_closed(target, prompts, outputs, progress=progress, begin=begin, **more)
            )
        else:
            _say_all(await run_load(target, **load, progress=progress, begin=begin))


class _Progress:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if (now := time.monotonic()) - self._last >= _SAY_EVERY:
            self._last = now
            _say(done)


def _say_all(served: list[Served]) -> None:
    _say([asdict(each) for each in served])


def _say(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    from ...serving.collector import quiet_collector

    quiet_collector()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it, without a traceback
    uvloop.run(_main())  # whose turns cost a caller far less
