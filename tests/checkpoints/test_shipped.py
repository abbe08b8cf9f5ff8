"""The models that ship: genuine Hugging Face folders, whose greedy answers transformers gives too,
and which answer what they learned."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
import torch
import transformers

from quire import LLM, SamplingParams
from quire.checkpoints.folder import Checkpoint
from quire.checkpoints.shipped import SHIPPED, resolve
from quire.tools.cli import main
from quire.tools.eval.prompts import pose
from quire.tools.tasks.registry import TASKS, draw

pytestmark = pytest.mark.xdist_group("demo")

ASKED = (
    "add", "follow_up", "think_multiply", "sort_words", "reverse", "dates", "table", "json",
    "tool_call", "tool_result", "story", "small_talk",
)  # fmt: skip
MOST_NEW = 48


@pytest.mark.parametrize("name", SHIPPED)
def test_transformers_gives_the_same_greedy_answers(name: str) -> None:
    checkpoint = Checkpoint.open(resolve(name))
    rng = random.Random(4)
    examples = [draw(TASKS[task], rng, "held_out") for task in ASKED]
    prompts = [pose(checkpoint, example).prompt for example in examples]
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve(name))
    for example, prompt in zip(examples, prompts, strict=True):
        theirs = tokenizer.apply_chat_template(
            list(example.messages[:-1]),
            tools=list(example.tools) or None,
            enable_thinking=example.thinking,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert theirs == list(prompt), example.task

    with LLM(name, dtype="float32", max_num_seqs=4, max_batched_tokens=64) as llm:
        results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MOST_NEW))
    ours = [list(result.outputs[0].token_ids) for result in results]
    assert ours == _of_transformers(name, prompts)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in ours]
    assert len(set(texts)) == len(texts), "models that say the same whatever is asked"


def _of_transformers(name: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MOST_NEW
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def test_the_demo_model_answers_what_it_learned(capsys: pytest.CaptureFixture[str]) -> None:
    """A few of each; docs/eval.md has the figures of many."""
    flags = ["--no-warmup", "--max-num-seqs=4", "--max-batched-tokens=64"]
    assert main(["eval", "demo", "--tasks", ",".join(ASKED), "--n=4", "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["tasks"]) == list(ASKED)
    right = sum(task["accuracy"] * task["n"] for task in found["tasks"].values())
    assert right >= 0.9 * 4 * len(ASKED)
    assert 0 < found["nll"] < 0.1
