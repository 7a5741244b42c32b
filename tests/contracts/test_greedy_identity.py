"""Greedy decoding gives the text that plain transformers generates, whatever is drafted, accepted or rejected."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from tests.contracts.checks import BLOCK
from tests.contracts.models import MASK, Pair, pair_of, random_ids
from tests.contracts.training import CYCLE, circular_texts, trained_pair
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.cache import GROWTH
from zconvert.tidar.decoding import DecodePlan, Request, Step
from zconvert.tidar.engine import Engine, decode
from zconvert.tidar.engine import run as run_engine
from zconvert.tidar.settings import TidarSettings

NEW_TOKENS = 20
PROMPT_LENGTHS = (1, 2, 5, 30)  # the last is past the window
PROPOSALS = ((1, 2, 3, 4), (1, 3), (4,), (2,), (1,))


def generated(pair: Pair, prompt: list[int], new_tokens: int = NEW_TOKENS, **options: float) -> list[int]:
    """What plain transformers answers."""
    ids = torch.tensor([prompt])
    text = pair.plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        suppress_tokens=[MASK],
        pad_token_id=0,
        **options,
    )
    return text[0, len(prompt) :].tolist()


def run(
    pair: Pair,
    prompt: list[int],
    proposals: tuple[int, ...],
    size: int = BLOCK,
    new_tokens: int = NEW_TOKENS,
    sampling: Sampling | None = None,
) -> list[Step]:
    plan = DecodePlan.tidar(TidarSettings(size, MASK), sampling or Sampling(), frozenset(), proposals=proposals)
    return list(decode(pair.layout, prompt, plan, new_tokens))


def text_of(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


def prompts(length: int) -> list[list[int]]:
    walk = circular_texts(1, length, torch.Generator().manual_seed(length))[0].tolist()
    return [random_ids((length,), seed=20 + length).tolist(), walk]


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_greedy_text_is_that_of_transformers_on_random_weights(pair: Pair, length: int) -> None:
    prompt = prompts(length)[0]
    expected = generated(pair, prompt)
    assert len(set(expected)) >= 5, "a text that repeats itself proves little"
    for proposals in PROPOSALS[:3]:
        assert text_of(run(pair, prompt, proposals)) == expected, proposals


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_greedy_text_is_that_of_transformers_on_trained_weights(trained: Pair, length: int) -> None:
    for prompt in prompts(length):
        expected = generated(trained, prompt)
        for proposals in PROPOSALS:
            assert text_of(run(trained, prompt, proposals)) == expected, proposals


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_so_it_is_with_a_repetition_penalty_where_drafts_are_accepted(penalty: float) -> None:
    trained, accepted = trained_pair("mixtral"), []
    for prompt in (*prompts(2), *prompts(5)):
        expected = generated(trained, prompt, repetition_penalty=penalty)
        steps = run(trained, prompt, PROPOSALS[0], sampling=Sampling(repetition_penalty=penalty))
        assert text_of(steps) == expected
        accepted += [step.accepted for step in steps[1:]]
    assert sum(accepted) / len(accepted) > 1.5


def test_trained_weights_accept_and_reject(trained: Pair) -> None:
    accepted = []
    for length in PROMPT_LENGTHS:
        for prompt in prompts(length):
            steps = run(trained, prompt, PROPOSALS[0])
            accepted += [step.accepted for step in steps[1:-1]]  # not the prefill; the last may be cut by the length
    assert max(accepted) == BLOCK
    assert sum(accepted) / len(accepted) > 1.5
    assert accepted.count(1) >= 3, "rejections of the first draft"
    assert any(1 < n < BLOCK for n in accepted), "rejections in the middle"


def test_random_weights_reject_nearly_everything(pair: Pair) -> None:
    accepted = [step.accepted for length in PROMPT_LENGTHS for step in run(pair, prompts(length)[0], PROPOSALS[0])[1:]]
    assert sum(accepted) / len(accepted) < 1.5


@pytest.mark.parametrize("size", [2, 8, 16])
def test_greedy_text_does_not_depend_on_the_block_size(pair: Pair, size: int) -> None:
    prompt = prompts(5)[0]
    steps = run(pair, prompt, tuple(range(1, size + 1)), size)
    assert text_of(steps) == generated(pair, prompt)


def test_plain_decoding_through_the_same_loop_is_that_of_transformers(pair: Pair) -> None:
    plan = DecodePlan.autoregressive(MASK, Sampling(), frozenset())
    expected = {}
    for length in PROMPT_LENGTHS:
        prompt = prompts(length)[0]
        steps = list(decode(pair.layout, prompt, plan, NEW_TOKENS))
        expected[length] = generated(pair, prompt)
        assert text_of(steps) == expected[length]
        assert [step.tokens_in_forward for step in steps] == [length] + [1] * (NEW_TOKENS - 1)
    # Side by side too, where rows are of unequal length.
    requests = [Request(prompts(length)[0], NEW_TOKENS, key=length) for length in PROMPT_LENGTHS]
    together = run_engine(Engine(pair.layout, plan), requests)
    assert {result.request.key: result.tokens for result in together} == expected


def test_eager_attention_decodes_the_same_text(trained: Pair) -> None:
    prompt = prompts(30)[1]
    expected = generated(trained, prompt)
    model = trained.layout.model
    model.set_attn_implementation("eager")
    try:
        assert text_of(run(trained, prompt, PROPOSALS[0])) == expected
    finally:
        model.set_attn_implementation("sdpa")


def test_a_text_longer_than_the_cache_reserves_at_first_is_decoded_the_same() -> None:
    trained = trained_pair("zaya_sliding")
    prompt = prompts(5)[1]
    expected = generated(trained, prompt, GROWTH + 4)
    assert text_of(run(trained, prompt, PROPOSALS[0], new_tokens=GROWTH + 4)) == expected


def test_bfloat16_weights_decode_the_text_that_they_were_trained_on(trained: Pair) -> None:
    # Rounding differs between batch shapes, so identity is promised in float32 only; a sure model is not swayed by it.
    half = pair_of(trained.name, deepcopy(trained.plain).to(torch.bfloat16))
    walk = [2 * i % CYCLE for i in range(9 + NEW_TOKENS)]
    steps = run(half, walk[:9], PROPOSALS[0])
    assert text_of(steps) == walk[9:]
    assert max(step.accepted for step in steps) == BLOCK
