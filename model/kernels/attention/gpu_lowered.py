"""Kernels lowered once for all programs of an engine. Called by gpu_pallas.py for each of its own,
and by gpu_mosaic.py.

Some forty step programs have the same few kernels: how many tokens a step has changes their grids
and the first dimensions of arrays, but not their code. Pallas traces and lowers a kernel anew in
every program, a third of all that lowering takes. Here Pallas lowers it once, alone; what it made
of it, a call of XLA's with the code as an attribute, stands in every program.

A kernel is known by all it can see: its code, what its closure holds (or what its caller says
stands for both), the types and shapes of its arguments. What cannot be known, or repeated, is
lowered where it is used.

Kernels by Mosaic are built by XLA, too, once a process, if they are the same to the byte (Mosaic
numbers those it lowers). While it builds one, it compiles nothing else with LLVM, and it begins
only when nothing else is compiled: among many programs, when all others are done. So the programs
of one kernel are there to be compiled before (`take_built_alone`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from types import FunctionType
from typing import Any

import jax
import numpy as np
from jax.stages import Lowered

Array = jax.Array | jax.ShapeDtypeStruct
Make = Callable[[Sequence[jax.ShapeDtypeStruct]], Callable[..., Any]]
"""Given its results' shapes, a `pallas_call`."""

_ROWS = 64
"""First dimension of arrays, for a kernel that does not look at it."""

_NARROW = 2**32
"""Bytes of an array, up to which Pallas counts in 32 bits."""

_MOST_PROGRAMS = 2**16 - 1
"""Along the second and third axis of a grid; Pallas gives larger ones to the first."""

_CONFIG = "mhlo.backend_config"
_GRID = ("grid_x", "grid_y", "grid_z")


class Unknown(Exception):
    """A kernel that cannot be told from others, or whose call cannot be repeated."""


@dataclass(frozen=True)
class _Lowered:
    """A kernel's call, as Pallas made it: of what, and with which attributes besides the grid."""

    target: str
    attributes: dict[str, Any]

    def call(
        self,
        args: Sequence[jax.Array],
        out: Sequence[jax.ShapeDtypeStruct],
        aliases: Mapping[int, int],
        grid: Mapping[str, Any],
    ) -> Any:
        repeated = jax.ffi.ffi_call(self.target, list(out), input_output_aliases=dict(aliases))
        return repeated(*args, **self.attributes, **grid)


class LoweredKernels:
    """The kernels of one engine's programs, which are all for the same devices.

    Args:
      platform: of the devices, as `Traced.lower` calls it.
      mesh: of them.
      placed: on them, for programs of a kernel that are to be compiled.
    """

    def __init__(
        self,
        platform: str,
        mesh: jax.sharding.AbstractMesh,
        placed: jax.sharding.Sharding | None = None,
    ) -> None:
        self._platform, self._mesh, self._placed = platform, mesh, placed
        self._known: dict[Hashable, _Lowered | None] = {}
        self._alone: list[Lowered] = []

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Programs traced within take their kernels from here."""
        token = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(token)

    def run(
        self,
        kernel: Callable[..., None],
        launch: Hashable,
        grid: tuple[int, ...],
        make: Make,
        args: Sequence[jax.Array],
        looked_at: Collection[int],
        out: Sequence[jax.ShapeDtypeStruct],
        aliases: Mapping[int, int],
    ) -> Any:
        """`make(out)(*args)`, a `pallas_call` of a kernel that looks at no first dimension, but of
        the arguments `looked_at`.

        Raises:
          Unknown: it has to be made.
        """
        if any(size > _MOST_PROGRAMS for size in grid):
            raise Unknown(f"grid {grid}")
        seen, left = _all_seen(args, looked_at), [_seen(x) for x in out]
        # Of the last two axes only this much is in the code, of those before them the sizes.
        axes = (*grid[:-2], *(size == 1 for size in grid[-2:]))
        key = identity(kernel), launch, axes
        lowered, _ = self._lowered(key, make(left), seen, left, aliases, _on_grid(grid))
        return lowered.call(args, out, aliases, _on_grid(grid))

    def run_built_alone(
        self,
        key: Hashable,
        kernel: Callable[..., Any],
        args: Sequence[jax.Array],
        looked_at: Collection[int],
        out: Sequence[jax.ShapeDtypeStruct],
        aliases: Mapping[int, int],
    ) -> Any:
        """`kernel(*args)`, the call of a kernel by Mosaic, told from others of other code by `key`.

        Of arguments but those `looked_at` the kernel looks at no first dimension.

        Raises:
          Unknown: it has to be made.
        """
        seen = _all_seen(args, looked_at)
        seen = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._placed) for x in seen]
        lowered, alone = self._lowered(key, kernel, seen, list(map(_given, out)), aliases, {})
        self._alone += alone
        return lowered.call(args, out, aliases, {})

    def take_built_alone(self) -> list[Lowered]:
        """Programs of one kernel each, lowered since the last call: when these are compiled, XLA
        has built all kernels of `run_built_alone`."""
        taken, self._alone = self._alone, []
        return taken

    def _lowered(
        self,
        key: Hashable,
        call: Callable[..., Any],
        args: Sequence[jax.ShapeDtypeStruct],
        out: Sequence[jax.ShapeDtypeStruct],
        aliases: Mapping[int, int],
        grid: Mapping[str, Any],
    ) -> tuple[_Lowered, list[Lowered]]:
        """What is known of a kernel of this key and of these shapes, and its program if it had to
        be lowered."""
        shapes = tuple((x.shape, x.dtype) for x in (*args, *out))
        known, new = (key, shapes, tuple(sorted(aliases.items()))), []
        if known not in self._known:
            new = [self._lower(call, args)]
            self._known[known] = _repeatable(new[0], grid)
        if (lowered := self._known[known]) is None:
            raise Unknown("its call cannot be repeated")
        return lowered, new

    def _lower(self, call: Callable[..., Any], args: Sequence[jax.ShapeDtypeStruct]) -> Lowered:
        """The call in a program of its own."""
        with jax.sharding.use_abstract_mesh(self._mesh):
            return jax.jit(call).trace(*args).lower(lowering_platforms=(self._platform,))


_IN_USE: ContextVar[LoweredKernels | None] = ContextVar("lowered kernels", default=None)


def in_use() -> LoweredKernels | None:
    """Where the program that is being traced takes its kernels from, if it does."""
    return _IN_USE.get()


def identity(thing: Any) -> Hashable:
    """Tells apart whatever a kernel's code can tell apart. Of arrays no kernel sees more than what
    kind they are: those that a closure holds are not arguments.

    Raises:
      Unknown: what kind of thing this is.
    """
    kind = type(thing)
    if thing is None or kind in (bool, int, float, str) or isinstance(thing, (np.dtype, type)):
        return kind, thing
    if isinstance(thing, FunctionType):
        closure = (cell.cell_contents for cell in thing.__closure__ or ())
        defaults = (thing.__defaults__ or (), tuple((thing.__kwdefaults__ or {}).items()))
        return kind, thing.__code__, identity(defaults), tuple(map(identity, closure))
    if isinstance(thing, (tuple, list)):
        return kind, tuple(map(identity, thing))
    if isinstance(thing, jax.Array):
        return jax.Array, thing.shape[1:], thing.dtype
    if is_dataclass(thing):
        return kind, tuple(identity(getattr(thing, field.name)) for field in fields(thing))
    raise Unknown(f"{kind} in a kernel's closure")


def _given(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _seen(array: Array) -> jax.ShapeDtypeStruct:
    """An array as a kernel sees it that does not look at its first dimension."""
    given = _given(array)
    usual = jax.ShapeDtypeStruct((_ROWS, *array.shape[1:]), array.dtype)
    wide = max(x.size * x.dtype.itemsize for x in (given, usual)) > _NARROW
    return given if wide else usual


def _all_seen(args: Sequence[jax.Array], looked_at: Collection[int]) -> list[jax.ShapeDtypeStruct]:
    return [_given(x) if n in looked_at else _seen(x) for n, x in enumerate(args)]


def _on_grid(grid: tuple[int, ...]) -> dict[str, Any]:
    sizes = (*grid, 1, 1)[: len(_GRID)]
    return {axis: np.int32(size) for axis, size in zip(_GRID, sizes, strict=True)}


def _repeatable(program: Lowered, grid: Mapping[str, Any]) -> _Lowered | None:
    """The call in a program of one kernel; None where there is more, or other, than is known."""
    try:
        return _only_call(program.compiler_ir("stablehlo"), grid)
    except (AttributeError, ImportError, KeyError, TypeError):  # another JAX says it otherwise
        return None


def _only_call(module: Any, grid: Mapping[str, Any]) -> _Lowered | None:
    """The one call in a program, if that is all there is to it but for its grid."""
    # Here, since who has no GPU has no use for it.
    from jaxlib.mlir import ir

    found: list[Any] = []

    def look(op: Any) -> Any:
        if op.name == "stablehlo.custom_call":
            found.append(op.attributes)
        return ir.WalkResult.ADVANCE

    def plain(attribute: Any) -> Any:
        """What `ffi_call` makes the same attribute of; None: it cannot."""
        if isinstance(attribute, ir.StringAttr):
            return attribute.value_bytes
        if isinstance(attribute, ir.BoolAttr):
            return bool(attribute.value)
        if isinstance(attribute, ir.IntegerAttr) and str(attribute.type) == "i32":
            return np.int32(attribute.value)
        return None

    module.operation.walk(look)
    if len(found) != 1 or found[0]["has_side_effect"].value:
        return None
    (said,) = found
    config = {a.name: plain(a.attr) for a in said[_CONFIG]}
    if None in config.values() or dict(grid) != {a: config.pop(a, None) for a in grid}:
        return None
    return _Lowered(said["call_target_name"].value, config)
