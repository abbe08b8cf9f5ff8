"""Run by test_tensor_parallel.py in an interpreter of its own, which has eight CPU devices: answers
of one checkpoint cut over each number of devices, as JSON on the last line."""

from __future__ import annotations

import json
import sys

import numpy as np

from quire import LLM, SamplingParams

NEW_TOKENS = 24
PROMPT_LENGTHS = (1, 7, 40, 90)


def answers(folder: str, shards: int) -> dict[str, object]:
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 300, n).tolist() for n in PROMPT_LENGTHS]
    # One sampled row makes every step a sampling one: the two kinds share their programs.
    each = [SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)] * (len(prompts) - 1)
    each.append(SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=2 * NEW_TOKENS))
    settings = {"max_num_seqs": 4, "max_batched_tokens": 64, "prefill_chunk": 32, "page_size": 16}
    with LLM(folder, tensor_parallel=shards, kv_memory=2**20, warmup=False, **settings) as llm:
        completions = llm.generate(prompts, each)
        slab = llm.parts.runner.slabs["kv"]
        weights = llm.parts.runner.params
        return {
            "tokens": [list(c.outputs[0].token_ids) for c in completions],
            "devices": len(slab.sharding.device_set),
            "kv_heads_per_device": slab.addressable_shards[0].data.shape[2] // 2,
            "weight_bytes_per_device": sum(
                p.addressable_shards[0].data.nbytes for p in weights.values()
            ),
        }


if __name__ == "__main__":
    path, *counts = sys.argv[1:]
    print(json.dumps({count: answers(path, int(count)) for count in counts}))
