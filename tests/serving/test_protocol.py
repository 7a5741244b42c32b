"""What a client sends becomes a request, or an error in the API's shape; never anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zconvert.serving.protocol import ApiError, Asked, Chat, Completion, parse

COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Once"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_NAMES = st.sampled_from(sorted({*Completion.model_fields, *Chat.model_fields, "logprobs", "tools", "user", "else"}))


def refused(body: bytes | dict[str, Any], kind: type[Asked] = Completion) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, kind)
    assert set(caught.value.body["error"]) == {"message", "type", "param", "code"}
    return caught.value


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sampled_from([Completion, Chat]), st.dictionaries(_NAMES, _VALUES, max_size=6))
def test_any_fields_make_a_request_or_an_api_error(kind: type[Asked], fields: dict[str, Any]) -> None:
    try:
        asked = parse({**(CHAT if kind is Chat else COMPLETION), **fields}, kind)
    except ApiError as raised:
        json.dumps(raised.body).encode()
        return
    assert asked.choices >= 1
    assert 0 <= asked.heat <= 2
    assert asked.new_tokens is None or asked.new_tokens >= 1


@given(st.binary(max_size=50) | st.text(max_size=50).map(str.encode))
@example(b"[" * 100_000)
@example(b'{"model": "m", "prompt": "\\ud800"}')
@example(b'{"model": "m", "prompt": "x", "temperature": NaN}')
def test_any_bytes_are_refused_as_a_clients_mistake(body: bytes) -> None:
    assert refused(body).status == 400


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": []}, "prompt", "expected a string"),
        ({"prompt": [[]]}, "prompt", "expected a string"),
        ({"prompt": [1, "a"]}, "prompt", "expected a string"),
        ({"prompt": [-1]}, "prompt", "expected a string"),
        ({"prompt": [True]}, "prompt", "expected a string"),
        ({"model": None}, "model", "model is None"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot'"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 1.5}, "n", "n is 1.5"),
        ({"n": True}, "n", "n is True"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"stop": [""]}, "stop", "none empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"logprobs": 3}, "logprobs", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"temperatur": 1}, "temperatur", "did you mean temperature?"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        ({"sampler": "fast"}, "sampler", "'lossless', 'mixed' or 'ar'"),
        ({"sampler": "lossless", "mix_weight": 0.5}, "mix_weight", "only sampler 'mixed'"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    error = refused({**COMPLETION, **fields})
    assert (error.status, error.param) == (400, param)
    assert message in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"content": "Hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"prompt": "Once"}, "prompt"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_is_wrong_in_a_chat_is_named(fields: dict[str, Any], param: str) -> None:
    assert refused({**CHAT, **fields}, Chat).param == param


def test_fields_that_ask_for_nothing_are_taken() -> None:
    nothing = {"logprobs": False, "tools": [], "presence_penalty": 0.0, "response_format": {"type": "text"}}
    nothing |= {"user": "me", "temperature": None, "n": None, "stop": None, "stream_options": None}
    assert parse({**CHAT, **nothing}, Chat) == parse(CHAT, Chat)


def test_prompts_and_choices_are_counted() -> None:
    assert parse({**COMPLETION, "prompt": [3, 4]}, Completion).prompt == ([3, 4],)
    assert parse({**COMPLETION, "prompt": ["a", [3]], "n": 3}, Completion).choices == 6
    assert parse({**CHAT, "n": 3}, Chat).choices == 3
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chat = parse({"model": "m", "messages": [{"role": "user", "content": parts}]}, Chat)
    assert chat.conversation == CHAT["messages"]


def test_lengths_and_temperatures_have_openais_defaults() -> None:
    assert parse(COMPLETION, Completion).new_tokens == 16
    assert parse(CHAT, Chat).new_tokens is None
    assert parse({**CHAT, "max_tokens": 3, "max_completion_tokens": 5}, Chat).new_tokens == 5
    assert parse(CHAT, Chat).heat == 1
    assert parse({**CHAT, "temperature": 1e-30}, Chat).heat == 0


def test_each_choice_has_a_seed_of_its_own() -> None:
    asked = parse({**COMPLETION, "seed": 2**63 - 1}, Completion)
    assert [asked.seed_of(0), asked.seed_of(1)] == [2**63 - 1, 0]
    assert parse(COMPLETION, Completion).seed_of(1) is None
