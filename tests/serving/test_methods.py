"""The service's methods besides generating, called by a client over a real socket; chat prompts;
and that every bad value is refused by the name of its field."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tiny_checkpoint
from engines import at_rest, eventually, held
from google.protobuf.descriptor_pb2 import DescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from running import SERVICE, Running

from quire import LLM, SamplingParams, __version__
from quire.errors import InvalidRequest, Overloaded
from quire.protos.v1 import generation_pb2 as pb
from quire.sched.request import POOLED_SAMPLING, Request
from quire.sched.sampling_params import LIMITS
from quire.serving.frontend.embedding import embed_all
from quire.serving.frontend.wire import PROXY_NUMBERS

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick brown fox"},
]
PROMPT = "the quick brown fox"


def chat(*messages: Any, **more: Any) -> pb.ChatPrompt:
    return pb.ChatPrompt(messages=[pb.ChatMessage(**m) for m in messages or CHAT], **more)


def refused(call: Any) -> str:
    """The details of a call that is INVALID_ARGUMENT."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is StatusCode.INVALID_ARGUMENT, caught.value.details()
    return caught.value.details()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a model without a tokenizer."""
    folder = tiny_checkpoint.write(tmp_path_factory.mktemp("bare"), tokenizer=False)
    with Running(folder) as running:
        yield running.open()


# Chat


def test_a_chat_is_the_prompt_that_the_template_writes(served: Running, llm: LLM) -> None:
    sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    request = pb.GenerateRequest(chat=chat(), sampling=pb.SamplingParams(**sampling))
    (offline,) = llm.chat(CHAT, SamplingParams(**sampling))
    response = served.stub.Generate(request, timeout=60)
    assert response.text == offline.outputs[0].text
    assert response.usage.prompt_tokens == len(offline.prompt_token_ids)
    chunks = list(served.stub.StreamGenerate(request, timeout=60))
    assert "".join(chunk.text for chunk in chunks) == response.text
    tokenized = served.stub.Tokenize(pb.TokenizeRequest(chat=chat()), timeout=60)
    assert list(tokenized.token_ids) == offline.prompt_token_ids


TEMPLATE = "{{ [messages, tools, documents, add_generation_prompt, mood] | tojson }}"


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose chat template writes down all it got."""
    folder = tiny_checkpoint.write(tmp_path_factory.mktemp("telling"))
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    named = [{"name": "default", "template": TEMPLATE}, {"name": "other", "template": "other"}]
    config.write_text(json.dumps({**fields, "chat_template": named}))
    with Running(folder) as running:
        yield running.open()


def rendered(running: Running, prompt: pb.ChatPrompt) -> str:
    tokens = running.stub.Tokenize(pb.TokenizeRequest(chat=prompt), timeout=60).token_ids
    request = pb.DetokenizeRequest(token_ids=tokens, skip_special_tokens=False)
    return running.stub.Detokenize(request, timeout=60).text


def test_everything_of_a_chat_reaches_the_template(telling: Running) -> None:
    call = {"id": "c1", "name": "look", "arguments": '{"z": 1, "a": 2.5}'}
    prompt = chat(
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "reasoning_content": "so", "tool_calls": [pb.ToolCall(**call)]},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
        tools=['{"type": "function", "function": {"name": "look", "minimum": 1}}'],
        documents=['{"title": "t"}'],
        add_generation_prompt=False,
        template_args='{"mood": [true, null, 7]}',
    )
    text = rendered(telling, prompt)
    messages, tools, documents, generation, mood = json.loads(text)
    function = {"name": "look", "arguments": {"z": 1, "a": 2.5}}
    assert messages == [
        {"role": "user", "content": "hi", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "so",
            "thinking": "so",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "", "tool_call_id": "c1"},
    ]
    assert tools == [{"type": "function", "function": {"name": "look", "minimum": 1}}]
    assert '"minimum": 1}' in text and '"z": 1, "a": 2.5' in text  # whole numbers, in order
    assert (documents, generation, mood) == ([{"title": "t"}], False, [True, None, 7])
    assert json.loads(rendered(telling, chat(template_args='{"mood": 0}')))[1:] == [
        None, None, True, 0,
    ]  # fmt: skip
    assert rendered(telling, chat(template="other")) == "other"


# Tokenize, Detokenize


def test_tokenize(served: Running, llm: LLM) -> None:
    tokenizer = llm.parts.checkpoint.tokenizer
    for special in (None, True, False):
        request = pb.TokenizeRequest(text=PROMPT, return_tokens=True, add_special_tokens=special)
        response = served.stub.Tokenize(request, timeout=60)
        ids = tokenizer.encode(PROMPT, add_special_tokens=special is not False)
        assert list(response.token_ids) == ids
        assert list(response.tokens) == [tokenizer.id_to_token(i) for i in ids]
    assert not served.stub.Tokenize(pb.TokenizeRequest(text=PROMPT), timeout=60).tokens
    assert not served.stub.Tokenize(pb.TokenizeRequest(text=""), timeout=60).token_ids
    long = PROMPT * 2_000
    response = served.stub.Tokenize(pb.TokenizeRequest(text=long), timeout=60)
    assert list(response.token_ids) == tokenizer.encode(long)


@pytest.mark.parametrize("copies", [1, 1500])
def test_detokenize_is_the_way_back(served: Running, copies: int) -> None:
    text = "a 🦊 and a naïve résumé 你好" * copies
    ids = served.stub.Tokenize(pb.TokenizeRequest(text=text), timeout=60).token_ids
    assert served.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids), timeout=60).text == text
    assert served.stub.Detokenize(pb.DetokenizeRequest(), timeout=60).text == ""


def test_detokenize_leaves_special_tokens_out_unless_asked(served: Running, llm: LLM) -> None:
    (eos,) = llm.parts.checkpoint.eos_ids
    for skip, text in ((None, ""), (True, ""), (False, tiny_checkpoint.EOS_TEXT)):
        request = pb.DetokenizeRequest(token_ids=[eos], skip_special_tokens=skip)
        assert served.stub.Detokenize(request, timeout=60).text == text


def test_more_ids_or_text_than_a_model_could_take_are_refused(served: Running) -> None:
    ids = pb.DetokenizeRequest(token_ids=[5] * 200_000)
    says = refused(lambda: served.stub.Detokenize(ids, timeout=60))
    assert says == "token_ids: got 200000 ids, must be at most 131072"
    text = pb.TokenizeRequest(text=PROMPT * 200_000)
    says = refused(lambda: served.stub.Tokenize(text, timeout=60))
    assert says.startswith("text: got more than 131072 tokens")


# Embed


def test_embed_is_the_offline_embedding(served: Running, llm: LLM) -> None:
    prompts = [PROMPT, [1, 2, 3], "jumps", llm.chat_prompt(CHAT)]
    inputs = [
        pb.EmbedInput(text=PROMPT),
        pb.EmbedInput(token_ids=pb.TokenIds(ids=[1, 2, 3])),
        pb.EmbedInput(text="jumps"),
        pb.EmbedInput(chat=chat()),
    ]
    request = pb.EmbedRequest(inputs=inputs, request_id="mine", cache_salt="cold")
    response = served.stub.Embed(request, timeout=60)
    vectors = [list(entry.values) for entry in response.embeddings]
    np.testing.assert_allclose(vectors, llm.embed(prompts), atol=1e-5)
    lengths = [len(llm.parts.intake.tokens_of(p)) for p in prompts]
    assert [entry.prompt_tokens for entry in response.embeddings] == lengths
    assert response.usage == pb.Usage(prompt_tokens=sum(lengths))
    assert response.request_id == "mine"
    assert served.stub.Embed(pb.EmbedRequest(inputs=inputs[:1]), timeout=60).request_id
    at_rest(served.engine)


@pytest.mark.parametrize("may_wait", [200, 3])
def test_more_inputs_than_may_wait(folder: Path, may_wait: int) -> None:
    with Running(folder, max_queue=may_wait) as running:
        running.open()
        inputs = [pb.EmbedInput(token_ids=pb.TokenIds(ids=[i % 7 + 1])) for i in range(300)]
        response = running.stub.Embed(pb.EmbedRequest(inputs=inputs), timeout=120)
        got = [list(entry.values) for entry in response.embeddings]
        np.testing.assert_allclose(got, [got[i % 7] for i in range(300)], atol=1e-5)
        assert np.abs(np.array(got[0]) - got[1]).max() > 0.01
        at_rest(running.engine)


class Full:
    """A link to an engine whose queue is full."""

    def open(self, request: Request) -> Any:
        raise Overloaded("queue: full", retry_after=3.0)


def test_where_nobody_can_begin_the_call_is_refused() -> None:
    requests = [Request(id=str(i), prompt=(1,), sampling=POOLED_SAMPLING) for i in range(3)]
    with pytest.raises(Overloaded) as caught:
        asyncio.run(asyncio.wait_for(embed_all(Full(), requests), 20))  # type: ignore[arg-type]
    assert caught.value.retry_after == 3.0


def test_who_leaves_ends_all_inputs(served: Running) -> None:
    inputs = [pb.EmbedInput(text=PROMPT)] * 9
    with held(served.parts) as go:
        call = served.stub.Embed.future(pb.EmbedRequest(inputs=inputs), timeout=60)
        eventually(lambda: served.engine.stats().running > 0)
        call.cancel()
        go.set()
        at_rest(served.engine)


def test_one_bad_input_fails_the_call_and_says_which(served: Running) -> None:
    inputs = [pb.EmbedInput(text=PROMPT), pb.EmbedInput(token_ids=pb.TokenIds(ids=[99_999]))]
    before = served.engine.stats().finished
    details = refused(lambda: served.stub.Embed(pb.EmbedRequest(inputs=inputs), timeout=60))
    assert details.startswith("inputs[1]: prompt[0]: got 99999, must be ")
    assert served.engine.stats().finished == before


# GetModelInfo


def info(running: Running) -> pb.ModelInfo:
    return running.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=60)


def test_model_info(served: Running, folder: Path, llm: LLM) -> None:
    told, spec = info(served), llm.parts.runner.spec
    assert (told.name, told.version, told.dtype) == (str(folder), __version__, "float32")
    config = tiny_checkpoint.CONFIG
    assert told.architecture == config["model_type"]
    assert (told.vocab_size, told.embedding_size) == (config["vocab_size"], config["hidden_size"])
    assert (told.page_size, told.max_running) == (spec.page_size, spec.num_slots)
    assert told.kv_pages == served.engine.stats().pages_total
    assert tuple(told.eos_token_ids) == llm.parts.checkpoint.eos_ids
    assert told.has_tokenizer and told.has_chat_template
    assert list(told.chat_templates) == ["default"]
    assert list(told.capabilities) == [
        pb.CAPABILITY_GENERATE, pb.CAPABILITY_EMBED, pb.CAPABILITY_TEXT, pb.CAPABILITY_CHAT,
    ]  # fmt: skip


def test_model_info_of_a_model_without_a_tokenizer(bare: Running) -> None:
    told = info(bare)
    assert list(told.capabilities) == [pb.CAPABILITY_GENERATE, pb.CAPABILITY_EMBED]
    assert not told.has_tokenizer and not told.has_chat_template


def test_prompts_may_be_as_long_as_it_says(served: Running) -> None:
    told = info(served)

    def ask(tokens: int) -> Any:
        given = pb.EmbedInput(token_ids=pb.TokenIds(ids=[1] * tokens))
        return served.stub.Embed(pb.EmbedRequest(inputs=[given]), timeout=60)

    assert ask(told.max_embed_tokens).embeddings
    assert "inputs[0]: prompt: got" in refused(lambda: ask(told.max_embed_tokens + 1))

    def generate(tokens: int) -> Any:
        sampling = pb.SamplingParams(max_tokens=1)
        ids = pb.TokenIds(ids=[1] * tokens)
        request = pb.GenerateRequest(token_ids=ids, sampling=sampling)
        return served.stub.Generate(request, timeout=60)

    assert generate(told.context_limit - 1).token_ids
    assert "prompt: got" in refused(lambda: generate(told.context_limit))


def test_its_defaults_are_what_unset_means(served: Running) -> None:
    told = info(served).default_sampling
    assert not told.HasField("seed") and told.HasField("temperature")
    told.max_tokens = 8
    plain = pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(max_tokens=8))
    spelled = pb.GenerateRequest(text=PROMPT, sampling=told)
    got = [served.stub.Generate(request, timeout=60).text for request in (plain, spelled)]
    assert got[0] == got[1]


def _values(name: str, number: float) -> Any:
    """A value of a parameter that holds a number."""
    if name == "logit_bias":
        return {1: number}
    if name in ("stop_token_ids", "allowed_token_ids"):
        return (int(number),)
    if name == "bad_words":
        return ((int(number), 1),)
    return int(number) if isinstance(LIMITS[name].low, int) and name in WHOLE else number


WHOLE = ("top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "n", "best_of")


def test_its_limits_are_the_ones_that_hold(served: Running) -> None:
    told = {limit.field: limit for limit in info(served).limits}
    fields = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert set(told) == fields - {"seed", "ignore_eos", "skip_special_tokens"}
    intake = served.parts.intake

    def takes(name: str, value: Any) -> bool:
        others = {"max_tokens": None} if name == "min_tokens" else {}
        try:
            sampling = SamplingParams(**{**others, name: value})
            if name in ("stop_token_ids", "allowed_token_ids", "bad_words"):
                intake.request((1,), sampling)
        except InvalidRequest as error:
            assert str(error).startswith(name), error
            return False
        return True

    for name, limit in told.items():
        if limit.HasField("minimum"):
            assert takes(name, _values(name, limit.minimum)) is not limit.minimum_excluded
            below = -1 if name in WHOLE else limit.minimum - 1
            if name != "top_k":  # offline, -1 is off
                assert not takes(name, _values(name, below)), name
        if limit.HasField("maximum"):
            assert takes(name, _values(name, limit.maximum)), name
            assert not takes(name, _values(name, limit.maximum + 1)), name
    assert takes("stop", ("x" * told["stop"].max_characters,) * told["stop"].max_entries)
    assert not takes("stop", ("x" * (told["stop"].max_characters + 1),))
    assert not takes("stop", ("x",) * (told["stop"].max_entries + 1))
    assert not takes("logit_bias", dict.fromkeys(range(told["logit_bias"].max_entries + 1), 0.0))
    assert not takes("stop_token_ids", (1,) * (told["stop_token_ids"].max_entries + 1))
    assert not takes("bad_words", ("x" * (told["bad_words"].max_characters + 1),))
    assert not takes("bad_words", ((1,),) * (told["bad_words"].max_entries + 1))


# Bad values

LONG_NAME = "x" * 257

GENERATE: list[tuple[str, dict[str, Any]]] = [
    ("prompt: got none, must be text, token_ids or chat", {"text": None}),
    ("prompt: got no tokens", {"text": None, "token_ids": pb.TokenIds()}),
    ("prompt[0]: got 99999", {"text": None, "token_ids": pb.TokenIds(ids=[99_999])}),
    ("prompt: got", {"text": PROMPT * 2_000}),
    ("request_id: got '257 characters'", {"request_id": LONG_NAME}),
    ("tenant: got '257 characters'", {"tenant": LONG_NAME}),
    ("cache_salt: got '257 characters'", {"cache_salt": LONG_NAME}),
]

CHATS: list[tuple[str, dict[str, Any]]] = [
    ("chat.messages: got none", {"messages": []}),
    ("chat.messages[1].role: got ''", {"messages": [pb.ChatMessage(role="user"), {}]}),
    ("chat.messages[0].tool_calls[0].name: got ''",
     {"messages": [pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall()])]}),
    ("chat.messages[0].tool_calls[0].arguments: got '[]', must be a JSON object",
     {"messages": [pb.ChatMessage(role="assistant",
                                  tool_calls=[pb.ToolCall(name="f", arguments="[]")])]}),
    ("chat.tools[1]: got '{', must be a JSON object", {"tools": ["{}", "{"]}),
    ("chat.tools[0]: got '', must be a JSON object", {"tools": [""]}),
    ("chat.tools[0]: got '{\"a\": NaN}'", {"tools": ['{"a": NaN}']}),
    ("chat.documents[0]: got '3'", {"documents": ["3"]}),
    ("chat.template_args: got '[]'", {"template_args": "[]"}),
    ("chat.template_args: got \"one with 'messages'\"", {"template_args": '{"messages": 1}'}),
    ("chat.template_args: got \"one with 'self'\"", {"template_args": '{"self": 1}'}),
    ("template: got 'none', must be one of default", {"template": "none"}),
]  # fmt: skip

SAMPLING: list[tuple[str, Any]] = [
    ("temperature", -1.0),
    ("top_k", 2**32 - 1),
    ("top_p", 0.0),
    ("min_p", 1.5),
    ("max_tokens", 0),
    ("max_tokens", 100_000),
    ("min_tokens", 100_000),
    ("stop", [""]),
    ("stop_token_ids", [99_999]),
    ("logprobs", 21),
    ("repetition_penalty", 0.0),
    ("presence_penalty", 3.0),
    ("frequency_penalty", float("nan")),
    ("logit_bias", {1: 101.0}),
    ("logit_bias", {99_999: 1.0}),
    ("allowed_token_ids", pb.TokenIds()),
    ("bad_words", [pb.BadWord()]),
    ("prompt_logprobs", 21),
    ("n", 0),
    ("best_of", 129),
]
ANY_VALUE = {"seed", "ignore_eos", "skip_special_tokens"}


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_every_bad_value_of_a_request_is_refused_by_name(served: Running, method: str) -> None:
    def ask(**fields: Any) -> str:
        fields = {"text": PROMPT, **fields}
        request = pb.GenerateRequest(**{k: v for k, v in fields.items() if v is not None})
        call = getattr(served.stub, method)
        whole = method == "Generate"
        return refused(
            lambda: call(request, timeout=60) if whole else list(call(request, timeout=60))
        )

    for start, fields in GENERATE:
        assert ask(**fields).startswith(start)
    for start, fields in CHATS:
        prompt = pb.ChatPrompt(**{"messages": [pb.ChatMessage(role="user")], **fields})
        assert ask(text=None, chat=prompt).startswith(start)
    assert {name for name, _ in SAMPLING} | ANY_VALUE == {
        field.name for field in pb.SamplingParams.DESCRIPTOR.fields
    }
    for name, value in SAMPLING:
        details = ask(sampling=pb.SamplingParams(**{name: value}))
        assert details.startswith(name) and "must be " in details, details
    at_rest(served.engine)


def with_unknown(message: Any, number: int) -> Any:
    """As a caller of a newer API would send it: with another field, a varint of 5."""
    tag, spelled = number << 3, b""
    while tag > 127:
        spelled, tag = spelled + bytes([tag & 127 | 128]), tag >> 7
    return type(message).FromString(message.SerializeToString() + spelled + bytes([tag, 5]))


def test_a_field_that_the_server_does_not_know_is_not_dropped(served: Running) -> None:
    text = {"text": PROMPT}
    sampling = pb.SamplingParams(max_tokens=1)
    newer = with_unknown(sampling, 99)
    calls = {
        "field 99: got a value": [
            ("Generate", with_unknown(pb.GenerateRequest(**text), 99)),
            ("Tokenize", with_unknown(pb.TokenizeRequest(**text), 99)),
            ("Detokenize", with_unknown(pb.DetokenizeRequest(), 99)),
            ("Embed", with_unknown(pb.EmbedRequest(inputs=[pb.EmbedInput(**text)]), 99)),
            ("GetModelInfo", with_unknown(pb.GetModelInfoRequest(), 99)),
        ],
        "sampling.field 99: got": [("Generate", pb.GenerateRequest(**text, sampling=newer))],
        "inputs.field 2999: got": [
            ("Embed", pb.EmbedRequest(inputs=[with_unknown(pb.EmbedInput(**text), 2999)]))
        ],
        "chat.messages.field 99: got": [
            ("Tokenize", pb.TokenizeRequest(chat=pb.ChatPrompt(
                messages=[with_unknown(pb.ChatMessage(role="user"), 99)])))
        ],
    }  # fmt: skip
    for start, each in calls.items():
        for method, request in each:
            details = refused(lambda m=method, r=request: getattr(served.stub, m)(r, timeout=60))
            assert details.startswith(start), details
    for number in (PROXY_NUMBERS.start, PROXY_NUMBERS.stop - 1):
        passed = pb.GenerateRequest(**text, sampling=with_unknown(sampling, number))
        assert served.stub.Generate(with_unknown(passed, number), timeout=60).token_ids
    for message in (pb.GenerateRequest, pb.SamplingParams, pb.EmbedRequest):
        described = DescriptorProto()
        message.DESCRIPTOR.CopyToProto(described)
        (kept,) = described.reserved_range
        assert range(kept.start, kept.end) == PROXY_NUMBERS


def test_the_lists_of_bad_values_have_every_field() -> None:
    """A field that is added needs a bad value here, or a reason why it has none."""
    no_bad_value = {"priority", "sampling", "token_ids", "chat", "text"}
    first = {start.split(":")[0] for start, _ in GENERATE} | no_bad_value
    assert {f.name for f in pb.GenerateRequest.DESCRIPTOR.fields} <= first
    second = {key for _, fields in CHATS for key in fields} | {"add_generation_prompt"}
    assert {f.name for f in pb.ChatPrompt.DESCRIPTOR.fields} == second


@pytest.mark.parametrize(
    ("method", "request_", "start"),
    [
        ("Tokenize", pb.TokenizeRequest(), "prompt: got none, must be text or chat"),
        ("Tokenize", pb.TokenizeRequest(chat=pb.ChatPrompt()), "chat.messages: got none"),
        ("Tokenize", pb.TokenizeRequest(chat=chat(), add_special_tokens=True),
         "add_special_tokens: got True, must be unset with chat"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1, 2**32 - 1]),
         "token_ids[1]: got 4294967295, must be a whole number from 0 to "),
        ("Embed", pb.EmbedRequest(), "inputs: got '0 inputs', must be 1 to 2048"),
        ("Embed", pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")] * 2049),
         "inputs: got '2049 inputs', must be 1 to 2048"),
        ("Embed", pb.EmbedRequest(inputs=[pb.EmbedInput(text="x"), pb.EmbedInput()]),
         "inputs[1]: prompt: got none, must be text, token_ids or chat"),
        ("Embed", pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")], request_id=LONG_NAME),
         "request_id: got '257 characters'"),
        ("Embed", pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")], tenant=LONG_NAME),
         "tenant: got '257 characters'"),
        ("Embed", pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")], cache_salt=LONG_NAME),
         "cache_salt: got '257 characters'"),
    ],
)  # fmt: skip
def test_bad_values_of_other_methods(
    served: Running, method: str, request_: Any, start: str
) -> None:
    details = refused(lambda: getattr(served.stub, method)(request_, timeout=60))
    assert details.startswith(start), details


@pytest.mark.parametrize(
    ("method", "request_", "start"),
    [
        ("Tokenize", pb.TokenizeRequest(text="x"), "text: "),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1]), "token_ids: "),
        ("Generate", pb.GenerateRequest(text="x"), "prompt: "),
        ("Generate", pb.GenerateRequest(chat=chat()), "messages: "),
        ("Embed", pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")]), "inputs[0]: prompt: "),
    ],
)
def test_text_without_a_tokenizer(bare: Running, method: str, request_: Any, start: str) -> None:
    details = refused(lambda: getattr(bare.stub, method)(request_, timeout=60))
    assert details.startswith(start), details


def test_tools_find_the_contract_by_reflection(served: Running) -> None:
    found = ProtoReflectionDescriptorDatabase(served.channel)
    services = set(found.get_services())
    assert {SERVICE, "grpc.health.v1.Health"} <= services
    pool = DescriptorPool(found)
    methods = pool.FindServiceByName(SERVICE).methods_by_name
    assert set(methods) == set(pb.DESCRIPTOR.services_by_name["GenerationService"].methods_by_name)
    chunk = methods["StreamGenerate"].output_type
    assert chunk.fields_by_name["timing"].number == 10


def test_methods_that_are_not_open_yet(folder: Path) -> None:
    with Running(folder) as running:
        for call, request in (
            (running.stub.Tokenize, pb.TokenizeRequest(text="x")),
            (running.stub.Detokenize, pb.DetokenizeRequest(token_ids=[1])),
            (running.stub.Embed, pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")])),
            (running.stub.GetModelInfo, pb.GetModelInfoRequest()),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, timeout=60)
            assert caught.value.code() is StatusCode.UNAVAILABLE


def test_of_a_call_that_failed_nothing_large_is_kept(served: Running) -> None:
    """Until the collector runs: grpc ties the error that ended a call into a cycle with it."""

    def held() -> int:
        return sum(type(found) is pb.GenerateRequest for found in gc.get_objects())

    bad = {"temperature": -1.0}
    request = pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(**bad))
    large = pb.GenerateRequest(text=PROMPT * 2_000, sampling=pb.SamplingParams(**bad))
    gc.collect()
    before = held()
    gc.disable()
    try:
        for message in (request, large):
            refused(lambda: served.stub.Generate(message, timeout=60))  # noqa: B023
            refused(lambda: list(served.stub.StreamGenerate(message, timeout=60)))  # noqa: B023
        with pytest.raises(grpc.RpcError):
            served.stub.Generate(pb.GenerateRequest(text=PROMPT), timeout=0.001)
        eventually(lambda: held() == before)
    finally:
        gc.enable()
