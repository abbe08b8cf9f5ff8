"""After ready nothing compiles: a run that uses everything at random, on the shipped model with the
default settings, but for pages so few that requests are preempted."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.checkpoints.folder import Checkpoint
from quire.checkpoints.shipped import resolve
from quire.errors import InvalidRequest
from quire.model.cache import cache_groups, token_bytes
from quire.model.ladder import MAX_PROGRAMS

REQUESTS = 150
THREADS = 6
WORDS = (
    "What",
    "is",
    "27",
    "+",
    "48",
    "?",
    "Reverse:",
    "engine",
    "Hello",
    "page",
    "slot",
    "É",
    "🙂",
)


def random_prompt(rng: random.Random, llm: LLM):
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))
    match rng.randrange(4):
        case 0:
            return [rng.randrange(300) for _ in range(rng.randint(1, 90))]
        case 1:
            return llm.chat_prompt([{"role": "user", "content": text}])
        case 2:
            return {"prompt_token_ids": [7] * rng.randint(1, 70) + [rng.randrange(300)]}
        case _:
            return text


CONTROLS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"frequency_penalty": 1.0, "bad_words": ["the", [5, 6]]},
    {"logit_bias": {9: 3.0}, "allowed_token_ids": range(5, 250)},
)


def random_sampling(rng: random.Random) -> SamplingParams:
    max_tokens = rng.randint(1, 140)
    return SamplingParams(
        temperature=rng.choice((0, 0, 0.5, 1.0, 2.0)),
        top_k=rng.choice((0, 1, 20, -1)),
        top_p=rng.choice((1.0, 0.9, 0.1)),
        min_p=rng.choice((0.0, 0.05)),
        seed=rng.choice((None, rng.randrange(2**64))),
        max_tokens=max_tokens,
        min_tokens=rng.choice((0, 0, rng.randint(0, max_tokens))),
        stop=rng.choice(((), ("e",), ("an", "\n"))),
        stop_token_ids=rng.choice(((), (5, 9))),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice((None, None, 0, 1, 20)),
        skip_special_tokens=rng.random() < 0.8,
        n=rng.choice((1, 1, 1, 1, 3)),
        prompt_logprobs=rng.choice((None, None, None, 2)),
        **rng.choice(({}, {}, {}, *CONTROLS)),
    )


def one_request(rng: random.Random, llm: LLM) -> None:
    """Generates, streams, leaves early, or asks for what cannot be."""
    prompt, sampling = random_prompt(rng, llm), random_sampling(rng)
    match rng.randrange(5):
        case 0:
            with pytest.raises(InvalidRequest):
                llm.generate([10**6], sampling)
        case 1:
            stream = llm.stream(prompt, sampling)
            for _, _chunk in zip(range(rng.randint(0, 3)), stream, strict=False):
                pass
            stream.close()
        case 2:
            reasons = [chunk.finish_reason for chunk in llm.stream(prompt, sampling)]
            ends = [reason for reason in reasons if reason is not None]
            assert len(ends) == sampling.n and set(ends) <= {"stop", "length"} and reasons[-1]
        case _:
            batch = [prompt, *(random_prompt(rng, llm) for _ in range(rng.randint(0, 3)))]
            each = [sampling, *(random_sampling(rng) for _ in batch[1:])]
            for result in llm.generate(batch, each):
                assert all(o.finish_reason in ("stop", "length") for o in result.outputs)


@pytest.mark.xdist_group("demo")
def test_nothing_compiles_after_ready(capsys):
    # 24 pages of 32 positions, for up to 16 requests of up to 250 each.
    model = Checkpoint.open(resolve("demo")).config
    kv_memory = 25 * 32 * token_bytes(cache_groups(model, "float32"))
    with LLM("demo", max_model_len=256, kv_memory=kv_memory) as llm:
        failures: list[BaseException] = []

        def worker(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(REQUESTS // THREADS):
                    one_request(rng, llm)
            except BaseException as failure:
                failures.append(failure)

        # Whatever the threads' timing: short prompts come in, long answers do not fit together.
        long_answer = SamplingParams(temperature=0, max_tokens=140, ignore_eos=True)
        llm.generate([[i] * 20 for i in range(1, 17)], long_answer)
        assert llm.stats().preemptions > 0

        threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        end = time.monotonic() + 30  # a stream left early ends at the engine's next step
        while llm.stats().running and time.monotonic() < end:
            time.sleep(0.01)
        stats, ladder = llm.stats(), llm.parts.sizes.spec.ladder
        with capsys.disabled():
            print(
                f"\n{stats.steps} steps, {stats.preemptions} preemptions, "
                f"{stats.prefix_hit_tokens} tokens from the prefix index, "
                f"{ladder.num_programs} programs, padding waste {stats.padding_waste:.0%}, "
                f"{llm.compiles_after_ready} compiled after ready"
            )
    assert failures == []
    assert llm.compiles_after_ready == 0
    assert ladder.num_programs <= MAX_PROGRAMS
    assert stats.prefix_hit_tokens > 0
    assert stats.running == stats.waiting == 0
