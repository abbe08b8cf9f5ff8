"""Greedy tokens equal transformers', prompt by prompt, for every family and feature."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from harness import Bench

from quire import SamplingParams
from quire.model.abstract import AbstractDecoder

GREEDY = SamplingParams(temperature=0, max_tokens=zoo.NEW_TOKENS, logprobs=1)
LOGPROB_BOUND = 2e-4  # float32 on both sides, sums in another order


BY_CASE = [
    pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(case.name)) for case in zoo.CASES
]


@pytest.fixture(scope="module", params=BY_CASE)
def setting(request):
    """A case, its checkpoint, and transformers' answers."""
    folder, references = zoo.get(request.param)
    return request.param, Bench(folder), references


def test_references_bite(setting):
    """Answers vary, no choice was a near tie, and prompts reach beyond window and old length."""
    _, bench, references = setting
    assert [(r.distinct, r.gap) for r in references if not r.bites] == []
    assert [len(r.prompt) for r in references] == list(zoo.PROMPT_LENGTHS)
    config = bench.checkpoint.config
    assert all(w is None or w < 100 for w in config.windows)
    if config.rope.kind in ("llama3", "yarn"):
        assert config.rope.original_max_positions < 100


def test_greedy_tokens_and_logprobs_equal_transformers(setting):
    """All prompts in one batch, prompts chunked among decode rows."""
    _, bench, references = setting
    session = bench.engine(budget=64)
    answers = session.answers([r.prompt for r in references], GREEDY)
    assert answers == [r.tokens for r in references]
    for i, reference in enumerate(references):
        entries = [entry for o in session.outputs[str(i)] for entry in o.logprobs or ()]
        assert [e.token for e in entries] == reference.tokens
        assert {e.rank for e in entries} == {1}
        np.testing.assert_allclose(
            [e.logprob for e in entries], reference.logprobs, atol=LOGPROB_BOUND, rtol=0
        )


def _dense_choices(config, params, sequences):
    """The likeliest next token at every position, by one dense pass over padded sequences."""
    decoder = AbstractDecoder(config, "float32")
    wanted = decoder.specs
    params = {name: params[name] for name in wanted}
    length = max(map(len, sequences))
    places = jnp.arange(length)
    groups = config.num_heads // config.num_kv_heads
    # As in the model (`contract`): a GPU would round float32 operands to tf32, and tokens differ.
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    @partial(jax.tree_util.register_dataclass, data_fields=["window"], meta_fields=[])
    @dataclass
    class Dense:
        window: int = length

        def of_layer(self, layer):
            return Dense(config.windows[layer] or length)

        def __call__(self, heads, cached):
            q, k, v = heads.rotated()
            k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
            scores = einsum("qhd,khd->hqk", q, k) * config.head_dim**-0.5
            back = places[:, None] - places[None, :]
            seen = (back >= 0) & (back < self.window)
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            return einsum("hqk,khd->qhd", weights, v), cached

    def choices(params, tokens):
        model = decoder.bind(params)
        stream, _ = model(tokens, places, Dense())
        return jnp.argmax(model.logits(stream), axis=-1)

    run = jax.jit(choices)
    padded = [np.pad(np.array(s, np.int32), (0, length - len(s))) for s in sequences]
    return [np.asarray(run(params, p))[: len(s)] for p, s in zip(padded, sequences, strict=True)]


def test_switching_a_feature_off_changes_a_token(setting):
    """So the equality above would have noticed a feature that is missing or wrong."""
    case, bench, references = setting
    sequences = [r.prompt + r.tokens[:-1] for r in references]

    def continuations(config, params):
        chosen = _dense_choices(config, params, sequences)
        return [c[len(r.prompt) - 1 :].tolist() for c, r in zip(chosen, references, strict=True)]

    config, params = bench.checkpoint.config, bench.params
    expected = [r.tokens for r in references]
    assert continuations(config, params) == expected
    for feature, off in case.off.items():
        assert continuations(*off(config, params)) != expected, feature
