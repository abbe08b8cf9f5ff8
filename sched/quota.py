"""What each tenant may ask for: requests and tokens a minute, answers at once, priority.

Asked by the engine for every request it accepts, and told of what becomes of them; so limits hold
for all callers of an engine, whichever frontend they come by. Safe from any thread; `update`
replaces the limits at any time. Before the first `update` nobody is limited; from then on only
those who were named may ask at all: a frontend may know of a new tenant before the engine does, or
still know of one that is gone, and nobody shall be served without limits meanwhile.

Rates are token buckets that hold what a minute allows: a tenant may use up a minute's worth at
once, and then as much as flows in. A prompt is taken from the bucket when its request is accepted.
The tokens of an answer are taken as they come, because nobody knows before how many there will be:
the bucket may go below empty, and nothing is accepted before it has filled again. What is refused
takes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..errors import Overloaded, Unavailable, invalid
from .request import Request, RequestOutput

MAX_RETRY_AFTER = 60.0
"""Seconds; the longest hint where nobody knows when an answer ends."""

_NOTHING = 1e-9
"""Share of a bucket that rounding may miss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one tenant. None means: no limit.

    Attributes:
      requests_per_minute: requests accepted.
      tokens_per_minute: of prompts, when they are accepted, and of answers, as they come.
      concurrency: answers at once, waiting or in the making; a request with n = 4 has four.
      top_priority: the lowest number that its requests may have as priority.
      weight: its share of the engine when others want it too, relative to theirs; above 0.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    top_priority: int | None = None
    weight: float = 1.0


class Bucket:
    """Holds what a minute allows, and fills at that rate.

    Args:
      per_minute: more than 0.
      now: seconds; it is full.
    """

    def __init__(self, per_minute: int, now: float):
        self.capacity = float(per_minute)
        self._level = self.capacity
        self._since = now

    def wait_for(self, amount: float, now: float) -> float:
        """Seconds until so much is there, if nothing is taken meanwhile."""
        self._fill(now)
        missing = amount - self._level
        return missing * 60 / self.capacity if missing > _NOTHING * self.capacity else 0.0

    def take(self, amount: float, now: float) -> None:
        """May leave less than nothing."""
        self._fill(now)
        self._level -= amount

    def resize(self, per_minute: int, now: float) -> None:
        """Another limit from now on; what was used stays used."""
        self._fill(now)
        used = self.capacity - self._level
        self.capacity = float(per_minute)
        self._level = self.capacity - used

    def _fill(self, now: float) -> None:
        if now > self._since:
            gained = (now - self._since) * self.capacity / 60
            self._level = min(self.capacity, self._level + gained)
            self._since = now


class _Account:
    """What one tenant has used."""

    def __init__(self, limits: Limits, now: float):
        self.limits = limits
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.answers = 0  # accepted, and not ended
        self.last_seconds = 1.0  # the latest request took from acceptance to end
        self.limit(limits, now)

    def limit(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.requests = _resized(self.requests, limits.requests_per_minute, now)
        self.tokens = _resized(self.tokens, limits.tokens_per_minute, now)


def _resized(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.resize(per_minute, now)
    return bucket


class Quotas:
    """The limits of all tenants, and what of them is used.

    Args:
      clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._lock = threading.Lock()
        self._is_open = True  # to whom nothing is said of
        self._accounts: dict[str, _Account] = {}
        self._open: dict[str, tuple[_Account, int, float]] = {}  # request: answers, accepted at

    def update(self, table: Mapping[str, Limits]) -> None:
        """The limits from now on, by tenant; who is not named is not served.

        What a tenant has used so far counts on.
        """
        with self._lock:
            self._is_open, now = False, self._clock()
            for name in self._accounts.keys() - table.keys():
                del self._accounts[name]
            for name, limits in table.items():
                account = self._accounts.get(name)
                if account is None:
                    self._accounts[name] = _Account(limits, now)
                else:
                    account.limit(limits, now)

    def accept(self, request: Request) -> None:
        """Counts a request that is about to be accepted.

        Raises:
          InvalidRequest: it can never be accepted within the tenant's limits.
          Unavailable: nothing is known of its tenant, yet or any more.
          Overloaded: not now; `retry_after` says when, if nothing else is accepted and no answer
            goes on meanwhile; for `concurrency`, how long the latest request took.
        """
        with self._lock:
            account = self._accounts.get(request.tenant)
            if account is None:
                if self._is_open:
                    return
                raise Unavailable(
                    f"tenant: {request.tenant!r} is not known to the engine, yet or any more; "
                    "try again in a few seconds"
                )
            now = self._clock()
            answers, prompt = request.sampling.choices, len(request.prompt)
            _check(request, account.limits)
            waits = []
            if account.requests is not None:
                wait = account.requests.wait_for(1, now)
                waits.append((wait, "requests_per_minute", account.limits.requests_per_minute))
            if account.tokens is not None:
                wait = account.tokens.wait_for(prompt, now)
                waits.append((wait, "tokens_per_minute", account.limits.tokens_per_minute))
            most = account.limits.concurrency
            if most is not None and account.answers + answers > most:
                waits.append((account.last_seconds, "concurrency", most))
            wait, name, limit = max(waits, default=(0.0, "", None), key=lambda each: each[0])
            if wait > 0:
                raise Overloaded(
                    f"{name}: tenant {request.tenant!r} is at its limit of {limit}; "
                    f"retry in {wait:.3g} s",
                    retry_after=wait,
                )
            if account.requests is not None:
                account.requests.take(1, now)
            if account.tokens is not None:
                account.tokens.take(prompt, now)
            account.answers += answers
            self._open[request.id] = account, answers, now

    def observe(self, outputs: Iterable[RequestOutput]) -> None:
        """Counts the tokens of a step's outputs, and the requests that ended with them."""
        if not self._open:
            return
        with self._lock:
            now = self._clock()
            for output in outputs:
                found = self._open.get(output.request_id)
                if found is None:
                    continue
                account, answers, accepted = found
                if account.tokens is not None and output.tokens:
                    account.tokens.take(len(output.tokens), now)
                if output.ended:
                    del self._open[output.request_id]
                    account.answers -= answers
                    account.last_seconds = min(max(now - accepted, 1.0), MAX_RETRY_AFTER)


def _check(request: Request, limits: Limits) -> None:
    """Raises InvalidRequest for what can never be accepted."""
    whose = f"for tenant {request.tenant!r}"
    top, most, tokens = limits.top_priority, limits.concurrency, limits.tokens_per_minute
    if top is not None and request.priority < top:
        raise invalid("priority", request.priority, f"at least {top} {whose}")
    if most is not None and request.sampling.choices > most:
        raise invalid("n, best_of", request.sampling.choices, f"at most {most} {whose}")
    if tokens is not None and len(request.prompt) > tokens:
        got = f"{len(request.prompt)} tokens"
        raise invalid("prompt", got, f"at most {tokens}, the tokens per minute {whose}")
