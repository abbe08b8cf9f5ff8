"""Calls of compiled programs with less of JAX in between. Used by the runner, for all programs.

A step takes some two hundred arrays, all but a few of them parameters. At each call JAX asks every
one of them what it is and where it lies, looks up the program for such arguments, and asks again.
`direct` settles that once: later calls hand the runtime a list in which only what is not fixed is
new. On a CPU with 200 parameters that is 0.1 ms of 0.2, and as much where the caches are cold, as
they are for the first token of an engine that was idle.

It reads JAX's insides, of the versions that it was tested with. Under others, and on several
devices, calls are JAX's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled

_TESTED_BELOW = (0, 13, 0)
"""The version of JAX whose insides nobody has looked at yet."""

_pxla: Any
_client: Any
try:
    from jax._src.interpreters import pxla as _pxla
    from jax._src.lib import xla_client as _client  # type: ignore[attr-defined]
except ImportError:  # another JAX
    _pxla = _client = None


def direct(program: Compiled, *fixed: Any) -> Callable[..., Any]:
    """`program` as a function of its arguments after `fixed`, trees of arrays that stay the same.

    The first call is JAX's own, which looks at all arguments. Later ones trust the caller that
    arguments are of the same structure, and arrays where they were; what has another shape or dtype
    goes to JAX, which refuses it. Arrays that the program updates in place are gone after a call,
    as ever.
    """
    ordinary = partial(program, *fixed)
    if not is_known(program):
        return ordinary
    return _Direct(program, fixed, ordinary)


def is_known(program: Compiled) -> bool:
    """Whether a program can be called directly: it runs on one device, has no effects, and JAX's
    insides are the known ones."""
    inside: Any = program
    try:
        executable = inside._executable
        call = executable.unsafe_call
        return (
            isinstance(executable, _pxla.MeshExecutable)
            and isinstance(call, _pxla.ExecuteReplicated)
            and len(executable.xla_executable.local_devices()) == 1
            and not (call.ordered_effects or call.has_unordered_effects)
            and not (call.has_host_callbacks or call.mut)
            and not inside._params.const_args
            and not any(executable._dispatch_in_layouts)
            and len(executable.in_avals) == len(executable._kept_var_idx)
            and len(executable.in_avals) == len(executable._in_shardings)
            and len(call.out_handler.handlers) == inside.out_tree.num_leaves
            and callable(executable.xla_executable.execute_sharded)
            and callable(_client.batched_device_put)
            and jax.__version_info__ < _TESTED_BELOW
        )
    except AttributeError:
        return False


class _Direct:
    """One program, called directly from the second call on."""

    def __init__(self, program: Compiled, fixed: tuple[Any, ...], ordinary: Callable[..., Any]):
        inside: Any = program
        executable = inside._executable
        self._ordinary = ordinary
        self._is_tried = False
        self._put = _client.batched_device_put
        self._execute = executable.xla_executable.execute_sharded
        self._devices = executable.xla_executable.local_devices()
        self._handlers = executable.unsafe_call.out_handler.handlers
        self._unflatten = inside.out_tree.unflatten
        leaves = jax.tree.leaves(fixed)
        kept = sorted(executable._kept_var_idx)  # what a program does not use is not handed to it
        self._fixed = [leaves[at] for at in kept if at < len(leaves)]
        described = zip(kept, executable.in_avals, executable._in_shardings, strict=True)
        self._rest = [
            (at - len(leaves), aval.shape, aval.dtype, aval, sharding)
            for at, aval, sharding in described
            if at >= len(leaves)
        ]

    def __call__(self, *rest: Any) -> Any:
        if not self._is_tried:
            results = self._ordinary(*rest)
            self._is_tried = True
            return results
        leaves, arrays = jax.tree.leaves(rest), self._fixed.copy()
        for at, shape, dtype, aval, sharding in self._rest:
            array = leaves[at]
            if array.shape != shape or array.dtype != dtype:
                return self._ordinary(*rest)
            if isinstance(array, np.ndarray):
                array = self._put(aval, sharding, [array], self._devices)
            arrays.append(array)
        results = self._execute(arrays).consume_with_handlers(self._handlers)
        return self._unflatten(results)
