"""Conversations over the server: what a template makes of them is completed as any other prompt is."""

from __future__ import annotations

import inspect
import json

import openai
import pytest

from model.folder import write_folder
from model.inference.chat import NEUTRAL, ChatRequest, ChatTemplate
from model.inference.engine import Engine
from model.inference.sampling import SamplingParams
from tests.helpers.serving import request, send, serving_folder, status
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.model.inference.test_serve import HTTP, LIMITS, OWN_FIELDS, serving

TEMPLATE = ChatTemplate(
    "{% for message in messages %}{% if message.content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    "{{ message.role[0] + ' ' + message.content + eos_token }}{% endfor %}{% if add_generation_prompt %}a {% endif %}",
    {"eos_token": "<eos>"},
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
PROMPT = "s be brief<eos>u hello<eos>a "
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    engine = Engine(tiny_model("expert-recursion_wise", 1), max_batch=8, kv_tokens=2400)
    with serving(engine, tiny_tokenizer(), LIMITS, template=TEMPLATE) as address:
        yield address, engine


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60)


def post(server, **fields):
    return HTTP.post(f"{server[0]}{PATH}", json={"messages": MESSAGES, "max_tokens": 4, "seed": 7} | fields)


def expected(**fields):
    ids = tiny_tokenizer().encode(PROMPT, add_special_tokens=False).ids
    params = SamplingParams(**({"max_tokens": 8} | fields), stop=[[0]])
    return Engine(tiny_model("expert-recursion_wise", 1)).generate([ids], params)[0]


def test_openai_client_whole_and_streamed(client):
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "logit_bias": {"0": -100}}
    request = expected(logit_bias={0: -100})
    text = tiny_tokenizer().decode(request.tokens)
    whole = client.chat.completions.create(**options)
    assert (whole.object, whole.choices[0].message.role, whole.choices[0].message.content) == (
        "chat.completion",
        "assistant",
        text,
    )
    assert whole.choices[0].finish_reason == "length" and len(text) == 8
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(request.prompt), 8)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and chunks[-1].usage == whole.usage
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1) and len(deltas) > 4
    assert "".join(delta.content for delta in deltas) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(deltas) - 1) + ["length"]


def test_choices_stops_and_parts_of_text(client):
    options = {"model": "tiny", "temperature": 0, "logit_bias": {"0": -100}}
    text = tiny_tokenizer().decode(expected(logit_bias={0: -100}).tokens)
    stopped = client.chat.completions.create(messages=MESSAGES, stop=text[3:5], max_completion_tokens=8, **options)
    assert stopped.choices[0].message.content == text[: text.find(text[3:5])]
    assert stopped.choices[0].finish_reason == "stop"
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    told = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    same = client.chat.completions.create(messages=told, max_tokens=8, n=2, **options)
    assert [choice.message.content for choice in same.choices] == [text, text]
    # Without a length an answer has what is left of the context.
    long = client.chat.completions.create(messages=MESSAGES, **options)
    assert long.usage.total_tokens == tiny_model("expert-recursion_wise", 1).config.max_position_embeddings


def test_log_probabilities_in_the_form_of_a_conversation(client):
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "logit_bias": {"0": -100}}
    request = expected(max_tokens=5, logprobs=3, logit_bias={0: -100})
    listed = client.chat.completions.create(logprobs=True, top_logprobs=3, **options).choices[0].logprobs.content
    assert [one.token for one in listed] == list(tiny_tokenizer().decode(request.tokens))
    assert all(bytes(one.bytes).decode() == one.token and len(one.top_logprobs) == 3 for one in listed)
    start = len(request.prompt)
    assert [one.logprob for one in listed] == pytest.approx([request.scores[start + i].logprob for i in range(5)])
    best = [[value for _, value in request.scores[start + i].top] for i in range(5)]
    assert [[top.logprob for top in one.top_logprobs] for one in listed] == [pytest.approx(row) for row in best]
    chunks = client.chat.completions.create(logprobs=True, top_logprobs=3, stream=True, **options)
    assert [one for chunk in chunks for one in chunk.choices[0].logprobs.content] == listed
    plain = client.chat.completions.create(logprobs=True, **options).choices[0].logprobs.content
    assert [(one.logprob, one.top_logprobs) for one in plain] == [(one.logprob, []) for one in listed]


def test_what_this_server_offers_beside_openai(server):
    mor = post(server, return_depth=True, return_flops=True, depth="cap:1").json()["choices"][0]["mor"]
    assert set(mor["depths"]) == {1} and mor["flops"] < mor["full_depth_flops"]


# field -> (neutral values, values that are honoured, values that are refused)
FIELDS = {
    "messages": ([], [MESSAGES, [{"role": "user", "content": "a", "name": "me"}]], [None, [], "a", ["a"], [{}]]),
    "model": ([None], ["tiny"], [3, "other"]),
    "frequency_penalty": ([None, 0], [2, -2], [2.1, "0"]),
    "logit_bias": ([None, {}], [{"3": 100}], [{"3": 101}, {"x": 1}, {"99": 1}]),
    "logprobs": ([None, False], [True], [2, "yes"]),
    "max_completion_tokens": ([None, 4], [], [0, -1, 1.5, 5]),
    "max_tokens": ([4], [None, 3], [0, -1, 1.5]),
    "n": ([None, 1], [2], [0, 5]),
    "presence_penalty": ([None, 0], [2], [-2.1]),
    "safety_identifier": ([None, "someone"], [], [3]),
    "seed": ([], [None, 0, -1], [1.5, "1"]),
    "stop": ([None, []], ["x", ["x", "y"]], ["", ["x"] * 17, "x" * 51, 3]),
    "stream": ([None, False], [True], ["true"]),
    "stream_options": ([None], [], [{"include_usage": True}]),
    "temperature": ([None, 1], [0, 2], [-1, 101, "1"]),
    "top_logprobs": ([None], [], [2, 21]),
    "top_p": ([None, 1], [0.5], [0, 1.1]),
    "user": ([None, "someone"], [], [3]),
    "audio": ([None], [], [{"voice": "alloy", "format": "wav"}]),
    "function_call": ([None, "none"], [], [{"name": "f"}]),
    "functions": ([None, []], [], [[{"name": "f"}]]),
    "metadata": ([None, {}], [], [{"a": "b"}]),
    "modalities": ([None, ["text"]], [], [["text", "audio"]]),
    "moderation": ([None], [], [{"model": "m"}]),
    "parallel_tool_calls": ([None, True], [], [False, 1]),
    "prediction": ([None], [], [{"type": "content", "content": "a"}]),
    "prompt_cache_key": ([None], [], ["key"]),
    "prompt_cache_options": ([None], [], [{}]),
    "prompt_cache_retention": ([None], [], ["24h"]),
    "reasoning_effort": ([None, "none"], [], ["high"]),
    "response_format": ([None, {"type": "text"}], [], [{"type": "json_object"}]),
    "service_tier": ([None, "auto", "default"], [], ["flex"]),
    "store": ([None, False], [], [True, 0]),
    "tool_choice": ([None, "none", "auto"], [], ["required"]),
    "tools": ([None, []], [], [[{"type": "function", "function": {"name": "f"}}]]),
    "verbosity": ([None, "medium"], [], ["low"]),
    "web_search_options": ([None], [], [{}]),
}


def test_every_field_of_openai_is_in_the_table():
    documented = set(inspect.signature(openai.resources.chat.completions.Completions.create).parameters)
    documented -= {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    if int(openai.__version__.split(".")[0]) < 3:  # the oldest client allowed knows fewer
        assert documented < set(FIELDS)
    else:
        assert documented == set(FIELDS)
    assert set(ChatRequest.model_fields) | set(NEUTRAL) == set(FIELDS) | OWN_FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_neutral_values_are_the_default_and_others_are_honoured_or_refused(server, name):
    neutral, honoured, refused = FIELDS[name]
    default = post(server).json()["choices"]
    for value in neutral:
        answer = post(server, **{name: value})
        assert answer.status_code == 200 and answer.json()["choices"] == default, (value, answer.text)
    for value in honoured:
        assert post(server, **{name: value}).status_code == 200, value
    for value in refused:
        answer = post(server, **{name: value})
        assert answer.status_code in (400, 404), (value, answer.text)
        error = answer.json()["error"]
        assert name in error["message"] and set(error) == {"message", "type", "param", "code"}, value


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "tool", "content": "a", "tool_call_id": "1"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "content"),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, "tool_calls"),
        ({"role": "user", "content": "no"}, "not this"),
        ({"role": "user", "content": "a" * 300}, "no room in the context"),
        ({"role": "user", "content": "a" * 10_000}, "than fit into the context"),
    ],
)
def test_messages_that_cannot_be_told_are_refused(server, message, fault):
    answer = post(server, messages=[message])
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
    assert fault in answer.json()["error"]["message"]
    many = post(server, messages=[{"role": "user", "content": ""}] * (LIMITS.messages + 1))
    assert many.status_code in (400, 413)
    headers = {"Content-Type": "application/json"}
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    surrogate = HTTP.post(f"{server[0]}{PATH}", content=body, headers=headers)
    assert surrogate.status_code == 400 and "surrogate" in surrogate.json()["error"]["message"]


def test_without_a_template_conversations_are_refused():
    engine = Engine(tiny_model("vanilla", 1), max_batch=4, kv_tokens=600)
    with serving(engine, tiny_tokenizer()) as address:
        answer = HTTP.post(f"{address}{PATH}", json={"messages": MESSAGES})
    assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "no chat template; use /v1/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kept", ["alone", "described", "by name"])
def test_templates_are_found_where_tokenizers_keep_them(tmp_path, kept):
    described = {"eos_token": {"content": "<eos>"}, "pad_token": None}
    if kept == "alone":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE.source)
    elif kept == "described":
        described["chat_template"] = TEMPLATE.source
    else:
        described["chat_template"] = [{"name": "default", "template": TEMPLATE.source}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    assert ChatTemplate.of(tmp_path) == TEMPLATE
    assert TEMPLATE.prompt(MESSAGES) == PROMPT
    assert ChatTemplate.of(tmp_path / "other") is None


@pytest.mark.slow
def test_the_command_serves_a_folder_with_a_template(tmp_path):
    """As `final/` and exports write one."""
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    described = {"eos_token": "<eos>", "chat_template": TEMPLATE.source}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    model = tiny_model("expert-recursion_wise", 1).float()
    write_folder(model, tmp_path / "final", tmp_path / "tokenizer.json")
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "logit_bias": {"0": -100}}
    with serving_folder(tmp_path / "final") as server:
        answer = send(server.port, request(body, PATH))
    assert status(answer) == 200
    text = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"]
    assert text == tiny_tokenizer().decode(expected(logit_bias={0: -100}).tokens)
