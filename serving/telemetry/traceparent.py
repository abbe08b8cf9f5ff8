"""A caller's place in a trace: the headers of W3C Trace Context, `traceparent` and `tracestate`.

Frontends take it from a call's metadata; it travels with the request to the engine's process.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


_MOST_STATE = 512
"""Characters of `tracestate` that the standard asks everybody to pass on."""


def trace_context_of(metadata: Collection[tuple[str, str | bytes]]) -> tuple[str, str]:
    """Both headers in a call's metadata. `tracestate`, which belongs to tracing systems and is
    passed on as it is, counts only beside a `traceparent` that does, and is empty where it is too
    long; several are one list."""
    parent = traceparent_of(metadata)
    texts = [text for name, text in metadata if name == "tracestate" and isinstance(text, str)]
    state = ",".join(texts)
    return parent, state if parent and len(state) <= _MOST_STATE else ""


def traceparent_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The header in a call's metadata; empty if there is none, or one that does not count: then the
    trace begins here, as the standard wants it.
    """
    for name, value in metadata:
        if name == "traceparent" and isinstance(value, str):
            found = _FORM.fullmatch(value)
            if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
                return ""
            if not int(found[2], 16) or not int(found[3], 16):
                return ""
            return value[:55]  # later versions may append to what this one knows
    return ""


def trace_id_of(traceparent: str) -> str:
    """The trace's id in a header that `traceparent_of` let pass."""
    return traceparent.split("-")[1]
