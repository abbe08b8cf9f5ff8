"""What a compiled program does with memory and with the device's queue."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.stages import Lowered

from ...model.compile import compile_uncached, compiler_options
from .allocations import Allocation, read_allocations
from .traffic import Traffic, read_traffic

_NO_DEVICE = {"xla_gpu_autotune_level": 0}  # autotuning needs it
# The second where no pass had anything to do.
_THUNKS = ("*.thunk_sequence_after_thunk_passes.txt", "*.thunk_sequence.txt")
_KERNEL = re.compile(r"^\d+: k(?:Custom)?Kernel\s+\[.*?\]\s+(\w+) grid:", re.MULTILINE)
# A fusion is judged by what is in it. (Pallas kernels declare what they overwrite.)
_IN_PLACE = {
    "parameter", "scatter", "dynamic-update-slice", "fusion", "custom-call", "bitcast", "tuple",
    "get-tuple-element", "reshape",
}  # fmt: skip


@dataclass(frozen=True)
class ProgramReport:
    """Read off one compiled program.

    Attributes:
      temp_bytes: device memory besides arguments and results.
      alias_bytes: bytes of results that lie where a donated argument lay.
      argument_bytes: bytes of all arguments.
      hlo: the program after all of XLA's passes.
      thunks: kinds of what the host hands to a GPU one after the other in each run, such as
        ["CommandBuffer"] or ["CommandBuffer", "While", "CommandBuffer"]; None for other platforms.
      launched: names of the kernels it runs on a GPU, in order; those of libraries have none.
      memory: what it takes from arguments and the allocator; empty for other platforms.
    """

    temp_bytes: int
    alias_bytes: int
    argument_bytes: int
    hlo: str
    thunks: list[str] | None
    launched: list[str]
    memory: tuple[Allocation, ...] = ()

    def uses_of(self, which: Callable[[Allocation], bool]) -> set[str]:
        """Instructions that use memory of this kind."""
        return {name for piece in self.memory if which(piece) for name in piece.uses}

    def uses_of_inputs(self) -> set[str]:
        """Instructions that read the last argument: what the host sends to each step, each time to
        another place."""
        last = max(piece.parameter for piece in self.memory if piece.parameter is not None)
        return self.uses_of(lambda piece: piece.parameter == last)

    def uses_of_new_results(self, below: int | None = None) -> set[str]:
        """Instructions that use memory of results that take no argument's place, only of pieces of
        less than so many bytes if `below` says how many."""

        def is_one(piece: Allocation) -> bool:
            small = below is None or piece.size < below
            return piece.result and piece.parameter is None and small

        return self.uses_of(is_one)

    def traffic(self, array: jax.ShapeDtypeStruct) -> Traffic:
        """How much its kernels read and write of arrays as large as this one or larger."""
        return read_traffic(self.hlo, math.prod(array.shape))

    def passes_over(self, array: jax.ShapeDtypeStruct) -> list[str]:
        """Instructions whose result has as many elements as this array and is computed, not an
        update of a few of them in place: copies too, and arithmetic on the whole array, which XLA
        may well do in place."""
        size = math.prod(array.shape)

        def computes_it(line: str) -> bool:
            made = re.search(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
            if made is None or made[2] in _IN_PLACE:
                return False
            return math.prod(map(int, made[1].split(","))) == size

        return [line.strip() for line in self.hlo.splitlines() if computes_it(line)]

    def kernels(self, name: str) -> int:
        """How many custom calls (Pallas kernels) carry this name."""
        return len(re.findall(rf'custom-call\(.*op_name="[^"]*{re.escape(name)}', self.hlo))


def compile_for(
    lowered: Lowered, platform: str, tokens: int = 0, options: dict[str, Any] | None = None
) -> ProgramReport:
    """Compiles a lowered program (model/programs.py) and reads the result.

    Args:
      lowered: for devices of this platform.
      platform: "gpu" or "tpu".
      tokens: as in `compiler_options`.
      options: what XLA is told besides.
    """
    thunks, launched = None, []
    options = compiler_options(platform, tokens) | (options or {})
    pieces: tuple[Allocation, ...] = ()
    if platform == "gpu":
        with tempfile.TemporaryDirectory() as folder:
            compiled = compile_uncached(lowered, options | _NO_DEVICE | {"xla_dump_to": folder})
            dump = next(path for name in _THUNKS for path in Path(folder).glob(name))
            thunks = re.findall(r"^\d+: k(\w+)", dump.read_text(), re.MULTILINE)
            launched = _KERNEL.findall(next(Path(folder).glob(_THUNKS[-1])).read_text())
            parts = sorted(Path(folder).glob("*buffer-assignment*.txt"))
            pieces = read_allocations("\n".join(part.read_text() for part in parts))
    else:
        compiled = compile_uncached(lowered, options)
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None  # both platforms tell
    return ProgramReport(
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        hlo=hlo,
        thunks=thunks,
        launched=launched,
        memory=pieces,
    )
