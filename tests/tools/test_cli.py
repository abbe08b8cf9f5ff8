"""The command line, in process where it can be: what is printed where, and the exit status."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint

from quire import LLM, SamplingParams
from quire.errors import Internal
from quire.tools import generate_command
from quire.tools.cli import COMMANDS, main

SMALL = ["--no-warmup", "--max-num-seqs=4", "--max-batched-tokens=32", "--page-size=16"]
GREEDY = ["--temperature=0", "--max-tokens=12", "--ignore-eos"]
PROMPT = "hello world"


@dataclass
class Done:
    status: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        """stdout as JSON Lines."""
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*argv: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        said = capsys.readouterr()
        return Done(status, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def expected(folder: Path) -> dict[str, Any]:
    """What the offline face says to PROMPT."""
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_batched_tokens": 32, "page_size": 16}
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(folder, warmup=False, **settings) as llm:
        return generate_command.as_json(llm.generate(PROMPT, sampling)[0])


# Help


def test_help_of_everything_loads_nothing_heavy() -> None:
    script = (
        "import sys, quire\n"
        "from quire.tools.cli import COMMANDS, main\n"
        "for argv in [['--help'], ['--version'], *([c, '--help'] for c in COMMANDS)]:\n"
        "    try: main(argv)\n"
        "    except SystemExit as end: assert not end.code, argv\n"
        "heavy = 'jax jaxlib numpy flax grpc tokenizers torch transformers rich jinja2'\n"
        "sys.stderr.write(' '.join(m for m in heavy.split() if m in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert f"usage: quire {command}" in done.stdout


# Generate


def test_the_text_of_one_answer_is_all_that_stdout_gets(
    run: Run, folder: Path, expected: dict[str, Any]
) -> None:
    done = run("generate", folder, "--prompt", PROMPT, *GREEDY, *SMALL)
    assert (done.status, done.out) == (0, expected["outputs"][0]["text"] + "\n")
    assert "loading" in done.err and "generating" in done.err
    assert "\x1b" not in done.err  # no terminal, no control characters


def test_json_of_one_prompt_is_one_object(run: Run, folder: Path, expected: dict[str, Any]) -> None:
    done = run("generate", folder, "--prompt", PROMPT, "--json", *GREEDY, *SMALL)
    assert done.objects == [expected]
    tokens = tiny_checkpoint.make_tokenizer().encode(PROMPT).ids
    (answer,) = expected["outputs"]
    assert list(expected) == ["prompt_token_ids", "prompt_logprobs", "outputs", "usage", "error"]
    fields = ["text", "token_ids", "finish_reason", "cumulative_logprob", "logprobs"]
    assert list(answer) == fields
    assert expected["prompt_token_ids"] == tokens
    assert (len(answer["token_ids"]), answer["finish_reason"]) == (12, "length")
    assert answer["logprobs"] is None
    assert expected["prompt_logprobs"] is expected["error"] is None
    usage = {"prompt_tokens": len(tokens), "completion_tokens": 12, "cached_tokens": 0}
    assert expected["usage"] == usage


def test_several_prompts_in_their_order(run: Run, folder: Path, tmp_path: Path) -> None:
    prompts = ["what is a page?", PROMPT, "the\u2028quick [b]fox[/b]"]
    given = [arg for p in prompts for arg in ("--prompt", p)]
    by_flags = run("generate", folder, *given, "--json", *GREEDY, *SMALL).objects
    encode = tiny_checkpoint.make_tokenizer().encode
    assert [o["prompt_token_ids"] for o in by_flags] == [encode(p).ids for p in prompts]

    file = tmp_path / "prompts.txt"
    text = f"{prompts[0]}\n\n{prompts[1]}\r\n  \n{prompts[2]}"
    file.write_bytes(text.encode())
    by_file = run("generate", folder, "--prompts-file", file, "--json", *GREEDY, *SMALL)
    assert by_file.objects == by_flags
    by_pipe = run("generate", folder, "--prompts-file", "-", "--json", *GREEDY, *SMALL, stdin=text)
    assert by_pipe.objects == by_flags
    ids = [",".join(map(str, o["prompt_token_ids"])) for o in by_flags]
    given = [arg for i in ids for arg in ("--prompt-ids", i)]
    assert run("generate", folder, *given, "--json", *GREEDY, *SMALL).objects == by_flags

    plain = run("generate", folder, "--prompts-file", file, *GREEDY, *SMALL).out
    texts = [o["outputs"][0]["text"] for o in by_flags]
    heads = ["what is a page?", PROMPT, "the quick [b]fox[/b]"]
    parts = [f"==> {i + 1} of 3: {heads[i]} <==\n{texts[i]}\n" for i in range(3)]
    assert plain == "\n".join(parts)


def test_logprobs_in_json(run: Run, folder: Path) -> None:
    flags = ["--temperature=2", "--seed=5", "--max-tokens=8", "--ignore-eos", "--logprobs=2"]
    done = run("generate", folder, "--prompt", PROMPT, "--json", *flags, *SMALL)
    (answer,) = done.objects[0]["outputs"]
    assert [p["token_id"] for p in answer["logprobs"]] == answer["token_ids"]
    for position in answer["logprobs"]:
        assert list(position) == ["token_id", "token", "logprob", "rank", "alternatives"]
        others = position["alternatives"]
        assert len(others) == (1 if position["rank"] <= 2 else 2)
        assert position["token_id"] not in [o["token_id"] for o in others]


def test_several_answers_to_each_prompt(run: Run, folder: Path) -> None:
    flags = ["--temperature=1", "--seed=5", "--max-tokens=6", "--ignore-eos", "--n=2", *SMALL]
    flags += ["--prompt", PROMPT, "--prompt", "hello"]
    objects = run("generate", folder, *flags, "--json", "--prompt-logprobs=1").objects
    for found in objects:
        first, *others = found["prompt_logprobs"]
        assert first is None
        assert [p["token_id"] for p in others] == found["prompt_token_ids"][1:]
        assert found["usage"]["completion_tokens"] == 12
    texts = [answer["text"] for found in objects for answer in found["outputs"]]
    heads = [
        f"{i} of 2, answer {a} of 2: {p}" for i, p in ((1, PROMPT), (2, "hello")) for a in (1, 2)
    ]
    parts = [f"==> {head} <==\n{text}\n" for head, text in zip(heads, texts, strict=True)]
    assert run("generate", folder, *flags).out == "\n".join(parts)


def test_what_failed_does_not_hide_the_others(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = LLM.generate

    def spoil(self: LLM, *args: Any, **more: Any) -> Any:
        results = generate(self, *args, **more)
        results[0].error = Internal("its logits held an inf or NaN")
        return results

    monkeypatch.setattr(LLM, "generate", spoil)
    given = ["--prompt", PROMPT, "--prompt", "hello", *GREEDY, *SMALL]
    done = run("generate", folder, *given)
    assert done.status == 1 and "its logits held an inf or NaN" in done.err
    assert f"==> 1 of 2: {PROMPT} <== (failed)" in done.out and "==> 2 of 2: hello <==" in done.out


def test_all_sampling_flags_arrive(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    generate = LLM.generate

    def spy(self: LLM, prompts: Any, sampling: Any, **more: Any) -> Any:
        seen.extend(sampling)
        return generate(self, prompts, sampling, **more)

    monkeypatch.setattr(LLM, "generate", spy)
    flags = ["--temperature=0.5", "--top-k=4", "--top-p=0.9", "--min-p=0.05", "--seed=7"]
    flags += ["--max-tokens=5", "--min-tokens=2", "--logprobs=1", "--stop=yes", "--stop=no"]
    flags += ["--stop-token-ids=5,6", "--ignore-eos", "--keep-special-tokens"]
    flags += ["--repetition-penalty=1.5", "--presence-penalty=-1", "--frequency-penalty=0.5"]
    flags += ["--logit-bias=70=2.5, 71=-100", "--allowed-token-ids=5,6,70,71,72"]
    flags += ["--bad-word=no", "--bad-word=yes", "--prompt-logprobs=0", "--n=2", "--best-of=3"]
    assert run("generate", folder, "--prompt", PROMPT, *flags, *SMALL).status == 0
    assert seen == [
        SamplingParams(
            temperature=0.5,
            top_k=4,
            top_p=0.9,
            min_p=0.05,
            seed=7,
            max_tokens=5,
            min_tokens=2,
            logprobs=1,
            stop=("yes", "no"),
            stop_token_ids=(5, 6),
            ignore_eos=True,
            skip_special_tokens=False,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=0.5,
            logit_bias={70: 2.5, 71: -100},
            allowed_token_ids=(5, 6, 70, 71, 72),
            bad_words=("no", "yes"),
            prompt_logprobs=0,
            n=2,
            best_of=3,
        )
    ]


# Errors


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere", "--prompt=x"], "nowhere: does not exist"),
        (["FOLDER", "--prompts-file=nowhere"], "--prompts-file nowhere: "),
        (["FOLDER", "--prompts-file=-"], "--prompts-file -: holds no prompt"),
        (["FOLDER", "--prompt="], "prompt: got no tokens"),
        (["FOLDER", "--prompt-ids=1,300"], "prompt[1]: got 300, must be"),
        (["FOLDER", "--prompt=x", "--temperature=-1"], "temperature: got -1.0, must be"),
        (["FOLDER", "--prompt=x", "--max-tokens=0"], "max_tokens: got 0, must be"),
        (["FOLDER", "--prompt=x", "--logprobs=21"], "logprobs: got 21, must be"),
        (["FOLDER", "--prompt=x", "--n=3", "--best-of=2"], "best_of: got 2, must be at least n"),
        (["FOLDER", "--prompt=x", "--stop="], "stop: got '', must be"),
        (["FOLDER", "--prompt=x", "--max-num-seqs=0"], "max_num_seqs: got 0, must be at least 1"),
        (["FOLDER", "--prompt=x", "--page-size=24"], "page_size: got 24, must be a power of two"),
        (["FOLDER", "--prompt=x", "--max-model-len=9999"], "max_model_len: got 9999, must be at"),
    ],
)
def test_errors_are_one_line(run: Run, folder: Path, argv: list[str], says: str) -> None:
    argv = [str(folder) if arg == "FOLDER" else arg for arg in argv]
    done = run("generate", *SMALL, *argv)
    assert (done.status, done.out) == (1, "")
    *_, last = done.err.splitlines()
    assert last.startswith("quire: ") and says in last
    assert "Traceback" not in done.err and done.err.count("quire: ") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["fly"], "'fly'"),
        (["generate", "x"], "one of the arguments --prompt --prompt-ids --prompts-file"),
        (["generate", "x", "--prompt=a", "--prompt-ids=1"], "not allowed with"),
        (["generate", "x", "--prompt=a", "--frobnicate"], "--frobnicate"),
        (["generate", "x", "--prompt=a", "--max-num=4"], "--max-num=4"),
        (["generate", "x", "--prompt=a", "--temp=1"], "--temp=1"),
        (["generate", "x", "--prompt-ids="], "--prompt-ids: got '', must be whole numbers"),
        (["generate", "x", "--prompt=a", "--max-queue=1"], "--max-queue=1"),
        (["chat", "--max-queue=1"], "--max-queue=1"),
        (["inspect", "x", "--max-queue=1"], "--max-queue=1"),
        (["demo", "--max-queue=1"], "--max-queue=1"),
        (["generate", "x", "--prompt-ids=1,b"], "--prompt-ids: got '1,b', must be whole numbers"),
        (["generate", "x", "--prompt=a", "--logit-bias=7"], "--logit-bias: got '7', must be like"),
        (["generate", "x", "--prompt=a", "--logit-bias=5=1,05=2"], "must name token 5 once"),
        (["generate", "x", "--prompt=a", "--kv-memory=6XB"], "--kv-memory: size: got '6XB'"),
        (["generate", "x", "--prompt=a", "--dtype=int8"], "--dtype: invalid choice: 'int8'"),
        (["generate", "x", "--prompt=a", "--page-size=x"], "--page-size: invalid int value: 'x'"),
    ],
)
def test_a_wrong_command_line_is_status_2(run: Run, argv: list[str], says: str) -> None:
    done = run(*argv)
    assert (done.status, done.out) == (2, "")
    assert says in done.err and "usage: quire" in done.err


def test_an_interrupt_is_status_130(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", interrupted)
    done = run("generate", folder, "--prompt", PROMPT, *GREEDY, *SMALL)
    assert (done.status, done.out) == (130, "")
    assert done.err.splitlines()[-1] == "quire: interrupted"


def test_a_reader_that_goes_away_is_no_traceback(folder: Path) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-P", "-m", "quire.tools.cli", "generate", str(folder)]
    with subprocess.Popen(
        [*command, "--prompt", PROMPT, *GREEDY, *SMALL],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(write)
        os.close(read)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err and "Broken" not in err


@pytest.mark.parametrize(
    ("redirected", "says"),
    [
        ("chat FOLDER <&-", "standard input is closed"),
        ("chat FOLDER >&-", "standard output is closed"),
        ("generate FOLDER --prompts-file - <&-", "standard input is closed"),
        ("generate FOLDER --prompt x >&-", "standard output is closed"),
        ("inspect FOLDER >&-", "standard output is closed"),
        ("inspect FOLDER >/dev/full", "No space left"),
        ("inspect FOLDER --json >/dev/full", "No space left"),
        ("demo >&-", "standard output is closed"),
    ],
)
def test_streams_that_cannot_be_used_are_one_line(folder: Path, redirected: str, says: str) -> None:
    command = f"{sys.executable} -P -m quire.tools.cli {redirected.replace('FOLDER', str(folder))}"
    done = subprocess.run(
        ["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("quire: ") and says in line
    assert (done.returncode, done.stdout) == (1, "")


# Chat


def test_chat_from_a_pipe(run: Run, folder: Path) -> None:
    said = "hello\n\n  bye \n/new\nhello\n/quit\nnot heard\n"
    done = run("chat", folder, "--system", "be brief", *GREEDY, *SMALL, stdin=said)
    assert done.status == 0
    answers = done.out.splitlines()
    messages = [{"role": "system", "content": "be brief"}]
    expected = []
    with LLM(folder, warmup=False, max_num_seqs=4, max_batched_tokens=32, page_size=16) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        for line in ("hello", "bye"):
            messages.append({"role": "user", "content": line})
            text = llm.chat(messages, sampling)[0].outputs[0].text
            messages.append({"role": "assistant", "content": text})
            expected.append(text)
    assert answers == [*expected, expected[0]]


def test_chat_goes_on_after_what_is_too_long(run: Run, folder: Path) -> None:
    said = "hello\n" + "x" * 5000 + "\n/new\nhello\n"
    done = run("chat", folder, *GREEDY, *SMALL, stdin=said)
    first, second = done.out.splitlines()
    assert (done.status, first) == (0, second)
    assert "prompt: got" in done.err
    (note,) = (line for line in done.err.splitlines() if line.startswith("prompt: got"))
    assert "/new starts over" in note


def test_chat_says_which_commands_there_are(run: Run, folder: Path) -> None:
    done = run("chat", folder, *GREEDY, *SMALL, stdin="/help\nhello\n/quit\n")
    assert done.status == 0 and len(done.out.splitlines()) == 1
    assert "/help: no such command; /new starts over, /quit" in done.err


def test_chat_without_a_template_says_so_at_once(run: Run, tmp_path: Path) -> None:
    folder = tiny_checkpoint.write(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    done = run("chat", folder, *SMALL, stdin="hello\n")
    assert (done.status, done.out) == (1, "")
    assert "no chat template" in done.err.splitlines()[-1] and "loading" not in done.err


def test_text_without_a_tokenizer_is_refused_before_the_model_loads(
    run: Run, tmp_path: Path
) -> None:
    folder = tiny_checkpoint.write(tmp_path, tokenizer=False)
    for argv in (["generate", folder, "--prompt=x"], ["chat", folder]):
        done = run(*argv, *SMALL, stdin="hello\n")
        assert (done.status, done.out) == (1, "")
        assert "no tokenizer.json" in done.err.splitlines()[-1] and "loading" not in done.err


def test_without_a_tokenizer_the_answer_is_token_ids(run: Run, tmp_path: Path) -> None:
    folder = tiny_checkpoint.write(tmp_path, tokenizer=False)
    argv = ["generate", folder, "--prompt-ids=1,2,3", *GREEDY, *SMALL]
    (answer,) = run(*argv, "--json").objects[0]["outputs"]
    assert run(*argv).out == ",".join(map(str, answer["token_ids"])) + "\n"


# Inspect


def test_inspect_as_json(run: Run, folder: Path) -> None:
    done = run("inspect", folder, "--json", "--max-num-seqs=4", "--kv-memory=1MiB")
    report = json.loads(done.out)
    assert (done.status, report["model"]) == (0, str(folder))
    architecture, memory = report["architecture"], report["memory"]
    sizes = tiny_checkpoint.CONFIG
    assert architecture["layers"] == sizes["num_hidden_layers"]
    assert architecture["context"] == tiny_checkpoint.CONTEXT
    weights = (folder / "model.safetensors").stat().st_size
    assert weights - 4096 < 4 * architecture["parameters"] < weights
    assert memory["weights_bytes"] == 4 * architecture["parameters"]
    # Keys and values of two layers with one head of 16 in float32.
    assert memory["kv_bytes_per_token"] == 2 * 2 * 16 * 4
    assert memory["kv_bytes"] == 2**20
    assert memory["pages"] * memory["page_size"] * 256 == 2**20
    assert (memory["requests_at_once"], memory["dtype"]) == (4, "float32")


def test_inspect_for_people(run: Run, folder: Path) -> None:
    done = run("inspect", folder, "--kv-memory=1MiB")
    assert done.status == 0
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0] == str(folder)
    names = [line.split(" ")[0] for line in lines]
    assert names.count("device") == 2 and "device cpu" in lines
    assert any(line.startswith("device memory ") for line in lines)
    assert any(line.startswith("slot state ") for line in lines)
    assert "worst decode padding 88%" in lines  # two rows in a program of sixteen
    assert "kv per token 256 B" in lines and "kv 1 MiB" in lines and "features none" in lines


def test_inspect_needs_no_weights(run: Run, tmp_path: Path) -> None:
    folder = tiny_checkpoint.write(tmp_path, tokenizer=False, generation={"num_beams": 4})
    (folder / "model.safetensors").unlink()
    done = run("inspect", folder, "--json")
    assert done.status == 0
    assert any("num_beams=4" in note for note in json.loads(done.out)["notes"])
    wrong = run("inspect", tmp_path / "nowhere")
    assert wrong.status == 1 and "does not exist" in wrong.err
