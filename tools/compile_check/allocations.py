"""Which pieces of a GPU's memory a program uses, and what in it uses each: read off XLA's own
account of its buffers, as `xla_dump_to` writes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MADE = re.compile(r"from instruction: (?:ROOT )?%(\S+) = (?:\(.*?\)|\S+) ([\w-]+)\(")
# A value, its positions (the first is where it is made, others are other names for it), its uses.
_VALUE = re.compile(r"<(\d+) .*\n positions:\n  (\S+)(?:.*\n)*? uses:\n((?:  .*\n)*)")
_USE = re.compile(r"^  ([^\s,]+),", re.MULTILINE)
_NOTHING_RUNS = {"parameter", "constant", "tuple"}


@dataclass(frozen=True)
class Allocation:
    """A piece of memory, an argument's or one that the program asks for.

    Attributes:
      size: bytes.
      parameter: which argument lies there, if one does.
      result: a result lies there in the end.
      uses: names of the instructions that read or write it, at any time.
    """

    size: int
    parameter: int | None
    result: bool
    uses: tuple[str, ...]


def read_allocations(text: str) -> tuple[Allocation, ...]:
    """All of them, from a dump's texts of the buffer assignment."""
    # Instructions that make no value of their own, but hand on another's, run nothing.
    runs = {name for name, kind in _MADE.findall(text) if kind not in _NOTHING_RUNS}
    users: dict[str, list[str]] = {}
    for block in re.split(r"^(?=<\d+ )", text, flags=re.MULTILINE)[1:]:
        value = _VALUE.match(block)
        assert value is not None, block
        users[value[1]] = [value[2], *_USE.findall(value[3])]
    found = []
    for block in re.split(r"^(?=allocation \d)", text, flags=re.MULTILINE)[1:]:
        head = block.splitlines()[0]
        parameter = re.search(r"parameter (\d+),", head)
        values = re.findall(r"^ value: <(\d+) ", block, re.MULTILINE)
        uses = dict.fromkeys(name for value in values for name in users[value] if name in runs)
        number = None if parameter is None else int(parameter[1])
        size = re.search(r"size (\d+)", head)
        assert size is not None, head
        found.append(Allocation(int(size[1]), number, "maybe-live-out" in head, tuple(uses)))
    return tuple(found)
