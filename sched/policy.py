"""Who gives way, who may come in, and how many tokens a dispatch decodes.

Called by the scheduler; pure. Who is served first is the business of fairness.py. Everything here
could be decided otherwise without harm to correctness: the scheduler keeps pages and slots right
under any policy, as long as the first of those who run never gives way to another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np

from ..kv.cache import KVCache, PrefixHit
from ..model.plan import Ladder, RunnerSpec, Sampler
from .fairness import OUTPUT_COST, FairQueue
from .ranked import Ranked
from .sequence import Sequence, richest

MAX_RECOMPUTE_RATIO = 0.1
"""Recomputed per useful token above which admission reserves the worst case."""

LATE = 2
"""Steps that an answer which ends keeps its pages while others grow: its last result is read when
the next step has been planned, and one whose prompt is still computed is a step or more behind."""

LONG_ANSWER = 1024
"""Tokens that an answer is taken to have at most where nobody knows."""

MIN_LEAD = 1 / 8
"""Part of what may be kept unused (fairness.py) that a tenant must have had more than another to
lose a place to it while that runs its share. Who asks for a part `r` of its share falls behind one
that floods by (1 - r) / (1 - r / 2) of that and less: more, and the first minutes of a flood would
delay who asks for most of its share; nothing, and tenants at their shares would take each other's
places because of who came when."""

BUSY_TOKENS, BUSY_TOKENS_PER_ROW = 768, 4
"""Tokens of a step with decode rows, at least and for each of those. 768 tokens take an 8B model
some 20 ms on an H200, by what prompts of 128 and 1,024 took (docs/performance.md): so long a row
may wait for its next token. Where many rows wait, a step of so few would be dear: each reads the
cache of all."""

MAX_FAIR_RECOMPUTE_RATIO = 0.05
"""Recomputed per useful token above which nobody gives way to a newcomer of another tenant."""


def decode_tokens(
    spec: RunnerSpec,
    running: Collection[Sequence],
    prefilling: int,
    waiting: int,
    cache: KVCache,
) -> int:
    """How many tokens each decode row may emit in the next dispatch.

    More than one saves host work, but holds up whoever arrives before the dispatch ends, and may
    ask for pages early. So only when nobody waits or prefills (whoever does is not held up a second
    time: the next dispatch is of one token), when every row could get its pages, and when there is
    a program for so many rows with the richest sampler among them. There is none for rows with
    controls or log-probabilities, nor, on the default ladder, for so many rows that k steps of them
    would keep an arrival waiting for more than 15 ms.
    """
    if spec.max_k == 1 or not running or prefilling or waiting:
        return 1
    if cache.available < len(running) * cache.pages_for(spec.max_k):
        return 1
    return spec.ladder.most_k(len(running), richest(running))


def step_tokens(ladder: Ladder, most: int, decoding: int, sampler: Sampler) -> int:
    """Tokens that a step may have: fewer than it could hold while answers wait for their next token
    behind the prompts of others. A whole rung of the step's sampler (richer ones have
    fewer), so that none of it is padding while prompts wait.

    Args:
      ladder: all rungs.
      most: tokens that any step may have.
      decoding: rows that decode.
      sampler: the richest that these need.
    """
    if not decoding:
        return most
    return min(most, ladder.chunk_size(max(BUSY_TOKENS, BUSY_TOKENS_PER_ROW * decoding), sampler))


def reserved_pages(
    running: Collection[Sequence],
    prefilling: Iterable[Sequence],
    cache: KVCache,
    *,
    worst_case: bool,
) -> int:
    """Pages that admission must leave for those who run already.

    Normally what their prompts still need and one more for each, so that nobody has to give way at
    once; in the worst case all they may ever need, so that nobody has to give way at all. Where
    so many are not left, `fits_over_time` asks what all need at the same time.
    """
    if worst_case:
        return sum(cache.pages_for(seq.limit) - len(seq.kv.pages) for seq in running)
    prompts = sum(cache.pages_for(seq.target) - len(seq.kv.pages) for seq in prefilling)
    return prompts + len(running)


def may_enter(
    seq: Sequence, hit: PrefixHit, reserved: int, cache: KVCache, *, worst_case: bool
) -> bool:
    """Whether pages are left for a waiting sequence, beside those reserved for running ones.

    A lone request always may: limits.py made sure that its worst case fits. Who just gave way may
    not: it needs all it gave and a page more.
    """
    horizon = seq.limit if worst_case else min(seq.limit, len(seq.tokens) + cache.page_size)
    needed = cache.pages_for(horizon) - len(hit.pages) + hit.idle_pages
    return needed + reserved <= cache.available


def fits_over_time(
    seq: Sequence, hit: PrefixHit, running: Collection[Sequence], cache: KVCache
) -> bool:
    """Whether there are pages for a waiting sequence and all who run, though each goes on to its
    limit: they end one after another, and what one gives back another grows into.

    All are taken to gain a token a step, so demand is largest when one of them ends. Pages that
    several hold count for each.
    """
    if cache.pages_for(len(seq.tokens)) - len(hit.pages) + hit.idle_pages > cache.available:
        return False
    rows, page = (*running, seq), cache.page_size
    limit = np.array([row.limit for row in rows])
    at = np.minimum([len(row.tokens) + row.unread + LATE for row in rows], limit)
    longest_first = np.argsort(at - limit)
    at, left = at[longest_first], (limit - at)[longest_first]
    # When each ends: what it has, and those that go on.
    positions = np.cumsum(at) + np.arange(1, len(rows) + 1) * left
    if positions.max() > cache.total * page:
        return False
    # A part of each one's last page is empty, by how far it has come in that page. Summed by where
    # in a page the steps from now to an end lead, along rows, which lie side by side.
    offsets = np.arange(page)
    lacking = (-np.add.outer(offsets, offsets) % page).take(at % page, axis=1)
    empty = lacking.cumsum(axis=1)[left % page, np.arange(len(rows))]
    return int((positions + empty).max()) <= cache.total * page


def gives_way(running: Ranked[Sequence], queue: FairQueue) -> Sequence:
    """Who loses its pages when they run short: of the lowest priority, the youngest; with several
    tenants, the youngest of the one that holds most pages for its weight.

    Never the first of several who run: a tenant with one answer is only taken as the youngest.
    """
    youngest = running.last
    if not queue.contended:
        return youngest
    pages: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    for seq in running:
        if seq.rank[0] == youngest.rank[0]:
            name = seq.group.tenant.name
            pages[name] += len(seq.kv.pages)
            answers[name] += 1
    most = max(pages, key=lambda name: pages[name] / queue.tenants[name].weight)
    if answers[most] == 1:
        return youngest
    return next(seq for seq in reversed(running) if seq.group.tenant.name == most)


def gives_place(running: Ranked[Sequence], queue: FairQueue) -> Sequence | None:
    """Who makes room for the first in the queue, which found no slot or no pages; None: nobody.

    Two reasons to take a place, so that neither is taken back and forth:

    - The newcomer's tenant runs fewer answers than its weight's share of them, and another far more
      than its own: twice as many, or half of what others should have besides.
    - The newcomer's tenant has had less than another lately, though it may run its share: by
      MIN_LEAD, and what it is about to get.

    The tenant in question loses its youngest, unless that is its last or has a better priority.
    """
    newcomer, total = queue.first, len(running)
    if not running:
        return None
    tenant, tenants = newcomer.group.tenant, queue.tenants.values()
    extra = tenant.running + 1 - queue.share(tenant, total)
    loser = max(tenants, key=lambda t: t.running / t.weight)
    share = queue.share(loser, total)
    if extra > 0 or loser.running - 1 < min(2 * share, (share + total) / 2):
        loser = max((t for t in tenants if t.running), key=lambda t: t.time)
        cost = max(extra, 1) * min(newcomer.max_tokens, LONG_ANSWER) * OUTPUT_COST / tenant.weight
        if loser.running == 1 or loser.time - tenant.time < queue.credit * MIN_LEAD + cost:
            return None
    seq = next(seq for seq in reversed(running) if seq.group.tenant is loser)
    return None if seq.rank[0] < newcomer.rank[0] else seq
