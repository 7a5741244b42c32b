"""A request costs what its size warrants, and an error says little of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from tests.serving.endpoint import NAME, Endpoint, Model, make_converted, serving
from zconvert.serving.protocol import ApiError, Asked, Chat, Completion, parse

MOST_SAID = 20_000
MANY = 10_000


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with serving(Model.load(make_converted(tmp_path_factory.mktemp("requests")))) as endpoint:
        yield endpoint


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Chat, {"messages": [7] * MANY}),
        (Chat, {"messages": [{}] * MANY}),
        (Chat, {"messages": [{"role": "user", **{f"x{n}": 0 for n in range(MANY)}}]}),
        (Completion, {"prompt": "a", **{f"x{n}": 0 for n in range(MANY)}}),
        (Completion, {"prompt": "a", "stream_options": {f"x{n}": 0 for n in range(MANY)}}),
        (Completion, {"prompt": [[]] * MANY}),
        (Completion, {"prompt": "a", "stop": [""] * MANY}),
    ],
)
def test_what_is_wrong_many_times_is_told_once(kind: type[Asked], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": NAME, **fields})
    assert caught.value.error_count() <= 3  # each is half a kilobyte, and a body has room for millions
    with pytest.raises(ApiError) as refused:
        parse(json.dumps({"model": NAME, **fields}).encode(), kind)
    assert len(json.dumps(refused.value.body)) < 500


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "m" * 1_000_000, "prompt": "a"}),
        ("/v1/completions", b'{"model": "tiny", "prompt": [1, ' + b"9" * 4_000 + b"]}"),
        ("/v1/models/" + "%00" * 20_000, None),
        ("/" + "%00" * 20_000, None),
        ("/v1/models/../../../../etc/passwd", None),
    ],
)
def test_a_name_of_megabytes_does_not_come_back(endpoint: Endpoint, path: str, body: Any) -> None:
    status, answer = endpoint.ask(path, body)
    assert status in (400, 404)
    assert len(json.dumps(answer)) < MOST_SAID


def test_the_host_that_a_client_names_is_no_part_of_the_metrics(endpoint: Endpoint) -> None:
    for host in ("[", "a/evil?", "a#evil", "a:99999999", "evil"):
        status, answer = endpoint.ask("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 1}, Host=host)
        assert status == 200, answer
    assert b"evil" not in endpoint.send("/metrics").read()


def test_no_value_that_is_accepted_loses_the_engine(endpoint: Endpoint) -> None:
    for fields in (
        {"top_k": 10**30},
        {"temperature": 1e-4, "repetition_penalty": 100},
        {"temperature": 2, "top_p": 5e-324, "min_p": 1, "top_k": 1},
        {"temperature": 2, "sampler": "mixed", "mix_weight": 0},
        {"temperature": 2, "repetition_penalty": 0.01, "seed": -(2**63), "n": 3},
        {"prompt": "<mask> tall <mask>"},
        {"prompt": ""},
        {"prompt": "\0\x1b\u202e"},
        {"stop": ["a" * 1_000_000] * 16},
    ):
        endpoint.complete(**{"prompt": "tall", "max_tokens": 4, **fields})
    assert endpoint.worker.state.alive
