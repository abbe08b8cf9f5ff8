"""Writes a step's keys and values into the slab on TPU: copies from HBM to HBM, no scatter.

XLA's scatter handles a token at a time there and waits for each. Here every token's K and V, which
lie side by side in a page, are one asynchronous copy, and so are _RUN tokens of a prompt that go to
neighbouring places of one page. Called by kv_write.py, which has checked the arguments.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_RUN = 16  # tokens that go as one copy where they can
_RUNS_IN_FLIGHT = 32  # runs whose copies are under way at once


def write(
    slab: jax.Array,
    kv: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """The slab with kv[t] at (pages[t], offsets[t]), in place where XLA can.

    Args:
      slab: [layers × pages, page, 2·KH, D].
      kv: [T, 2·KH, D] in the slab's type.
      pages: [T] int32; below 0 a token is dropped.
      offsets: [T] int32, within the page.
      interpret: what pl.pallas_call takes.
    """
    num_tokens = kv.shape[0]
    run = min(_RUN, num_tokens)
    short = -num_tokens % run
    kv = jnp.pad(kv, ((0, short), (0, 0), (0, 0)))
    pages = jnp.pad(pages, (0, short), constant_values=-1)
    offsets = jnp.pad(offsets, (0, short))
    by_run = pages.reshape(-1, run), offsets.reshape(-1, run)
    first_page, first_offset = (x[:, :1] for x in by_run)
    together = (by_run[0] == first_page) & (by_run[1] == first_offset + jnp.arange(run))
    whole = jnp.all(together, axis=1) & (first_page[:, 0] >= 0) & (run <= slab.shape[1])
    num_runs = whole.shape[0]
    batch = min(_RUNS_IN_FLIGHT, num_runs)
    # The kernel's last step may look past the end of the runs; none of that is written.
    hang = -num_runs % batch
    places = [
        jnp.pad(pages, (0, hang * run), constant_values=-1),
        jnp.pad(offsets, (0, hang * run)),
        jnp.pad(whole.astype(jnp.int32), (0, hang)),
    ]

    def kernel(
        pages: Any, offsets: Any, whole: Any, kv: Any, _: Any, slab: Any, arrived: Any
    ) -> None:
        def copies(act: str) -> None:
            def one_run(i: Any, _: None) -> None:
                at = pl.program_id(0) * batch + i

                def copy(token: Any, length: int) -> None:
                    # Only the count of bytes matters to a wait.
                    place = slab.at[pages[token], pl.ds(offsets[token], length)]
                    one = pltpu.make_async_copy(kv.at[pl.ds(token, length)], place, arrived)
                    getattr(one, act)()

                def one_token(t: Any, _: None) -> None:
                    pl.when(pages[t] >= 0)(lambda: copy(t, 1))

                @pl.when(whole[at] != 0)
                def at_once() -> None:
                    copy(at * run, run)

                @pl.when(whole[at] == 0)
                def one_by_one() -> None:
                    lax.fori_loop(at * run, (at + 1) * run, one_token, None)

            lax.fori_loop(0, batch, one_run, None)

        copies("start")
        copies("wait")

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(slab.shape, slab.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(places),
            grid=((num_runs + hang) // batch,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * 2,
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={len(places) + 1: 0},
        interpret=interpret,
        name="write_kv",
    )(*places, kv, slab)
