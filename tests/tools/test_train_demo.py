"""tools/train_demo: batches hold what they should, a training can be stopped and resumed, and what
is exported opens everywhere. What is trained on has tests of its own (test_tasks.py)."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tokenizers import Tokenizer

from quire.checkpoints.folder import Checkpoint
from quire.checkpoints.names import parameters
from quire.checkpoints.shipped import resolve
from quire.errors import CheckpointError, Internal
from quire.model.config import ModelConfig
from quire.model.kernels.dense_attention import fused
from quire.serving.progress import Silent
from quire.tools.tasks.registry import TASKS
from quire.tools.train_demo import attention, card, plot, state
from quire.tools.train_demo.__main__ import main
from quire.tools.train_demo.batch import Batch, unpack
from quire.tools.train_demo.conversations import Conversations, DrawingRates, Writer, measure
from quire.tools.train_demo.data import Batches, Plan, Source
from quire.tools.train_demo.exam import Exam
from quire.tools.train_demo.export import export
from quire.tools.train_demo.model import DEMO, DRAFT, MOST_PARAMETERS, shipped_configs
from quire.tools.train_demo.optimizer import LearningRates, stack, unstack
from quire.tools.train_demo.packing import LEARNED, STARTS, Layout, Packer, to_words
from quire.tools.train_demo.tokenizer import TURN_END, TURN_START, VOCAB_SIZE, build
from quire.tools.train_demo.train import Recipe, Record, State, Trainer, cross_entropy, train

read = jax.jit(unpack, static_argnums=1)
LAYOUT = Layout(((3, 128), (1, 256)))
PLAN = Plan(LAYOUT, shard=2)
SEED = 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build()


@pytest.fixture(scope="module")
def rates(tokenizer: Tokenizer) -> DrawingRates:
    return measure(Writer(tokenizer))


def text_of(tokenizer: Tokenizer, words: np.ndarray) -> str:
    return tokenizer.decode(list(words & (LEARNED - 1)), skip_special_tokens=False)


# Rows.


def conversation(*pieces: tuple[list[int], bool]) -> np.ndarray:
    return to_words(pieces)


def test_a_conversation_goes_whole_into_the_shortest_row_with_room() -> None:
    packer = Packer(Layout(((2, 4), (1, 8))), batches=1, padding=9)
    three, two = conversation(([1, 2, 3], False)), conversation(([4, 5], True))
    places = [packer.place(words) for words in (three, two, three, two, three, three, two)]
    assert places == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 1, 2), (1, 0, 3), None, (1, 0, 6)]
    ids = packer.packed()[0] & (LEARNED - 1)
    assert ids.tolist() == [1, 2, 3, 9, 4, 5, 4, 5, 1, 2, 3, 1, 2, 3, 4, 5]
    assert packer.place(conversation(([1] * 9, False))) is None


def test_shuffled_rows_are_the_same_rows() -> None:
    packer = Packer(Layout(((2, 2), (1, 4))), batches=3, padding=9)
    for i in range(9):
        packer.place(conversation(([i + 10, i + 20], False)))
    shuffled = packer.packed(np.random.default_rng(0))
    assert shuffled.tolist() != packer.packed().tolist()
    for columns, length in ((slice(0, 4), 2), (slice(4, 8), 4)):
        rows, ordered = (w[:, columns].reshape(-1, length) for w in (shuffled, packer.packed()))
        assert sorted(rows.tolist()) == sorted(ordered.tolist())


def test_what_the_device_reads_from_words() -> None:
    layout = Layout(((1, 8), (1, 4)))
    packer = Packer(layout, batches=1, padding=9)
    packer.place(conversation(([1, 2], False), ([3, 4], True), ([5], False), ([6], True)))
    packer.place(conversation(([7], False), ([8], True)))
    packer.place(conversation(([1, 2, 3], False)))
    batch = read(packer.packed()[0], layout)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 9]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2, 0]
    learned = [0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0]  # the target is the model's to write
    assert batch.learned.tolist() == [bool(x) for x in learned]
    targets = np.array(batch.targets)[np.array(learned, bool)]
    assert targets.tolist() == [3, 4, 6, 8]
    lengths = np.array(batch.answers)[np.array(learned, bool)]
    assert lengths.tolist() == [2, 2, 1, 1]
    assert [s.tolist() for s in batch.segments] == [[[1, 1, 1, 1, 1, 1, 2, 2]], [[1, 1, 1, 2]]]


# Conversations.


def test_only_answers_are_learned_and_whole(tokenizer: Tokenizer, rates: DrawingRates) -> None:
    chats = Conversations(Writer(tokenizer), rates, "train", random.Random(1), longest=512)
    long = 0
    for chat, words in islice(chats, 300):
        assert words[0] >= STARTS and not np.any(words[1:] >= STARTS)
        learned = words & LEARNED > 0
        learned_text = text_of(tokenizer, words[learned])
        answers = [m for m in chat.messages if m["role"] == "assistant"]
        assert learned_text.count(TURN_END) == len(answers)
        for message in answers:
            assert (message["content"] or "") + TURN_END in learned_text
            for call in message.get("tool_calls", ()):
                assert f'{{"name": "{call["function"]["name"]}"' in learned_text
        assert TURN_START not in learned_text
        given_text = text_of(tokenizer, words[~learned])
        assert all(m["content"] in given_text for m in chat.messages if m["role"] == "user")
        long += len(answers) > 2
    assert long > 5, "some examples must be turns of longer chats"


def test_every_task_gets_its_share_of_the_tokens(tokenizer: Tokenizer, rates: DrawingRates) -> None:
    chats = Conversations(
        Writer(tokenizer), rates, "train", random.Random(2), longest=2048, joined=False
    )
    tokens = dict.fromkeys(TASKS, 0)
    for chat, words in islice(chats, 12_000):  # of the rarest, some five dozen
        tokens[chat.task] += len(words)
    total = sum(tokens.values())
    for name, task in TASKS.items():
        assert tokens[name] / total == pytest.approx(task.share, rel=0.5), name


def test_a_shard_depends_on_seed_and_number_alone(
    tokenizer: Tokenizer, rates: DrawingRates
) -> None:
    source, other = (Source(tokenizer, rates, PLAN, seed) for seed in (SEED, SEED + 1))
    again = Source(tokenizer, rates, PLAN, SEED)
    assert np.array_equal(source.shard(3), again.shard(3))
    assert not np.array_equal(source.shard(3), source.shard(4))
    assert not np.array_equal(source.shard(3), other.shard(3))


def test_other_processes_make_the_same_batches(tokenizer: Tokenizer) -> None:
    def first(count: int, **options: int) -> list[np.ndarray]:
        with Batches(tokenizer, PLAN, SEED, **options) as batches:
            return list(islice(batches, count))

    alone = first(5)
    assert all(batch.shape == (LAYOUT.tokens,) for batch in alone)
    np.testing.assert_array_equal(first(5, workers=1), alone)
    np.testing.assert_array_equal(first(2, first=3), alone[3:])


def test_an_interrupt_is_not_for_the_processes_that_make_data(tokenizer: Tokenizer) -> None:
    with Batches(tokenizer, PLAN, SEED, workers=1) as others:
        made = iter(others)
        next(made)
        assert others._pool is not None
        for process in others._pool._processes.values():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGINT)
            process.join(1)
            assert process.is_alive()
        assert len(list(islice(made, 5 * PLAN.shard))) == 5 * PLAN.shard


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted; --resume"),
        (OSError(28, "disk full"), 1, "disk full"),
    ],
)
def test_what_stops_a_training_is_said_in_a_line(
    raised: BaseException,
    status: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*args: object) -> None:
        raise raised

    monkeypatch.setattr("quire.tools.train_demo.__main__._run", stop)
    argv = ["train", "--trial", "--workers=0", f"--out={tmp_path}", f"--state={tmp_path / 's'}"]
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == status
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_held_out_examples_lie_where_they_are_said_to(
    tokenizer: Tokenizer, rates: DrawingRates
) -> None:
    words, places = Source(tokenizer, rates, PLAN, SEED).held_out(0)
    assert words.shape == (1, LAYOUT.tokens) and len(places) > 5
    for place in places:
        row = words[0, place.start : place.stop]
        assert row[0] >= STARTS and not np.any(row[1:] >= STARTS)
        assert text_of(tokenizer, row).endswith(f"{TURN_END}\n")
        assert place.task in TASKS


def test_processes_that_make_data_load_no_jax() -> None:
    asked = "import sys, quire.tools.train_demo.__main__, quire.tools.train_demo.data as d; "
    asked += "sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", asked]).returncode == 0


# The step.


def test_the_fused_kernel_agrees_with_xla() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (
        jax.random.normal(key, (2, 64, heads, 16))
        for key, heads in zip(keys, (4, 2, 2, 4), strict=True)
    )
    segments = jnp.stack([jnp.arange(64) // 23, jnp.arange(64) // 40])

    def both(mix: attention.Mix) -> list[jax.Array]:
        mixed, pull = jax.vjp(lambda q, k, v: mix(q, k, v, segments), q, k, v)
        return [mixed, *pull(weight)]

    ours = both(partial(fused, forward=32, backward=16, interpret=True))
    for found, wanted in zip(ours, both(attention.MIXES[attention.EVERYWHERE]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_short_answer_counts_for_more() -> None:
    logits = jax.random.normal(jax.random.key(1), (4, 7))
    targets = jnp.array([1, 2, 3, 4])
    batch = Batch(
        tokens=targets, positions=targets, targets=targets,
        learned=jnp.array([True, True, False, True]), answers=jnp.array([4, 4, 0, 1]), segments=(),
    )  # fmt: skip
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    expected = (each[0] / 2 + each[1] / 2 + each[3]) / 2
    np.testing.assert_allclose(cross_entropy(logits, batch), expected, rtol=1e-6)


def test_rates_rise_stay_and_fall_to_zero() -> None:
    rates = LearningRates(warmup=10, decay=0.5)
    factors = [rates.factor(step, 100) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[50] == 1.0
    assert factors[75] == 0.5 and factors[99] == pytest.approx(0.02)
    assert all(a >= b for a, b in pairwise(factors[9:]))


def test_layers_are_stacked_in_their_order() -> None:
    params = {f"layers.{i}.mlp.down.weight": jnp.full((2, 3), i) for i in range(11)}
    params["embed.weight"] = jnp.ones((4, 2))
    stacked = stack(params)
    assert stacked["layers.mlp.down.weight"][:, 0, 0].tolist() == list(range(11))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, unstack(stacked, params), params))


# Training.


def tiny(vocabulary: int) -> dict[str, ModelConfig]:
    configs = shipped_configs(vocabulary)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1}
    return {
        DEMO: replace(configs[DEMO], **small, num_layers=2, windows=(None, None), dtype="float32"),
        DRAFT: replace(configs[DRAFT], **small, num_layers=1, windows=(None,), dtype="float32"),
    }


RECIPE = Recipe(12, PLAN, LearningRates(matrix=0.02, other=0.01, warmup=2))


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    mix = attention.MIXES[attention.EVERYWHERE]
    return Trainer(tiny(VOCAB_SIZE), RECIPE, mix, "float32")


@pytest.fixture(scope="module")
def batches(tokenizer: Tokenizer) -> list[np.ndarray]:
    return list(islice(Batches(tokenizer, PLAN, SEED), RECIPE.steps))


def run(
    trainer: Trainer,
    begun: State,
    record: Record,
    batches: Iterator[np.ndarray],
    save: Any = lambda state, record: None,
    **options: Any,
) -> State:
    return train(
        trainer, begun, record, batches, Silent(), exam=lambda state: EXAM, save=save, **options
    )


EXAM = {"loss": 1.0, "share": 0.5, "right": {"add": [1, 2]}, "agrees": 0.5}
SETTINGS = {"seed": SEED, "models": {"a": [1]}}


def same(one: Any, other: Any) -> bool:
    return bool(jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other)))


@pytest.fixture(scope="module")
def trained(trainer: Trainer, batches: list[np.ndarray]) -> tuple[State, Record]:
    record = Record()
    return run(trainer, trainer.initial(SEED), record, iter(batches)), record


def test_training_learns(trainer: Trainer, trained: tuple[State, Record]) -> None:
    _, record = trained
    assert record.steps == RECIPE.steps and record.tokens == RECIPE.steps * LAYOUT.tokens
    assert [entry["step"] for entry in record.losses] == [RECIPE.steps]
    assert record.exams == [{"step": RECIPE.steps, **EXAM}]


def test_the_loss_falls_and_the_draft_follows(
    trainer: Trainer, trained: tuple[State, Record], batches: list[np.ndarray]
) -> None:
    _, before = trainer.step(trainer.initial(SEED), batches[0], np.float32(0))
    state, _ = trained
    _, after = trainer.step(jax.tree.map(jnp.copy, state), batches[0], np.float32(0))
    assert float(before[DEMO]) == pytest.approx(math.log(VOCAB_SIZE), abs=0.3)
    assert float(after[DEMO]) < float(before[DEMO]) - 1.0
    # The distance between the untrained is nearly none; that of strangers would be over 1.
    assert float(after[DRAFT]) < 1.0


def test_the_draft_does_not_teach_its_teacher(
    trainer: Trainer, trained: tuple[State, Record], batches: list[np.ndarray]
) -> None:
    params = trained[0].params
    of_draft = jax.jit(jax.grad(lambda params: trainer.losses(params, batches[0])[1][DRAFT]))
    gradients = of_draft(params)
    assert all(not np.any(array) for array in gradients[DEMO].values())
    assert all(np.any(array) for array in gradients[DRAFT].values())


def test_a_resumed_training_ends_with_the_same_weights(
    trainer: Trainer,
    trained: tuple[State, Record],
    batches: list[np.ndarray],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quire.tools.train_demo.train.LOG_EVERY", 5)
    monkeypatch.setattr(state, "PART_BYTES", 100_000)
    folder = tmp_path / "state"

    def save(current: State, record: Record) -> None:
        state.save(folder, current, record, SETTINGS, tokenizer)

    record = Record()
    run(trainer, trainer.initial(SEED), record, iter(batches), save, deadline=0.0)
    assert record.steps == state.record_of(folder).steps == 5
    assert len(list(folder.glob("part-*"))) > 2 and (folder / "tokenizer.json").exists()

    fresh = trainer.initial(SEED + 1)
    restored, record = state.restore(folder, fresh, SETTINGS)
    ended = run(trainer, restored, record, iter(batches[record.steps :]))
    assert record.steps == RECIPE.steps and same(ended, trained[0])

    with pytest.raises(CheckpointError, match="was trained with seed 5, got 6"):
        state.restore(folder, fresh, SETTINGS | {"seed": 6})
    with pytest.raises(CheckpointError, match="holds no saved training"):
        state.restore(tmp_path / "none", fresh, SETTINGS)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_save_that_is_stopped_anywhere_leaves_the_last(
    stop: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, little = tmp_path / "state", State({"m": {"a": jnp.zeros(2)}}, {})
    renamed: list[Path] = []
    rename = Path.rename

    def stopped(path: Path, target: Path) -> Path:
        renamed.append(path)
        if len(renamed) == stop:
            raise KeyboardInterrupt
        return rename(path, target)

    state.save(folder, little, Record(steps=1), SETTINGS, tokenizer)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            state.save(folder, little, Record(steps=2), SETTINGS, tokenizer)
    state.mend(folder)
    assert state.record_of(folder).steps == 1
    state.save(folder, little, Record(steps=3), SETTINGS, tokenizer)
    assert state.record_of(folder).steps == 3 and [*tmp_path.iterdir()] == [folder]


def test_a_loss_that_is_no_number_ends_the_training(
    trainer: Trainer, batches: list[np.ndarray]
) -> None:
    broken = trainer.initial(SEED)
    broken.params[DEMO]["final_norm.scale"] *= jnp.nan
    with pytest.raises(Internal, match="must be finite"):
        run(trainer, broken, Record(steps=RECIPE.steps - 1), iter(batches))


def test_the_exam_counts_whole_answers(
    trainer: Trainer, trained: tuple[State, Record], tokenizer: Tokenizer, rates: DrawingRates
) -> None:
    words, places = Source(tokenizer, rates, PLAN, SEED).held_out(0)
    current, _ = trained
    found = Exam(trainer, words, places)(current)
    assert sum(n for _, n in found["right"].values()) == len(places)
    assert 0 <= found["share"] <= 1 and 0 <= found["agrees"] <= 1

    # Questions that ask for what the model says anyway are all right.
    batch = read(words[0], LAYOUT)
    logits = jax.jit(trainer.logits, static_argnums=0)(DEMO, current.params[DEMO], batch)
    chosen = np.array(jnp.argmax(logits, axis=-1))
    learned = np.flatnonzero(words[0] & LEARNED)
    easy = words.copy()
    marks = easy[0, learned] & (LEARNED | STARTS)
    easy[0, learned] = chosen[learned - 1] | marks
    trainer_exam = Exam(trainer, easy, places)
    assert trainer_exam(current)["share"] > found["share"]


# What comes out.


def test_the_models_are_as_small_as_they_must_be() -> None:
    for name, config in shipped_configs(VOCAB_SIZE).items():
        size = sum(parameter.size for parameter in parameters(config))
        assert size < MOST_PARAMETERS[name] and config.max_positions >= 2048
        assert size * 2 < 15_600_000  # of the 16 MB that the whole folder may have


def test_an_exported_model_opens_everywhere(
    trainer: Trainer, trained: tuple[State, Record], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    current, _ = trained
    config = trainer.models[DEMO].config
    folder = tmp_path / DEMO
    export(folder, config, tokenizer, current.params[DEMO])
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == config
    assert checkpoint.eos_ids[0] == tokenizer.get_vocab()[TURN_END]
    assert checkpoint.generation.do_sample is False
    chat: list[dict[str, Any]] = [{"role": "user", "content": "What is 1 + 2?"}]
    text = checkpoint.chat_template.render(chat)

    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    names = transformers.AutoTokenizer.from_pretrained(folder)
    ids = names(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode(text).ids
    with torch.no_grad():
        expected = theirs(ids).logits[0].numpy()
    layout = Layout(((1, ids.shape[1]),))
    words = to_words([(ids[0].tolist(), False)])
    ours = jax.jit(trainer.logits, static_argnums=0)(
        DEMO, current.params[DEMO], read(words, layout)
    )
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_card_says_what_was_measured(
    trainer: Trainer, trained: tuple[State, Record], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    current, record = trained
    facts = {"seed": SEED, "device": "abacus", "batch": 640, "compute": "float32"}
    record = replace(record, facts=facts)
    folder = tmp_path / DEMO
    export(folder, trainer.models[DEMO].config, tokenizer, current.params[DEMO])
    plot.write_numbers(folder, record)
    assert plot.read_numbers(folder) == record
    plot.draw(folder / plot.PICTURE, record)
    card.write_card(folder)
    assert "Not measured yet" in (folder / "README.md").read_text("utf-8")

    measured = {
        "tasks": {"add": {"accuracy": 0.987, "n": 200}},
        "nll": 0.1234,
        "nll_ci95": [0.12, 0.13],
        "draft": {"model": "x/demo-draft", "acceptance": 0.9, "k": 4, "tokens_per_round": 3.5},
    }
    card.write_card(folder, json.loads(json.dumps(measured)))
    text = " ".join((folder / "README.md").read_text("utf-8").split())
    assert "| 200 | 98.7% |" in text and "0.1234 nats" in text
    assert "`demo-draft` guesses 90.0%; drafting 4 at a time" in text and "abacus" in text
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "loss.png",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }


def test_what_ships_is_small() -> None:
    folder = resolve("demo")
    checkpoint = Checkpoint.open(folder)
    assert sum(p.size for p in parameters(checkpoint.config)) < MOST_PARAMETERS[DEMO]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16_000_000
