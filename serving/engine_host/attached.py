"""A frontend as the engine process sees it: its requests, and what it is sent and when. Kept by
host.py, on its event loop.

One that is behind, as it says itself, gets several Steps in one message; their size is bounded by
the lengths of its answers. The first token of a request does not wait until it has caught up,
unless several messages have gone ahead already.
"""

from __future__ import annotations

import asyncio
import logging

from ...protos.v1 import engine_pb2 as pb
from ...sched.request import RequestOutput
from ..engine_stream import EngineStream
from ..engine_wire import output_message
from ..telemetry.logs import fields

log = logging.getLogger(__name__)

MOST_AHEAD = 4
"""Messages sent to a frontend that has not dealt with the last one, for what is urgent."""


class Attached:
    """A frontend that is attached.

    Args:
      stream: to it.
      name: for people.
      pid: of its process.

    Attributes:
      live: its unfinished requests: handle to id.
      behind: there is something that it has not been sent.
      lost: there is something that it will never be sent.
    """

    def __init__(self, stream: EngineStream[pb.ToEngine], name: str = "", pid: int = 0) -> None:
        self._stream, self._name, self._pid = stream, name, pid
        self.live: dict[int, str] = {}
        self.behind = False
        self.lost = asyncio.Event()
        self._next = pb.FromEngine()
        self._awaited = False  # the last message that asked for it has not been dealt with
        self._ahead = 0  # messages since that one

    def log(self, level: int, what: str) -> None:
        """Says what became of it, which costs it its requests."""
        said = fields(process=self._name, pid=self._pid)
        log.log(level, "%s %s; %d requests of it end", self._name, what, len(self.live), extra=said)

    def send(self, step: pb.Step, *, urgent: bool = False) -> None:
        """Sends a step once the last message has been dealt with; at once, with all that waits,
        what is urgent."""
        self._next.steps.append(step)
        self.behind = True
        if not self._awaited or (urgent and self._ahead < MOST_AHEAD):
            self._write()

    def taken(self) -> None:
        """It has dealt with the last message that asked for it."""
        self._awaited = False
        if self.behind:
            self._write()

    def _write(self) -> None:
        message, self._next = self._next, pb.FromEngine()
        # What goes ahead asks for nothing: the answer to the one before is still to come.
        message.awaited = not self._awaited
        self._ahead = self._ahead + 1 if self._awaited else 0
        self._awaited, self.behind = True, False
        self._stream.send(message)


class Route:
    """Where the outputs of one request go."""

    __slots__ = ("begun", "cached", "frontend", "handle")

    def __init__(self, frontend: Attached, handle: int):
        self.frontend, self.handle = frontend, handle
        self.cached = 0  # as the frontend knows it
        self.begun = False  # something of it went out


class StepDraft:
    """A `Step` in the making.

    Attributes:
      urgent: it has the first of a request, for which somebody waits.
    """

    __slots__ = ("_counts", "_handles", "_outputs", "_several", "_tokens", "urgent")

    def __init__(self) -> None:
        self.urgent = False
        self._handles: list[int] = []
        self._tokens: list[int] = []
        self._counts: list[int] = []
        self._several = False
        self._outputs: list[pb.Output] = []

    def add(self, route: Route, output: RequestOutput) -> None:
        if not route.begun:
            route.begun = self.urgent = True
        if (
            output.finish_reason is None
            and output.logprobs is None
            and output.prompt_logprobs is None
            and not output.ended
            and not output.choice
            and output.cached_tokens == route.cached
        ):
            tokens = output.tokens
            self._handles.append(route.handle)
            self._tokens += tokens
            self._counts.append(len(tokens))
            self._several |= len(tokens) != 1
        else:
            route.cached = output.cached_tokens
            self._outputs.append(output_message(route.handle, output))

    def message(self) -> pb.Step:
        return pb.Step(
            handles=self._handles,
            tokens=self._tokens,
            counts=self._counts if self._several else (),
            outputs=self._outputs,
        )
