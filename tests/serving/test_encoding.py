"""Which sampler a request gets, on servers that draft, mix, or decode one token a forward."""

from __future__ import annotations

from typing import Any

import pytest

from zconvert.serving.encoding import sampling_of
from zconvert.serving.protocol import ApiError, Completion, parse
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.generate import plan_of
from zconvert.tidar.settings import TidarSettings

SETTINGS = TidarSettings(mask_token="<mask>", mask_token_id=4, block_size=4)


def sampling(server: str, **fields: Any) -> Sampling:
    weight = 0.3 if server == "mixed" else None
    plan = plan_of(SETTINGS, Sampling(), frozenset(), sampler=server, mix_weight=weight)
    return sampling_of(parse({"model": "m", "prompt": "a", **fields}, Completion), plan)


@pytest.mark.parametrize(
    ("server", "fields", "weight"),
    [
        ("lossless", {}, 1),
        ("lossless", {"sampler": "lossless"}, 1),
        ("lossless", {"sampler": "mixed"}, 0.5),
        ("lossless", {"mix_weight": 0.2}, 0.2),
        ("mixed", {}, 0.3),
        ("mixed", {"sampler": "mixed"}, 0.3),
        ("mixed", {"sampler": "mixed", "mix_weight": 0.1}, 0.1),
        ("mixed", {"sampler": "lossless"}, 1),
        ("ar", {}, 1),
        ("ar", {"sampler": "ar"}, 1),
        ("ar", {"sampler": "lossless"}, 1),
    ],
)
def test_a_request_gets_its_own_sampler_or_the_servers(server: str, fields: dict[str, Any], weight: float) -> None:
    assert sampling(server, **fields).mix_weight == weight


@pytest.mark.parametrize(
    ("server", "fields"),
    [("lossless", {"sampler": "ar"}), ("ar", {"sampler": "mixed"}), ("ar", {"mix_weight": 0.5})],
)
def test_a_sampler_that_the_engine_does_not_do_is_refused(server: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        sampling(server, **fields)
    assert caught.value.param == "sampler"


def test_what_a_request_leaves_open_is_plain_sampling_and_the_rest_as_asked() -> None:
    assert sampling("lossless") == Sampling(temperature=1.0)
    asked = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    assert sampling("lossless", **asked) == Sampling(**asked)
