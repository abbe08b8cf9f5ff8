"""What a profile of JAX's says of a GPU's kernels: how busy they kept it, and what each kind took.
Used by profile.py."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from typing import Any, NamedTuple

from ...model.plan import Bucket
from ...model.programs import forward_key, module_name
from .step_clock import bucket_name


class Kernel(NamedTuple):
    """One that ran: its name, begin and end in milliseconds, and the program it belongs to, "" if
    the profiler did not say."""

    name: str
    begin: float
    end: float
    program: str = ""


def kernels(profile: Any) -> list[Kernel]:
    """What ran on the streams of the first GPU that ran any, memory copies excluded, by begin."""
    gpus = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    for plane in sorted(gpus, key=lambda plane: plane.name):
        found = []
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = sys.intern(event.name)  # of half a million, some dozens differ
                if not name.lower().startswith(("memcpy", "memset")):
                    begin = event.start_ns / 1e6
                    end = begin + event.duration_ns / 1e6
                    found.append(Kernel(name, begin, end, _program(event)))
        if found:  # of several, each has as much to do; together they would hide who waits
            return sorted(found, key=lambda kernel: kernel.begin)
    return []


def _program(event: Any) -> str:
    for name, value in event.stats:
        if name == "hlo_module":
            return sys.intern(str(value).removeprefix("jit_"))
    return ""


def summary(found: list[Kernel], part: float, steps: int) -> dict[str, Any]:
    """Busy share, kernels a step, and milliseconds a step by kind of kernel.

    Args:
      found: by their begin.
      part: what begins before this share of the whole time is left out.
      steps: that the rest stands for.
    """
    if not found:
        return {"busy": None, "launches": 0, "kernels": {}}
    first, last = found[0].begin, max(kernel.end for kernel in found)
    found = [kernel for kernel in found if kernel.begin >= first + part * (last - first)]
    union, until = 0.0, found[0].begin
    for _, begin, end, _ in found:
        union += max(0.0, end - max(begin, until))
        until = max(until, end)
    span = until - found[0].begin
    return {
        "busy": union / span if span else 1.0,
        "ms_per_step": span / steps,
        "launches": len(found) / steps,
        "kernels": by_kind(found, steps),
    }


def by_kind(found: list[Kernel], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds and launches a step of each kind of kernel, the dearest first."""
    kinds: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    names: dict[str, list[float]] = {}
    for name, begin, end, _ in found:
        if (kind := names.get(name)) is None:
            kind = names[name] = kinds[re.sub(r"[._]?\d+(?=[._]|$)", "", name)]
        kind[0] += (end - begin) / steps
        kind[1] += 1 / steps
    costly = sorted(kinds.items(), key=lambda item: -item[1][0])
    return {name: {"ms": ms, "count": count} for name, (ms, count) in costly}


def programs(found: list[Kernel], steps: dict[Bucket, dict[str, Any]]) -> dict[str, Any]:
    """For each step program its steps, their milliseconds by the host's clock (median), and those
    of kernels; for others, whose runs nobody counts, of kernels in all.

    Args:
      steps: of step_clock.by_bucket.
    """
    ran: defaultdict[str, list[Kernel]] = defaultdict(list)
    for kernel in found:
        ran[kernel.program].append(kernel)
    made: dict[str, Any] = {}
    for bucket, seen in steps.items():
        own = ran.pop(module_name(forward_key(bucket)), [])
        kinds = by_kind(own, seen["count"])
        made[bucket_name(bucket)] = {
            "steps": seen["count"],
            "step_ms": seen["median_ms"],
            "kernels_ms": sum(kind["ms"] for kind in kinds.values()),
            "kernels": kinds,
        }
    for program, own in sorted(ran.items()):
        kinds = by_kind(own, 1)
        total = sum(kind["ms"] for kind in kinds.values())
        name = program or "programs that the profiler did not name"
        made[name] = {"steps": None, "step_ms": None, "kernels_ms": total, "kernels": kinds}
    return made
