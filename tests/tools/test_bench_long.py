"""`quire bench long`: chunks, hits, and a context beyond the model's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.tools.cli import main

pytestmark = pytest.mark.usefixtures("collector")

# The tiny model's context is of 4,096 tokens.
ARGV = ["--prompt-tokens=4100", "--max-model-len=4200"]
SMALL = ["--no-warmup", "--max-num-seqs=1", "--max-batched-tokens=512", "--page-size=64"]


def test_a_prompt_beyond_the_context(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "long.png"
    argv = [f"--model={folder}", *ARGV, *SMALL, f"--plot={plot}", "--json"]
    assert main(["bench", "long", *argv]) == 1
    said = capsys.readouterr().err
    assert "max_model_len: got 4200, must be at most 4096" in said
    assert "lift_context_limit lets it go beyond" in said
    assert main(["bench", "long", *argv, "--lift-context-limit"]) == 0
    captured = capsys.readouterr()
    assert "beyond the 4096 tokens that the checkpoint was made for" in captured.err
    said = json.loads(captured.out)
    starts = [chunk["start"] for chunk in said["chunks"]]
    assert starts == list(range(0, 4100, 512))
    assert sum(chunk["tokens"] for chunk in said["chunks"]) == 4100
    assert all(chunk["ms"] > 0 for chunk in said["chunks"])
    assert said["hit_tokens"] == 4096 and len(said["hit_ms"]["all"]) == 5
    parts = said["hit_parts_ms"]
    assert 0 < parts["to_launch"] + parts["launch"] < said["hit_ms"]["median"]
    assert said["prompt_pages"] == 65 and said["decode_step_ms"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_prefix_caching_is_needed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "long", f"--model={folder}", "--no-prefix-caching"]) == 1
    assert "prefix_caching: is off, and must be on" in capsys.readouterr().err
