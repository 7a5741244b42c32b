"""The endpoint answers as OpenAI's API does, with the engine's own text; who leaves leaves nothing behind."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serving.endpoint import NAME, Endpoint, Model, events, serving
from zconvert.checkpoint.load import prompt_ids
from zconvert.data.chat import asking_ids
from zconvert.serving.protocol import MAX_BODY

PROMPT = "ten tall trees"
MESSAGES = [{"role": "user", "content": "seven men"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture
def held(model: Model) -> Iterator[Endpoint]:
    """A server of two places in the batch and three in all, whose engine waits."""
    with serving(model, batch_size=2, places=3) as running:
        running.gate.close()
        yield running


def open_stream(endpoint: Endpoint, **fields: Any) -> Iterator[Any]:
    """A completion's events."""
    body = {"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 40, "stream": True, **fields}
    response = endpoint.send(COMPLETIONS, body)
    assert response.status == 200, response.read()
    return events(response)


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk != "[DONE]" and chunk["choices"])


def test_greedy_completions_are_the_decode_loops_text_streamed_or_not(endpoint: Endpoint, model: Model) -> None:
    ids = prompt_ids(model.tokenizer, PROMPT)
    expected = model.greedy(ids, 20)
    answer = endpoint.complete(prompt=PROMPT, max_tokens=20)
    assert answer["object"] == "text_completion"
    assert answer["model"] == NAME
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert usage["completion_tokens"] == 20
    assert usage["total_tokens"] == len(ids) + 20
    assert 19 / 4 <= usage["forwards"] <= 19
    assert endpoint.complete(prompt=ids, max_tokens=20)["choices"][0]["text"] == expected

    chunks = list(open_stream(endpoint, max_tokens=20, stream_options={"include_usage": True}))
    assert chunks[-1] == "[DONE]"
    assert text_of(chunks) == expected
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == usage
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-2]] == [None] * (len(chunks) - 3) + ["length"]
    assert "usage" not in next(open_stream(endpoint))


def test_chat_is_the_templates_prompt_and_the_decode_loops_text(endpoint: Endpoint, model: Model) -> None:
    ids = asking_ids(MESSAGES, model.tokenizer)
    expected = model.greedy(ids, 12)
    body = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    status, answer = endpoint.ask(CHAT, body)
    assert status == 200, answer
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert answer["usage"]["prompt_tokens"] == len(ids)

    chunks = list(events(endpoint.send(CHAT, {**body, "stream": True})))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == expected
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert {chunk["object"] for chunk in chunks[:-1]} == {"chat.completion.chunk"}


def test_a_chat_without_a_length_may_fill_the_context(endpoint: Endpoint, model: Model) -> None:
    status, answer = endpoint.ask(CHAT, {"model": NAME, "messages": MESSAGES, "temperature": 0})
    assert status == 200
    assert answer["usage"]["total_tokens"] <= 256
    if answer["choices"][0]["finish_reason"] == "length":
        assert answer["usage"]["total_tokens"] == 256


def test_several_prompts_and_choices_come_back_in_order(endpoint: Endpoint) -> None:
    prompts = [PROMPT, "seven more men", "sing"]
    alone = [endpoint.complete(prompt=prompt, max_tokens=9)["choices"][0]["text"] for prompt in prompts]
    answer = endpoint.complete(prompt=prompts, max_tokens=9, n=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == [text for text in alone for _ in range(2)]


def test_sampled_text_follows_the_seed_choice_by_choice(endpoint: Endpoint) -> None:
    def sampled(**fields: Any) -> list[str]:
        given = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.5, "top_p": 0.9, **fields}
        return [choice["text"] for choice in endpoint.complete(**given)["choices"]]

    assert sampled(seed=7, n=3) == sampled(seed=7) + sampled(seed=8) + sampled(seed=9)
    assert sampled(seed=7) != sampled(seed=8)
    assert sampled(seed=7, sampler="mixed", mix_weight=0.2, top_k=8, min_p=0.01, repetition_penalty=1.2)


def test_text_ends_before_a_stop_string_streamed_or_not(endpoint: Endpoint, model: Model) -> None:
    whole = endpoint.complete(prompt=PROMPT, max_tokens=40)["choices"][0]["text"]
    stop = whole[7:10]
    expected = whole[: whole.index(stop)]
    choice = endpoint.complete(prompt=PROMPT, max_tokens=40, stop=["nowhere", stop])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    chunks = list(open_stream(endpoint, stop=stop))
    assert text_of(chunks) == expected
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_32_clients_at_once_get_what_each_would_get_alone(endpoint: Endpoint, model: Model) -> None:
    prompts = [f"{PROMPT} {'and then ' * (number % 7)}{number}" for number in range(32)]
    texts: dict[int, str] = {}

    def client(number: int) -> None:
        if number % 2:
            texts[number] = text_of(list(open_stream(endpoint, prompt=prompts[number], max_tokens=5 + number)))
        else:
            answer = endpoint.complete(prompt=prompts[number], max_tokens=5 + number)
            texts[number] = answer["choices"][0]["text"]

    threads = [threading.Thread(target=client, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, prompt in enumerate(prompts):
        assert texts[number] == model.greedy(prompt_ids(model.tokenizer, prompt), 5 + number), number
    endpoint.wait_for(lambda: endpoint.idle)


def has_left(endpoint: Endpoint) -> bool:
    """The server has noticed that a client left. (The engine may wait at the gate: the server does not.)"""
    return f'zconvert_requests_total{{path="{COMPLETIONS}",status="499"}} 1.0' in told_metrics(endpoint)


def told_metrics(endpoint: Endpoint) -> str:
    return endpoint.send("/metrics").read().decode()


def test_a_client_that_leaves_a_stream_frees_its_row(held: Endpoint) -> None:
    leaving = open_stream(held)
    connection = held.closing[-1]
    held.gate.let(1)
    next(leaving)
    leaving.close()
    connection.close()
    held.wait_for(lambda: has_left(held))
    assert held.worker.state.counters.requests == 0
    held.gate.let(2)  # the step that waits there, and the one that frees the row
    held.wait_for(lambda: held.worker.state.counters.requests == 1)
    held.wait_for(lambda: held.idle)
    assert held.worker.state.counters.tokens <= 1 + 2 * 4  # it went no further than that step
    held.gate.open()
    assert held.complete(prompt=[PROMPT] * 3, max_tokens=5)["usage"]["completion_tokens"] == 15


def test_a_client_that_leaves_while_it_waits_gives_its_place_back(held: Endpoint) -> None:
    streams = [open_stream(held), open_stream(held)]
    held.gate.let(1)
    next(streams[0])
    body = json.dumps({"model": NAME, "prompt": PROMPT}).encode()
    leaving = http.client.HTTPConnection("127.0.0.1", held.port)
    leaving.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
    held.wait_for(lambda: held.ask(COMPLETIONS, body)[0] == 429)
    leaving.close()
    held.wait_for(lambda: has_left(held))
    held.gate.open()
    left, whole = [text_of(list(stream)) for stream in streams], held.complete(prompt=PROMPT, max_tokens=40)
    assert left[1] == whole["choices"][0]["text"]
    held.wait_for(lambda: held.idle)
    assert held.worker.state.counters.requests == 3  # the one who waited never came into the batch


def test_a_full_queue_turns_clients_away_and_takes_them_again_later(held: Endpoint) -> None:
    streams = [open_stream(held) for _ in range(3)]
    response = held.send(COMPLETIONS, {"model": NAME, "prompt": PROMPT})
    assert response.status == 429
    assert int(response.headers["retry-after"]) >= 1
    error = json.loads(response.read())["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    held.gate.open()
    assert len({text_of(list(stream)) for stream in streams}) == 1
    assert held.complete(prompt=[PROMPT] * 3, max_tokens=2)
    status, answer = held.ask(COMPLETIONS, {"model": NAME, "prompt": PROMPT, "n": 4})
    assert (status, answer["error"]["param"]) == (400, "n")


def test_what_takes_too_long_is_ended_and_said_so(model: Model) -> None:
    with serving(model, timeout=0.3) as endpoint:
        endpoint.gate.close()
        response = endpoint.send(COMPLETIONS, {"model": NAME, "prompt": PROMPT})
        assert response.status == 504
        assert response.headers["x-should-retry"] == "false"
        assert json.loads(response.read())["error"]["code"] == "timeout"
        (event,) = open_stream(endpoint)
        assert event["error"]["code"] == "timeout"
        endpoint.gate.open()
        endpoint.wait_for(lambda: endpoint.idle)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        (COMPLETIONS, b"{", 400, None, "invalid_json"),
        (COMPLETIONS, b"[]", 400, None, "invalid_json"),
        (COMPLETIONS, b"\xff\xfe", 400, None, "invalid_json"),
        (COMPLETIONS, {"model": NAME}, 400, "prompt", "missing_required_parameter"),
        (COMPLETIONS, {"model": "gpt", "prompt": "a"}, 404, "model", "model_not_found"),
        (COMPLETIONS, {"model": NAME, "prompt": "a", "max_tokens": "many"}, 400, "max_tokens", "invalid_value"),
        (COMPLETIONS, {"model": NAME, "prompt": "a", "logprobs": 2}, 400, "logprobs", "unsupported_parameter"),
        (COMPLETIONS, {"model": NAME, "prompt": "a", "sampler": "ar"}, 400, "sampler", "unsupported_parameter"),
        (COMPLETIONS, {"model": NAME, "prompt": "a", "max_tokens": 256}, 400, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"model": NAME, "prompt": [9] * 256}, 400, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"model": NAME, "prompt": [64]}, 400, "prompt", "invalid_value"),
        (CHAT, {"model": NAME, "messages": [{"role": "nobody", "content": "a"}]}, 400, "messages", "invalid_value"),
        (CHAT, {"model": NAME, "messages": [{"role": "user"}] * 200}, 400, "messages", "context_length_exceeded"),
        (CHAT, {"model": NAME, "messages": MESSAGES, "tools": [1]}, 400, "tools", "unsupported_parameter"),
        ("/v1/models", b"{}", 405, None, None),
        ("/v1/models/gpt", None, 404, "model", "model_not_found"),
        ("/v1/else", None, 404, None, None),
    ],
)
def test_wrong_input_gets_the_apis_own_error(
    endpoint: Endpoint, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    told, answer = endpoint.ask(path, body)
    assert told == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert (answer["error"]["param"], answer["error"]["code"]) == (param, code)
    assert answer["error"]["type"] == "invalid_request_error"


def test_bodies_are_json_of_bounded_size(endpoint: Endpoint) -> None:
    assert endpoint.ask(COMPLETIONS, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    status, answer = endpoint.ask(COMPLETIONS, b" " * (MAX_BODY + 1))
    assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
    assert endpoint.complete(prompt=PROMPT)


def test_the_model_is_listed(endpoint: Endpoint) -> None:
    status, answer = endpoint.ask("/v1/models")
    assert status == 200
    assert [card["id"] for card in answer["data"]] == [NAME]
    assert endpoint.ask(f"/v1/models/{NAME}")[1]["object"] == "model"


def test_a_key_is_asked_for_where_there_is_one(model: Model) -> None:
    with serving(model, key="secret") as endpoint:
        assert endpoint.complete(prompt=PROMPT)
        for wrong in ("Bearer wrong", "Basic secret", "secret", "Bearer"):
            status, answer = endpoint.ask(COMPLETIONS, {"model": NAME, "prompt": PROMPT}, Authorization=wrong)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        endpoint.key = None
        assert endpoint.ask("/v1/models")[0] == 401
        assert endpoint.ask("/health")[0] == 200


def test_health_and_metrics_tell_how_it_is(endpoint: Endpoint) -> None:
    assert endpoint.ask("/health") == (200, {"status": "ok"})
    endpoint.wait_for(lambda: endpoint.idle)
    endpoint.complete(prompt=PROMPT, max_tokens=10)
    endpoint.wait_for(lambda: endpoint.idle)
    told = dict(line.rsplit(" ", 1) for line in told_metrics(endpoint).splitlines() if not line.startswith("#"))
    counters = endpoint.worker.state.counters
    assert float(told["zconvert_tokens_total"]) == counters.tokens >= 10
    assert float(told["zconvert_forwards_total"]) == counters.forwards
    assert float(told["zconvert_texts_running"]) == 0
    assert float(told[f'zconvert_requests_total{{path="{COMPLETIONS}",status="200"}}']) >= 1
    assert sum(float(value) for name, value in told.items() if name.startswith("zconvert_accepted_total")) > 0


def test_a_forward_that_fails_is_an_error_and_the_next_request_is_answered(model: Model) -> None:
    with serving(model) as endpoint:
        expected = endpoint.complete(prompt=PROMPT, max_tokens=9)["choices"]
        tokens = endpoint.worker.state.counters.tokens
        endpoint.gate.failures = 1
        status, answer = endpoint.ask(COMPLETIONS, {"model": NAME, "prompt": PROMPT})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert endpoint.complete(prompt=PROMPT, max_tokens=9)["choices"] == expected
        assert endpoint.worker.state.counters.tokens >= tokens
        assert endpoint.ask("/health")[0] == 200


def test_an_engine_that_fails_again_and_again_is_given_up(model: Model) -> None:
    with serving(model) as endpoint:
        endpoint.gate.failures = 3
        for _ in range(3):
            assert endpoint.ask(COMPLETIONS, {"model": NAME, "prompt": PROMPT})[0] == 500
        endpoint.wait_for(lambda: not endpoint.worker.state.alive)
        assert endpoint.ask("/health")[0] == 503
        assert endpoint.ask(COMPLETIONS, {"model": NAME, "prompt": PROMPT})[0] == 503


def test_running_texts_are_finished_when_the_server_stops(model: Model) -> None:
    with serving(model) as endpoint:
        endpoint.gate.close()
        stream = open_stream(endpoint, max_tokens=12)
        endpoint.gate.let(2)
        first = next(stream)
        endpoint.stop()
        endpoint.gate.open()
        chunks = [first, *stream]
        assert chunks[-1] == "[DONE]"
        assert text_of(chunks) == model.greedy(prompt_ids(model.tokenizer, PROMPT), 12)


def test_texts_that_outlast_the_time_of_grace_are_ended(model: Model) -> None:
    with serving(model, grace=0) as endpoint:
        endpoint.gate.close()
        stream = open_stream(endpoint, max_tokens=240)
        endpoint.gate.let(1)
        next(stream)
        endpoint.stop()
        endpoint.wait_for(lambda: not listens(endpoint))
        endpoint.gate.open()
        assert list(stream)[-1]["error"]["code"] == "text_cancelled"


def listens(endpoint: Endpoint) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", endpoint.port)) == 0


@pytest.mark.slow
def test_hundreds_of_clients_of_all_kinds_are_answered_and_no_place_is_lost(model: Model) -> None:
    chance = random.Random(0)
    kinds = [chance.choice(["whole", "stream", "stop", "leaves", "leaves early", "wrong"]) for _ in range(400)]
    lengths = [chance.randint(1, 40) for _ in kinds]
    whole = model.greedy(prompt_ids(model.tokenizer, PROMPT), 40)
    failures: list[tuple[int, str, object]] = []

    def client(number: int) -> None:
        kind, count = kinds[number], lengths[number]
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": count, "temperature": 0}
        try:
            if kind == "whole":
                assert whole.startswith(endpoint.complete(**body)["choices"][0]["text"])
            elif kind == "stream":
                assert whole.startswith(text_of(list(open_stream(endpoint, max_tokens=count))))
            elif kind == "stop":
                assert whole[9:11] not in endpoint.complete(**body, stop=whole[9:11])["choices"][0]["text"]
            elif kind == "wrong":
                assert endpoint.ask(COMPLETIONS, {**body, "n": "many"})[0] == 400
            else:
                connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=60)
                connection.request(
                    "POST", COMPLETIONS, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
                )
                if kind == "leaves":
                    connection.getresponse().readline()
                connection.close()
        except Exception as error:
            failures.append((number, kind, error))

    with serving(model, batch_size=4, places=len(kinds)) as endpoint:
        with ThreadPoolExecutor(32) as clients:
            list(clients.map(client, range(len(kinds))))
        assert not failures
        endpoint.wait_for(lambda: endpoint.idle)
        every_place = endpoint.complete(prompt=[PROMPT] * len(kinds), max_tokens=1)
        assert len(every_place["choices"]) == len(kinds)
        assert endpoint.ask("/health")[0] == 200
