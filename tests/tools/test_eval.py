"""`quire eval`: what is asked, what counts as right, and what is said of the rest."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import fake_exam
import pytest
import tiny_checkpoint
from fake_exam import FakeEngine, double, question, task

from quire import LLM, SamplingParams
from quire.checkpoints.folder import Checkpoint
from quire.errors import InvalidRequest
from quire.serving.progress import Silent
from quire.tools.cli import main
from quire.tools.eval import answers, compare, draft, prompts, questions, report
from quire.tools.eval.answers import Outcome
from quire.tools.eval.questions import Paper
from quire.tools.eval.report import Result
from quire.tools.tasks import registry
from quire.tools.tasks.example import Example, is_held_out
from quire.tools.train_demo.chat import CHAT_TEMPLATE

SMALL = ["--no-warmup", "--max-num-seqs=4", "--max-batched-tokens=32", "--page-size=16"]
SILENT = Silent()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a template that hears of everything."""
    return fake_exam.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Checkpoint:
    return Checkpoint.open(model)


# What is asked


def test_the_same_seed_asks_the_same_held_out_examples() -> None:
    keys = [[e.key for e in questions.held_out(task(), n, 7)] for n in (20, 5)]
    assert keys[0][:5] == keys[1] and len(set(keys[0])) == 20
    assert all(map(is_held_out, keys[0]))
    assert [e.key for e in questions.held_out(task(), 5, 8)] != keys[1]
    assert [e.key for e in questions.held_out(task("other"), 5, 7)] != keys[1]


def test_a_task_that_has_no_more_gives_what_it_has() -> None:
    few = task(generate=lambda rng: double(random.Random(rng.randrange(100))))
    assert 0 < len(questions.held_out(few, 12, 0)) < 12


def test_unknown_tasks_are_refused_with_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: task(name) for name in ("a", "b", "c")}
    monkeypatch.setattr(registry, "TASKS", known)
    assert questions.chosen_tasks(["c", "a"]) == [known["a"], known["c"]]
    assert questions.chosen_tasks(None) == list(known.values())
    with pytest.raises(InvalidRequest, match="--tasks: got 'd', must be among a, b, c"):
        questions.chosen_tasks(["a", "d"])


def test_a_question_is_what_the_template_makes_of_it(checkpoint: Checkpoint) -> None:
    example = double(random.Random(0), tools=(fake_exam.TOOL,), thinking=True)
    asked, answer = (m["content"] for m in example.messages)
    posed = prompts.pose(checkpoint, example)
    decode = lambda ids: checkpoint.tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    tools = json.dumps([fake_exam.TOOL])
    assert decode(posed.prompt) == f"{tools}<eos><user>{asked}<eos>\n<assistant><think>"
    # Thoughts are a part of the right answer, the line break after the end of the turn is not.
    assert decode(posed.right) == f"hm</think>{answer}<eos>"
    assert posed.room == len(posed.right)


def test_every_right_answer_passes_as_the_demos_template_writes_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(fake_exam.write(tmp_path, CHAT_TEMPLATE))
    exam = questions.set_exam(list(registry.TASKS.values()), 2, 0, checkpoint, SILENT)
    assert exam.notes == [] and len(exam.questions) == 2 * len(registry.TASKS)
    for posed in exam.questions:
        written = checkpoint.tokenizer.decode(posed.right, skip_special_tokens=False)
        assert posed.example.check(written.partition("<|im_end|>")[0]), posed.example


def test_what_a_template_ignores_is_said(folder: Path, model: Path) -> None:
    tasks = [
        task("plain"),
        task("calls", lambda rng: _named("calls", double(rng, tools=(fake_exam.TOOL,)))),
        task("thoughts", lambda rng: _named("thoughts", double(rng, thinking=True))),
    ]
    exam = questions.set_exam(tasks, 3, 0, Checkpoint.open(folder), SILENT)
    assert exam.notes == [
        "the chat template ignores tools: calls asked without",
        "the chat template ignores enable_thinking: thoughts asked without",
    ]
    assert questions.set_exam(tasks, 3, 0, Checkpoint.open(model), SILENT).notes == []


def _named(name: str, e: Example) -> Example:
    return Example(name, e.key, e.messages, e.check, e.tools, e.thinking, e.difficulty)


def test_what_a_template_refuses_is_counted_and_said(tmp_path: Path) -> None:
    template = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + fake_exam.TEMPLATE
    checkpoint = Checkpoint.open(fake_exam.write(tmp_path, template))
    calls = task("calls", lambda rng: double(rng, tools=(fake_exam.TOOL,)))
    exam = questions.set_exam([task(), calls], 3, 0, checkpoint, SILENT)
    assert [(len(p.questions), p.refused) for p in exam.papers] == [(3, 0), (0, 3)]
    assert exam.notes == ["calls: 3 left out: messages: the chat template refused them: no tools"]
    with pytest.raises(InvalidRequest, match=r"nothing can be asked: .*no tools"):
        questions.set_exam([calls], 3, 0, checkpoint, SILENT)


def test_a_template_that_renders_another_prompt_with_an_answer_scores_nothing(
    tmp_path: Path,
) -> None:
    template = fake_exam.TEMPLATE.replace("{% for", "{{ add_generation_prompt }}{% for", 1)
    checkpoint = Checkpoint.open(fake_exam.write(tmp_path, template))
    exam = questions.set_exam([task()], 3, 0, checkpoint, SILENT)
    assert all(not q.right and q.room > 1 for q in exam.questions)
    assert "nll: 3 right answers left out" in exam.notes[0]


def test_what_does_not_fit_is_counted() -> None:
    paper = Paper(task(), [question("4", [1] * n) for n in (3, 8, 9)])
    before = paper.fingerprint
    paper.keep_within(10)  # a prompt of 8, an answer of 1, and the token that scoring makes
    assert [len(q.prompt) for q in paper.questions] == [3, 8] and paper.too_long == 1
    assert paper.fingerprint != before


# What counts as right


def test_answers_are_checked_and_failures_are_wrong() -> None:
    said = {1: "4", 2: "5", 3: None, 4: "4" * 100}
    engine = FakeEngine(lambda prompt: said[prompt[0]])
    asked = [question("4", [first]) for first in said]
    found = answers.answer(engine, asked, context=1000, reporter=SILENT, seed=3)
    assert [o.right for o in found] == [True, False, False, False]
    assert [o.error for o in found] == ["", "", "not finite", ""]
    assert [o.cut_off for o in found] == [False, False, False, True]
    assert found[1].tokens == [ord("5")]
    assert engine.calls == [4]  # all at once
    # Two tokens' room and 64 more; special tokens frame thoughts and calls.
    assert {s.max_tokens for s in engine.sampling} == {66}
    assert {s.temperature for s in engine.sampling} == {0.0}
    assert not any(s.skip_special_tokens for s in engine.sampling)
    assert [s.seed for s in engine.sampling] == [3, 4, 5, 6]


def test_an_answer_gets_no_more_than_the_context_has() -> None:
    engine = FakeEngine()
    asked = [question("4", [1] * 10)]
    answers.answer(engine, asked, context=40, reporter=SILENT)
    answers.answer(engine, asked, context=40, reporter=SILENT, max_tokens=7)
    assert [s.max_tokens for s in engine.sampling] == [30, 7]


def test_the_right_answers_tokens_are_scored_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "SLICE", 5)
    asked = [
        question("45", [1, 2]),
        question("", [1]),
        question("6", [1, 2, 3]),
        question("7", [9]),
    ]
    outcomes = [Outcome(False) for _ in asked]
    engine = FakeEngine(lambda prompt: None if prompt[0] == 9 else "")
    answers.score(engine, asked, outcomes, SILENT)
    assert [o.nll for o in outcomes] == [
        pytest.approx(ord("4") + 0.002 + ord("5") + 0.003),
        None,
        pytest.approx(ord("6") + 0.003),
        None,
    ]
    assert sum(engine.calls) == 3 and len(engine.calls) > 1  # in slices
    assert {s.prompt_logprobs for s in engine.sampling} == {0}


# What is reported


def result(right: str, name: str = "double", nll: float = 2.0, levels: int = 2) -> Result:
    """Questions that were answered as `right` says, a 1 or 0 each."""
    asked = [question(str(at), difficulty=at % levels) for at in range(len(right))]
    outcomes = [Outcome(c == "1", [ord(c)], nll=nll + at / 8) for at, c in enumerate(right)]
    return Result(Paper(task(name), asked), outcomes)


def test_the_json_has_the_shape_it_must_have() -> None:
    hard, plain = result("1101", "hard"), result("11", "plain", levels=1)
    plain.outcomes[0].cut_off = True
    plain.outcomes[1] = Outcome(False, error="x")
    plain.paper.too_long = 3
    found = json.loads(json.dumps(report.figures([hard, plain])))
    assert set(found) == {"tasks", "nll", "nll_ci95"}
    assert {name: (t["accuracy"], t["n"]) for name, t in found["tasks"].items()} == {
        "hard": (0.75, 4),
        "plain": (0.5, 2),
    }
    assert found["nll"] == pytest.approx((4 * 2 + 6 / 8 + 2) / 5)
    low, high = found["nll_ci95"]
    assert low < found["nll"] < high
    assert {k: (v["accuracy"], v["n"]) for k, v in found["tasks"]["hard"]["levels"].items()} == {
        "0": (0.5, 2),
        "1": (1.0, 2),
    }
    of_plain = found["tasks"]["plain"]
    assert "levels" not in of_plain
    assert {k: of_plain[k] for k in ("cut_off", "failed", "too_long", "refused")} == {
        "cut_off": 1,
        "failed": 1,
        "too_long": 3,
        "refused": 0,
    }
    assert (of_plain["right"], of_plain["nlls"], of_plain["tokens"]) == ("10", [2.0, None], [1])


def test_a_task_of_which_nothing_could_be_asked_has_no_accuracy() -> None:
    found = report.figures([result("1"), result("", "long")])
    assert found["tasks"]["long"]["accuracy"] is None and found["tasks"]["long"]["n"] == 0
    assert found["tasks"]["long"]["nll"] is None
    report.table_of("m", found)


def test_one_answer_has_no_interval_of_likelihood() -> None:
    found = report.figures([result("1")])
    assert (found["nll"], found["nll_ci95"]) == (2.0, [None, None])
    report.table_of("m", found)
    guessed = draft.acceptance(FakeEngine(lambda prompt: ""), [result("1")], 52, SILENT)
    assert guessed["acceptance_ci95"] == [0.0, 1.0]


# Comparing


def change(before: Result, after: Result) -> dict[str, compare.Difference]:
    old, new = (json.loads(json.dumps(report.figures([r]))) for r in (before, after))
    return {d.name: d for d in compare.compare(old, new)[0]}


def test_a_run_against_itself_is_within_noise() -> None:
    found = change(result("1101" * 10), result("1101" * 10))
    assert {(d.change.value, d.verdict, d.paired) for d in found.values()} == {
        (0.0, "within noise", True)
    }


def test_worse_and_better_are_seen_example_by_example() -> None:
    before, fewer = result("1" * 40), result("1" * 28 + "0" * 12)
    found = change(before, fewer)["double"]
    assert (found.verdict, found.change.value) == ("worse", pytest.approx(-0.3))
    assert change(fewer, before)["double"].verdict == "better"
    assert change(before, result("1" * 39 + "0"))["double"].verdict == "within noise"
    # A little less likely each, which intervals as wide as the answers differ could not tell.
    less = change(before, result("1" * 40, nll=2.01))[compare.NLL]
    assert (less.verdict, less.change.value) == ("worse", pytest.approx(0.4 / 70))  # of 40 answers
    wide = report.figures([before])["nll_ci95"]
    assert wide[1] - wide[0] > 10 * less.change.value


def test_a_single_answer_is_never_worse_beyond_noise() -> None:
    found = change(result("1"), result("1", nll=2.5))
    assert {d.verdict for d in found.values()} == {"within noise"}
    assert json.loads(json.dumps(found[compare.NLL].as_json()))["change_ci"] == [None, None]
    compare.table_of(list(found.values()), "old.json")


def test_other_examples_are_compared_by_their_intervals() -> None:
    found = change(result("1" * 30 + "0" * 10), result("1" * 41))
    assert set(found) == {"double"} and not found["double"].paired
    assert found["double"].verdict == "better"
    old = {"tasks": {"double": {"accuracy": 0.75, "n": 40}, "gone": {"accuracy": 1, "n": 4}}}
    differences, notes = compare.compare(old, report.figures([result("1" * 41)]))
    assert [d.verdict for d in differences] == ["better"]
    assert notes[0] == "only in one of both: gone" and "no task" in notes[1]


def test_other_tokens_are_not_compared() -> None:
    before = report.figures([result("11")])
    after = report.figures([result("11")])
    after["tasks"]["double"]["tokens"] = [1, 2]
    assert [d.name for d in compare.compare(before, after)[0]] == ["double"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"tasks": {"a": {"n": 1}}}', "no json"])
def test_what_is_no_baseline_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(InvalidRequest, match=r"--baseline: .*old.json"):
        compare.read_baseline(str(tmp_path / "old.json"))
    with pytest.raises(InvalidRequest, match=r"--baseline: .*No such file"):
        compare.read_baseline(str(tmp_path / "gone.json"))


# A draft


@pytest.mark.parametrize(
    ("flags", "rounds", "accepted"),
    [
        ("1111" + "0" + "1111" + "1" + "11", 3, 10),  # each round adds a token of the model's own
        ("000", 3, 0),
        ("1", 1, 1),
        ("110110", 2, 4),
    ],
)
def test_rounds_of_greedy_speculation(flags: str, rounds: int, accepted: int) -> None:
    found = draft.rounds([[c == "1" for c in flags]], 4)
    assert found == {
        "accepted_per_round": round(accepted / rounds, 4),
        "tokens_per_round": round(len(flags) / rounds, 4),
    }


def test_acceptance_is_how_often_the_draft_finds_the_token_likeliest() -> None:
    run = result("11")
    run.outcomes[0].tokens = [3, 4, 6]  # ranks 1, 2, 1
    run.outcomes[1].tokens = [9] * 50  # with the prompt's two, more than the draft takes
    found = draft.acceptance(FakeEngine(lambda prompt: ""), [run], 52, SILENT)
    assert (found["acceptance"], found["tokens"], found["left_out"]) == (round(2 / 3, 6), 3, 1)
    assert found["tasks"] == {"double": round(2 / 3, 6)}
    assert (found["k"], found["accepted_per_round"]) == (4, 1.0)
    assert "66.7% of 3 tokens" in draft.line("small", found) and "1 answers" in draft.line(
        "s", found
    )


# The command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(registry, "TASKS", {"double": task(), "other": task("other")})

    def run(*argv: object) -> tuple[int, str, str]:
        status = main(["eval", *map(str, argv)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_the_command(run: Run, model: Path, tmp_path: Path) -> None:
    first = [model, "--tasks=double", "--n=6", "--max-tokens=8", *SMALL]
    status, out, err = run(*first, "--json")
    (line,) = out.splitlines()
    found = json.loads(line)
    assert status == 0 and set(found) == {"tasks", "nll", "nll_ci95"}
    assert list(found["tasks"]) == ["double"] and found["tasks"]["double"]["n"] == 6
    assert "double" in err and "scoring" in err and "generating" in err

    # The figure is the engine's own: minus the log-probabilities of the right answers' tokens.
    checkpoint = Checkpoint.open(model)
    exam = questions.set_exam([task()], 6, 0, checkpoint, SILENT)
    with LLM(model, warmup=False, max_num_seqs=4, max_batched_tokens=32, page_size=16) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        total = 0.0
        for q in exam.questions:
            (said,) = llm.generate([*q.prompt, *q.right], sampling)
            for at in range(len(q.prompt), len(q.prompt) + len(q.right)):
                total -= said.prompt_logprobs[at][[*q.prompt, *q.right][at]].logprob
    tokens = sum(len(q.right) for q in exam.questions)
    assert found["nll"] == pytest.approx(total / tokens, abs=2e-4)

    # Against itself, and against a better one; and with itself as its own draft.
    old = tmp_path / "old.json"
    old.write_text(f"above\n{line}\n")
    again = [*first, f"--baseline={old}", "--fail-if-worse", f"--draft={model}"]
    status, out, err = run(*again, "--json")
    both = json.loads(out.splitlines()[-1])
    assert status == 0
    assert {k: v["verdict"] for k, v in both["against_baseline"].items()} == {
        "double": "within noise",
        compare.NLL: "within noise",
    }
    assert both["draft"]["acceptance"] == 1.0 and both["draft"]["tokens"] >= 6
    found["tasks"]["double"]["nlls"] = [v / 2 for v in found["tasks"]["double"]["nlls"]]
    old.write_text(json.dumps(found))
    status, out, err = run(*first, f"--baseline={old}", "--fail-if-worse")
    assert status == 1 and "worse" in out and "double" in out
    assert err.splitlines()[-1].endswith(f"worse than {old} beyond noise: nll per token")


def test_what_cannot_be_measured_is_refused_before_the_model_loads(
    run: Run, folder: Path, model: Path, tmp_path: Path
) -> None:
    bare = tiny_checkpoint.write(tmp_path / "bare")
    (bare / "tokenizer_config.json").write_text("{}")
    no_tokenizer = tiny_checkpoint.write(tmp_path / "none", tokenizer=False)
    for argv, says in [
        ((bare,), "no chat template"),
        ((no_tokenizer,), "no tokenizer.json"),
        ((model, "--tasks=nope"), "got 'nope', must be among double, other"),
        ((model, "--tasks="), "--tasks: got none"),
        ((model, "--fail-if-worse"), "needs --baseline"),
        ((model, "--temperature=-1"), "temperature: got -1"),
        ((model, "--draft=demo"), "demo has another tokenizer"),
        ((model, f"--draft={no_tokenizer}"), "has no tokenizer.json, must have the model's"),
        ((model, f"--draft={model}", "--temperature=1"), "must be 0"),
        ((model, "--plot=here.pdf"), "must end in .png or .svg"),
    ]:
        status, out, err = run(*argv, *SMALL)
        assert (status, out) == (1, "")
        assert says in err.splitlines()[-1] and "loading" not in err, says


def test_a_context_too_short_is_said(run: Run, model: Path) -> None:
    status, out, err = run(model, "--n=2", "--max-model-len=20", *SMALL)
    assert (status, out) == (1, "")
    assert "max_model_len: got 20 tokens, must be more" in err.splitlines()[-1]
    tokens = sorted(
        len(q.prompt) + q.room
        for q in questions.set_exam([task()], 8, 0, Checkpoint.open(model), SILENT).questions
    )
    assert tokens[0] < tokens[-1]
    argv = ["--tasks=double", "--n=8", f"--max-model-len={tokens[-1]}", "--json"]
    status, out, err = run(model, *argv, *SMALL)
    found = json.loads(out)["tasks"]["double"]
    assert status == 0 and found["too_long"] >= 1 and found["n"] + found["too_long"] == 8
    assert f"double: {found['too_long']} of 8 left out: prompt and answer do not fit" in err


def test_a_picture(run: Run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    argv = ["--tasks=double", "--n=2", "--max-tokens=2", f"--plot={tmp_path / 'a.svg'}"]
    status, out, _ = run(model, *argv, *SMALL)
    assert status == 0 and "accuracy" in out
    assert (tmp_path / "a.svg").stat().st_size > 1000
