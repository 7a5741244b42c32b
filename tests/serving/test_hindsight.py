"""Going through a plan's steps over a text that is known is what decoding it by that plan was."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.checks import BLOCK
from tests.contracts.models import MASK
from tests.contracts.training import circular_texts, trained_pair
from zconvert.serving import hindsight
from zconvert.serving.hindsight import Scored, replay, score
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Request
from zconvert.tidar.engine import Engine, run
from zconvert.tidar.settings import TidarSettings

SETTINGS = TidarSettings(BLOCK, MASK)


def plan(sampling: Sampling = Sampling(), **choices: object) -> DecodePlan:  # noqa: B008  # frozen
    return DecodePlan.tidar(SETTINGS, sampling, frozenset(), **choices)  # type: ignore[arg-type]


PLANS = [plan(proposals=counts) for counts in [(1,), (2,), (1, 3), (2, 4), (1, 2, 3, 4)]] + [plan(two_forwards=True)]
PROMPTS = [circular_texts(1, 2 + i % 4, torch.Generator().manual_seed(i))[0].tolist() for i in range(12)]


@pytest.mark.parametrize("name", ["mixtral", "zaya_sliding"])
@pytest.mark.parametrize("chunk", [64, 5])
def test_a_replay_takes_the_forwards_that_decoding_took(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hindsight, "_CHUNK", chunk)
    model, told = trained_pair(name).layout, []
    for each in PLANS:
        for prompt in PROMPTS:
            result = next(run(Engine(model, each, max_batch=1), [Request(prompt, 30)]))
            text = score(model, PLANS[0], Sampling(), BLOCK, [*prompt, *result.tokens], len(result.tokens) + 1)
            outcome = replay([text], each)
            assert outcome.yielded == len(result.tokens) - 1  # the first token is the prefill's
            told.append((result.forwards, outcome.forwards))
    # Decoding plans otherwise for the last few tokens of a text.
    assert all(abs(took - replayed) <= 1 for took, replayed in told), told
    assert sum(took == replayed for took, replayed in told) > 0.8 * len(told)
    assert len({took for took, _ in told}) > 3, "the plans differ"


def test_sampled_drafts_pass_as_often_as_decoding_accepts_them() -> None:
    model, sampling = trained_pair("mixtral").layout, Sampling(temperature=1.3)
    each = plan(sampling, proposals=(1, 2, 3, 4))
    engine = Engine(model, each, max_batch=8)
    results = list(run(engine, [Request(PROMPTS[i % 12], 40, seed=i) for i in range(60)]))
    texts = [score(model, each, sampling, BLOCK, [*r.request.prompt, *r.tokens], len(r.tokens) + 1) for r in results]
    outcome = replay(texts, each)
    assert outcome.yielded / outcome.forwards == pytest.approx(
        sum(map(sum, (r.accepted for r in results))) / sum(r.forwards for r in results), rel=0.04
    )


def test_a_replay_by_hand() -> None:
    # Four tokens a block. Behind slot 0 of the block at token 1 two drafts are right, at token 4 none, at token 5 all.
    runs = [[0] * 4 for _ in range(10)]
    runs[1], runs[5] = [2, 1, 0, 0], [3, 2, 1, 0]
    runs[2] = [1, 0, 0, 0]
    text = Scored(runs)
    every, first = replay([text], plan(proposals=(1, 2, 3, 4))), replay([text], plan(proposals=(1,)))
    # every: 3 tokens from 1, 1 from 4, 4 from 5. first: 3 from 1 by block 2 (o = 2: 0 right), 1 from 4, then 4 from 5.
    assert (every.forwards, every.yielded) == (3, 8)
    assert (first.forwards, first.yielded) == (3, 8)
    assert every.processed == (4 + 4 * 4) * 3
    # first: the block at 2 gives one draft behind its slot 2, in a forward of 2 tokens and a block.
    assert first.processed == (4 + 4) + (2 + 4) + (4 + 4)
