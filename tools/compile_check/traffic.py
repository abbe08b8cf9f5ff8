"""How often a program goes over large arrays: read off its HLO.

What decides how long sampling takes is how many times logits are read and written, [rows,
vocabulary] each time. Everything below `least` elements is left out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(
    r"^\s*(ROOT )?%?([\w.-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w-]+)\((.*?)\)(.*)$",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_NOTHING_MOVES = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "iota",
    "optimization-barrier", "fusion-done",
}  # fmt: skip
_PICKS = {"gather", "dynamic-slice", "slice"}
_PUTS = {"scatter", "dynamic-update-slice"}
_FUSIONS = {"fusion", "fusion-start"}


@dataclass(frozen=True)
class Traffic:
    """Bytes of large arrays that a program's kernels read and write, of each kernel its own.

    Attributes:
      read, written: once a run, and in loops as often as their rounds, where that is known.
      read_a_round, written_a_round: in one round of all loops whose rounds only the device knows.
    """

    read: int = 0
    written: int = 0
    read_a_round: int = 0
    written_a_round: int = 0


class _Instruction(NamedTuple):
    is_root: bool
    name: str
    type: str
    op: str
    operands: list[str]
    rest: str


def read_traffic(hlo: str, least: int) -> Traffic:
    """Of arrays of at least so many elements, in a program after all of XLA's passes."""
    found: dict[str, list[_Instruction]] = {}
    entry = ""
    for is_entry, name, body in _COMPUTATION.findall(hlo):
        entry = name if is_entry else entry
        found[name] = [
            _Instruction(bool(root), own, kind, op, re.findall(r"%([\w.-]+)", inside), rest)
            for root, own, kind, op, inside, rest in _INSTRUCTION.findall(body)
        ]
    return _of(found, found[entry], least)


def _of(
    found: dict[str, list[_Instruction]], instructions: list[_Instruction], least: int
) -> Traffic:
    types = {i.name: i.type for i in instructions}
    total = Traffic()
    for i in instructions:
        if i.op == "while":
            inside = _of(found, found[_group(r"body=%?([\w.-]+)", i.rest)], least)
            rounds = re.search(r'known_trip_count":\{"n":"(\d+)"', i.rest)
            if rounds is None:
                read, written = inside.read, inside.written
                inside = Traffic(0, 0, read + inside.read_a_round, written + inside.written_a_round)
            total = _sum(total, inside, int(rounds[1]) if rounds else 1)
        elif i.op in _FUSIONS:
            total = _sum(total, _of_kernel(found[_group(r"calls=%?([\w.-]+)", i.rest)], least), 1)
        elif i.op not in _NOTHING_MOVES:
            read = sum(_bytes(types.get(name, ""), least) for name in i.operands)
            total = _sum(total, Traffic(read, _bytes(i.type, least)), 1)
    return total


def _of_kernel(fused: list[_Instruction], least: int) -> Traffic:
    """What one kernel reads of its parameters, and writes."""
    read = 0
    for parameter in (i for i in fused if i.op == "parameter" and _bytes(i.type, least)):
        names, uses = {parameter.name}, []
        for i in fused:  # in order: what is used comes before its uses
            if names.intersection(i.operands):
                if i.op in ("bitcast", "reshape"):
                    names.add(i.name)
                else:
                    uses.append(i)
        if all(i.op in _PICKS for i in uses):
            read += sum(_bytes(i.type, least) for i in uses)
        elif not all(i.op in _PICKS or (i.op in _PUTS and i.operands[0] in names) for i in uses):
            read += _bytes(parameter.type, least)
    roots = {i.name: i for i in fused}
    results = [next(i for i in fused if i.is_root)]
    if results[0].op == "tuple":
        results = [roots[name] for name in results[0].operands]
    written = 0
    for result in results:
        while result.op in ("bitcast", "reshape"):
            result = roots[result.operands[0]]
        if result.op in _PUTS:
            update = result.operands[1 if result.op == "dynamic-update-slice" else -1]
            written += _bytes(roots[update].type, least)
        else:
            written += _bytes(result.type, least)
    return Traffic(read, written)


def _group(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


def _sum(one: Traffic, other: Traffic, times: int) -> Traffic:
    return Traffic(
        one.read + times * other.read,
        one.written + times * other.written,
        one.read_a_round + times * other.read_a_round,
        one.written_a_round + times * other.written_a_round,
    )


def _bytes(kind: str, least: int) -> int:
    """Of the arrays of a type, or tuple of them, that have so many elements."""
    total = 0
    for letters, bits, shape in _ARRAY.findall(kind):
        count = math.prod(map(int, shape.split(","))) if shape else 1
        if count >= least:
            total += count * (1 if letters == "pred" else int(bits or 8) // 8)
    return total
