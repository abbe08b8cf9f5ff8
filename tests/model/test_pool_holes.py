"""Small pieces of a GPU's pool are left free, each between two that are held."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from quire.model import pool_holes
from quire.model.mesh import default_mesh
from quire.model.pool_holes import leave_holes


def test_a_fence_is_held_after_each_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def put(array: np.ndarray, where: Any) -> Any:
        taken.append(SimpleNamespace(nbytes=array.nbytes, where=where))
        return taken[-1]

    monkeypatch.setattr(pool_holes.jax, "device_put", put)
    monkeypatch.setattr(pool_holes.jax, "block_until_ready", lambda arrays: arrays)
    mesh = SimpleNamespace(platform="gpu", everywhere="all")
    held = leave_holes(cast(Any, mesh))
    assert held == taken[1::2] and {x.nbytes for x in held} == {256}
    holes = [x.nbytes for x in taken[::2]]
    assert min(holes) > 256 and holes == sorted(holes, reverse=True)
    assert sum(x.nbytes for x in taken) < 4 * 2**20  # of what the table has in reserve
    assert {x.where for x in taken} == {"all"}


def test_on_every_device_of_a_mesh() -> None:
    of_two = default_mesh(min(2, len(jax.devices())))
    mesh = SimpleNamespace(platform="gpu", everywhere=of_two.everywhere)
    for fence in leave_holes(cast(Any, mesh)):
        assert fence.devices() == {*of_two.devices}


def test_none_where_there_are_no_graphs() -> None:
    assert leave_holes(default_mesh()) == []
