"""The official client of OpenAI's API talks to the endpoint as to OpenAI's. `pip install openai` to run these."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.endpoint import NAME, Endpoint, Model, serving
from zconvert.checkpoint.load import prompt_ids
from zconvert.data.chat import asking_ids

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow

PROMPT = "ten tall trees"
MESSAGES = [{"role": "user", "content": "seven men"}]


@pytest.fixture(scope="module")
def endpoint(model: Model) -> Iterator[Endpoint]:
    with serving(model, batch_size=4, places=40, key="secret") as running:
        yield running


def client(endpoint: Endpoint, kind: str = "OpenAI", **options: Any) -> Any:
    options = {"api_key": "secret", "max_retries": 0, **options}
    return getattr(openai, kind)(base_url=f"http://127.0.0.1:{endpoint.port}/v1", **options)


def test_completions_and_chat_streamed_and_not(endpoint: Endpoint, model: Model) -> None:
    expected = model.greedy(prompt_ids(model.tokenizer, PROMPT), 20)
    with client(endpoint) as api:
        assert [card.id for card in api.models.list()] == [NAME]
        given = {"model": NAME, "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
        whole = api.completions.create(**given)
        assert whole.choices[0].text == expected
        assert whole.usage.completion_tokens == 20
        chunks = list(api.completions.create(**given, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
        assert chunks[-1].usage == whole.usage

        expected = model.greedy(asking_ids(MESSAGES, model.tokenizer), 20)
        given = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 20, "temperature": 0}
        answer = api.chat.completions.create(**given)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "length"
        streamed = api.chat.completions.create(**given, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected
        own = {"sampler": "mixed", "mix_weight": 0.3, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1}
        assert api.chat.completions.create(**given, extra_body=own).choices[0].message.role == "assistant"


def test_errors_are_the_clients_own_kinds(endpoint: Endpoint) -> None:
    with client(endpoint) as api:
        with pytest.raises(openai.NotFoundError) as missing:
            api.completions.create(model="gpt", prompt="a")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            api.completions.create(model=NAME, prompt="a", max_tokens=1000)
        assert wrong.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as unsupported:
            api.chat.completions.create(model=NAME, messages=MESSAGES, logprobs=True)
        assert unsupported.value.param == "logprobs"
    with client(endpoint, api_key="wrong") as api, pytest.raises(openai.AuthenticationError):
        api.models.list()


def test_32_clients_at_once_a_third_of_which_leave(endpoint: Endpoint, model: Model) -> None:
    prompts = [f"{PROMPT} {'and then ' * (number % 5)}{number}" for number in range(32)]

    async def one(number: int) -> str | None:
        async with client(endpoint, "AsyncOpenAI") as api:
            given = {"model": NAME, "prompt": prompts[number], "max_tokens": 30 + number, "temperature": 0}
            if number % 3 == 0:
                stream = await api.completions.create(**given, stream=True)
                async for _ in stream:
                    await stream.close()
                    return None
            if number % 3 == 1:
                stream = await api.completions.create(**given, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])
            return (await api.completions.create(**given)).choices[0].text

    async def all_of_them() -> list[str | None]:
        return await asyncio.gather(*map(one, range(32)))

    for number, text in enumerate(asyncio.run(all_of_them())):
        expected = model.greedy(prompt_ids(model.tokenizer, prompts[number]), 30 + number)
        assert text == (None if number % 3 == 0 else expected), number
    endpoint.wait_for(lambda: endpoint.idle)


def test_a_full_queue_is_the_clients_rate_limit_and_retried(endpoint: Endpoint) -> None:
    endpoint.gate.close()
    try:
        with client(endpoint) as api:
            streams = [api.completions.create(model=NAME, prompt=PROMPT, stream=True) for _ in range(40)]
            with pytest.raises(openai.RateLimitError) as full:
                api.completions.create(model=NAME, prompt=PROMPT)
            assert full.value.code == "queue_full"
            endpoint.gate.open()
            assert client(endpoint, max_retries=5).completions.create(model=NAME, prompt=PROMPT).choices
            for stream in streams:
                assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
    finally:
        endpoint.gate.open()
