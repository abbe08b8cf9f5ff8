"""The whole folder: what serving/ sees, and generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from quire.checkpoints.folder import Checkpoint
from quire.checkpoints.generation_config import GenerationConfig, read_generation_config
from quire.errors import CheckpointError, InvalidRequest


def test_open_reads_everything(write_model: Any, backends: Any, edit_json: Any) -> None:
    folder, state = write_model("qwen3")
    backends["byte_level"].save(str(folder / "tokenizer.json"))
    edit_json(
        folder / "tokenizer_config.json",
        eos_token="<|im_end|>",
        chat_template="{{ messages[0].content }}{{ eos_token }}",
    )
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.config.family == "qwen3" and checkpoint.has_tokenizer
    assert checkpoint.tokenizer is checkpoint.tokenizer
    assert checkpoint.chat_template.render([{"role": "user", "content": "Hi"}]) == "Hi<|im_end|>"
    assert checkpoint.eos_ids == (checkpoint.tokenizer.eos_id,)
    params: dict[str, np.ndarray] = {}
    checkpoint.load_params("bfloat16", params.__setitem__)
    assert params["embed.weight"].shape == tuple(state["model.embed_tokens.weight"].shape)


def test_token_ids_alone_need_no_tokenizer(write_config: Any) -> None:
    checkpoint = Checkpoint.open(write_config(eos_token_id=None))
    assert not checkpoint.has_tokenizer and checkpoint.eos_ids == ()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        _ = checkpoint.tokenizer
    assert not checkpoint.chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        checkpoint.chat_template.render([])


def test_paths(tmp_path: Path, write_config: Any) -> None:
    with pytest.raises(CheckpointError, match="nowhere: does not exist, must be a model folder"):
        Checkpoint.open(tmp_path / "nowhere")
    file = write_config() / "config.json"
    with pytest.raises(CheckpointError, match="is a file, must be a model folder"):
        Checkpoint.open(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path / "empty")


def test_ignored_fields_are_handed_on(write_config: Any) -> None:
    folder = write_config(logit_scale=2)
    with pytest.raises(CheckpointError, match="logit_scale"):
        Checkpoint.open(folder)
    assert Checkpoint.open(folder, ignore_fields=["logit_scale"]).config.family == "llama"


def test_dtype_from_the_weights(write_model: Any, edit_json: Any) -> None:
    import torch

    folder, _ = write_model("llama", torch.float16)
    edit_json(folder / "config.json", dtype=...)
    assert Checkpoint.open(folder).config.dtype == "float16"
    edit_json(folder / "config.json", dtype="bfloat16")
    assert Checkpoint.open(folder).config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ([7, 8, 7], 5, (7, 8)),
        (7, 5, (7,)),
        (None, [5, 6], (5, 6)),
        (..., 5, (5,)),
        (0, 5, (0,)),
        (None, None, (1,)),
    ],
)
def test_eos_ids(
    generation: Any, config: Any, wanted: tuple[int, ...], write_config: Any, backends: Any,
    edit_json: Any,
) -> None:  # fmt: skip
    folder = write_config(eos_token_id=config)
    backends["byte_level"].save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", eos_token="</s>")
    edit_json(folder / "generation_config.json", eos_token_id=generation)
    assert Checkpoint.open(folder).eos_ids == wanted


def test_sampling_defaults(tmp_path: Path) -> None:
    transformers.GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, max_new_tokens=99,
        eos_token_id=[1, 2], bos_token_id=0, pad_token_id=0, repetition_penalty=1.05,
        bad_words_ids=[[3]], num_beams=1, no_repeat_ngram_size=0, length_penalty=1.0,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert read_generation_config(tmp_path) == GenerationConfig(
        eos_ids=(1, 2),
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.1,
        max_new_tokens=99,
        repetition_penalty=1.05,
        not_honoured=("bad_words_ids=[[3]]",),
    )


def test_defaults_of_transformers_say_nothing(tmp_path: Path) -> None:
    transformers.GenerationConfig().save_pretrained(tmp_path)
    assert read_generation_config(tmp_path) == GenerationConfig()
    (tmp_path / "generation_config.json").unlink()
    assert read_generation_config(tmp_path) == GenerationConfig()


@pytest.mark.parametrize("neutral", [None, False, [], {}, "", 1, 0])
def test_neutral_values_are_not_reported(neutral: Any, tmp_path: Path, edit_json: Any) -> None:
    name = "min_length" if neutral == 0 and neutral is not False else "typical_p"
    edit_json(tmp_path / "generation_config.json", **{name: neutral})
    assert read_generation_config(tmp_path).not_honoured == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [("suppress_tokens", [5]), ("min_new_tokens", 3), ("invented", 2), ("num_beams", 4)],
)
def test_what_is_not_honoured_is_said(
    field: str, value: Any, tmp_path: Path, edit_json: Any
) -> None:
    edit_json(tmp_path / "generation_config.json", **{field: value})
    assert read_generation_config(tmp_path).not_honoured == (f"{field}={value}",)


def test_top_k_off_is_zero(tmp_path: Path, edit_json: Any) -> None:
    edit_json(tmp_path / "generation_config.json", top_k=-1, do_sample=False)
    read = read_generation_config(tmp_path)
    assert read.top_k == 0 and read.do_sample is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "hot"}, "temperature: got .hot., must be a number"),
        ({"temperature": float("nan")}, "temperature: got NaN"),
        ({"temperature": float("inf")}, "temperature: got Infinity"),
        ({"top_p": 0}, "top_p: got 0, must be a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": -1}, "min_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"eos_token_id": "</s>"}, "eos_token_id: got .*, must be a token id"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
    ],
)
def test_refusals(fields: Any, message: str, tmp_path: Path, edit_json: Any) -> None:
    edit_json(tmp_path / "generation_config.json", **fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_generation_config(tmp_path)
    assert "generation_config.json" in str(caught.value)
