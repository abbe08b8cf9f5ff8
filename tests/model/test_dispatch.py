"""Programs called directly give what JAX's own calls give, and refuse what those refuse."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

from quire.model import dispatch
from quire.model.compile import compile_uncached
from quire.model.dispatch import direct, is_known
from quire.model.mesh import default_mesh

BUFFER = np.arange(6, dtype=np.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    words: jax.Array
    unused: jax.Array


def step(params, slabs, state, buffer):
    """As a step is: some parameters go unused, slabs and state are updated in place."""
    total = params[0].sum() + buffer.sum()
    slabs = {"kv": slabs["kv"] + total}
    return slabs, State(state.words.at[0].add(buffer[0] + 1), state.unused), buffer * 2


@pytest.fixture(scope="module")
def compiled():
    args = (*params_and_state(), BUFFER)
    placed = jax.tree.map(lambda _: default_mesh().everywhere, args)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), args, placed
    )
    lowered = jax.jit(step, donate_argnums=(1, 2)).trace(*abstract).lower()
    return compile_uncached(lowered, {})  # what JAX's cache gives cannot be written down again


@pytest.fixture(params=["compiled", "loaded"])
def program(compiled, request):
    if request.param == "compiled":
        return compiled
    code, in_tree, out_tree = serialize_executable.serialize(compiled)
    devices = default_mesh().devices
    return serialize_executable.deserialize_and_load(
        code, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
    )


def params_and_state():
    arrays = (
        (np.ones(3, np.float32), np.full(2, 7, np.float32)),
        {"kv": np.zeros(4, np.float32)},
        State(np.zeros(2, np.int32), np.full(3, 5, np.int32)),
    )
    return jax.device_put(arrays, default_mesh().everywhere)


def test_it_gives_what_jax_gives(program):
    assert is_known(program), f"JAX {jax.__version__} looks otherwise inside"
    params, slabs, state = params_and_state()
    _, own_slabs, own_state = params_and_state()
    call = direct(program, params)
    for at in range(4):
        buffer = BUFFER + at
        slabs, state, out = call(slabs, state, buffer)
        own_slabs, own_state, own_out = program(params, own_slabs, own_state, buffer)
        jax.tree.map(
            np.testing.assert_array_equal, (slabs, state, out), (own_slabs, own_state, own_out)
        )
    for array, own in zip(
        jax.tree.leaves((slabs, state, out)), jax.tree.leaves((own_slabs, own_state, own_out)),
        strict=True,
    ):  # fmt: skip
        assert array.sharding == own.sharding and array.committed == own.committed


def test_the_second_call_passes_jax_by(program, monkeypatch):
    params, slabs, state = params_and_state()
    call = direct(program, params)
    slabs, state, _ = call(slabs, state, BUFFER)
    monkeypatch.setattr(call, "_ordinary", None)  # whoever calls it fails
    call(slabs, state, BUFFER)


def test_what_is_updated_in_place_is_gone_afterwards_and_parameters_are_not(program):
    params, slabs, state = params_and_state()
    call = direct(program, params)
    for _ in range(3):
        before = slabs["kv"], state.words
        slabs, state, _ = call(slabs, state, BUFFER)
        assert all(array.is_deleted() for array in before)
    assert not any(array.is_deleted() for array in params)
    with pytest.raises((RuntimeError, ValueError), match=r"deleted or donated|has been deleted"):
        call({"kv": before[0]}, state, BUFFER)


def test_an_array_that_is_on_the_device_is_taken_as_it_is(program):
    params, slabs, state = params_and_state()
    call = direct(program, params)
    slabs, state, expected = call(slabs, state, BUFFER)
    on_device = jax.device_put(BUFFER, default_mesh().everywhere)
    _, _, out = call(slabs, state, on_device)
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("buffer", [BUFFER[:5], BUFFER.astype(np.int16)], ids=["shape", "dtype"])
def test_what_jax_refuses_is_refused_and_changes_nothing(program, buffer):
    params, slabs, state = params_and_state()
    call = direct(program, params)
    slabs, state, _ = call(slabs, state, BUFFER)
    with pytest.raises(TypeError, match="compiled"):
        call(slabs, state, buffer)
    with pytest.raises(TypeError, match="compiled"):
        call({"kv": slabs["kv"][:3]}, state, BUFFER)
    *_, out = call(slabs, state, BUFFER)
    assert out.tolist() == (BUFFER * 2).tolist()


def test_buffers_of_earlier_calls_are_let_go(program):
    params, slabs, state = params_and_state()
    call, held = direct(program, params), []
    for _ in range(20):
        buffer = BUFFER.copy()
        held.append(weakref.ref(buffer))
        slabs, state, out = call(slabs, state, buffer)
        out.block_until_ready()
    del buffer
    gc.collect()
    assert sum(reference() is not None for reference in held) <= 2


def test_a_program_without_arguments():
    program = jax.jit(lambda: jnp.arange(3)).lower().compile()
    call = direct(program)
    assert [call().tolist() for _ in range(3)] == [[0, 1, 2]] * 3


@pytest.mark.parametrize("missing", ["_client", "_pxla", "version", "inside"])
def test_under_another_jax_calls_are_its_own(compiled, monkeypatch, missing):
    program = compiled
    if missing == "version":
        monkeypatch.setattr(dispatch, "_TESTED_BELOW", jax.__version_info__)
    elif missing == "inside":
        program = lambda *args: compiled(*args)  # noqa: E731
    else:
        monkeypatch.setattr(dispatch, missing, None)
    assert not is_known(program)
    params, slabs, state = params_and_state()
    call = direct(program, params)
    for _ in range(2):
        slabs, state, out = call(slabs, state, BUFFER)
    assert out.tolist() == (BUFFER * 2).tolist() and state.words.tolist() == [2, 0]


def test_a_program_that_prints_is_called_by_jax():
    def prints(x):
        jax.debug.print("{}", x)
        return x + 1

    assert not is_known(jax.jit(prints).lower(BUFFER).compile())
