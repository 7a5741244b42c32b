"""How a decoding ends, what it reports, and what mixing does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.contracts.checks import BLOCK
from tests.contracts.models import MASK, Pair, make_model, pair_of, shared_random_pair
from tests.contracts.training import trained_pair
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Step
from zconvert.tidar.engine import decode
from zconvert.tidar.settings import TidarSettings

SETTINGS = TidarSettings(BLOCK, MASK)
WALK = [*range(12), 0, 1, 2]  # round the circle by 1
UNUSED = 62


def run(
    pair: Pair,
    prompt: list[int],
    new_tokens: int,
    sampling: Sampling | None = None,
    eos: frozenset[int] = frozenset(),
    seed: int = 0,
    draft_temperature: float = 1.0,
    **plan: Any,
) -> list[Step]:
    decoding = DecodePlan.tidar(SETTINGS, sampling or Sampling(), eos, **plan)
    decoding = replace(decoding, draft_temperature=draft_temperature)
    return list(decode(pair.layout, prompt, decoding, new_tokens, torch.Generator().manual_seed(seed)))


def text_of(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


@pytest.fixture(scope="module")
def walker() -> Pair:
    """A trained model that accepts nearly all drafts after WALK."""
    return trained_pair("mixtral")


def generate(pair: Pair, prompt: list[int], new_tokens: int, eos: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "suppress_tokens": [MASK], "pad_token_id": UNUSED, "eos_token_id": eos}
    text = pair.plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
    return text[0, len(prompt) :].tolist()


def test_the_text_ends_with_the_first_end_token_wherever_it_falls_in_a_step(walker: Pair) -> None:
    reference = text_of(run(walker, WALK, 11))
    assert len(set(reference)) == 11, "every token of the circle once, so that each can be the end"
    inside_accepted_drafts = 0
    for place, token in enumerate(reference):
        steps = run(walker, WALK, 40, eos=frozenset({token, UNUSED}))
        assert text_of(steps) == reference[: place + 1]
        inside_accepted_drafts += len(steps[-1].tokens) < steps[-1].accepted
    assert inside_accepted_drafts >= 3


def test_the_first_of_several_end_tokens_counts_as_in_transformers(walker: Pair) -> None:
    reference = text_of(run(walker, WALK, 11))
    eos = [reference[8], reference[5]]
    assert text_of(run(walker, WALK, 40, eos=frozenset(eos))) == generate(walker, WALK, 40, eos) == reference[:6]


def test_an_end_token_in_the_prompt_ends_nothing(walker: Pair) -> None:
    assert len(text_of(run(walker, [3, *WALK], 3, eos=frozenset({WALK[0], 11})))) == 3


@pytest.mark.parametrize("proposals", [(1, 2, 3, 4), (1, 3)], ids=str)
def test_a_text_has_exactly_the_length_asked_for(walker: Pair, proposals: tuple[int, ...]) -> None:
    reference = text_of(run(walker, WALK, 14))
    for length in range(1, 14):
        steps = run(walker, WALK, length, proposals=proposals)
        assert text_of(steps) == reference[:length]
        assert all(step.tokens for step in steps)


def test_steps_report_what_was_accepted_and_processed(walker: Pair) -> None:
    prefill, *steps = run(walker, WALK, 30, proposals=(2, 4))
    assert (prefill.accepted, len(prefill.tokens), prefill.tokens_in_forward) == (0, 1, len(WALK) + BLOCK)
    assert all(1 <= step.accepted <= BLOCK for step in steps)
    assert all(len(step.tokens) == step.accepted for step in steps[:-1])
    assert max(step.tokens_in_forward for step in steps) == BLOCK + 2 * BLOCK
    assert steps[0].accepted == BLOCK


def test_without_drafts_a_block_is_planned_for_one_token_though_the_set_lacks_it() -> None:
    # Random weights accept one token a step, and proposals for four are of no use then: every other step has no draft.
    steps = run(shared_random_pair("mixtral"), [5, 9, 2], 12, proposals=(4,))
    assert {step.accepted for step in steps[1:]} == {1}
    assert [step.tokens_in_forward for step in steps[1:7]] == [BLOCK + BLOCK, 1 + BLOCK] * 3
    assert len(text_of(steps)) == 12


@pytest.mark.parametrize("sampling", [Sampling(mix_weight=0.0), Sampling(temperature=1.0, mix_weight=0.0)], ids=str)
def test_with_a_mix_weight_of_0_every_draft_is_accepted(pair: Pair, sampling: Sampling) -> None:
    steps = run(pair, [4, 8, 15, 16], 1 + 5 * BLOCK, sampling)
    assert [step.accepted for step in steps] == [0] + [BLOCK] * 5


def test_mixing_accepts_more_the_less_the_text_model_weighs() -> None:
    pair = shared_random_pair("zaya")
    forwards = [len(run(pair, [4, 8, 15, 16], 60, Sampling(mix_weight=w))) for w in (1.0, 0.5, 0.2, 0.0)]
    assert forwards == sorted(forwards, reverse=True)
    assert forwards[0] > forwards[1] > forwards[3]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_mixing_at_nearly_full_weight_is_the_lossless_decoding(trained: Pair, temperature: float) -> None:
    # 1 itself takes the lossless path; this goes through the mixture, with the same random numbers.
    texts = [text_of(run(trained, [1, 4, 7], 30, Sampling(temperature, mix_weight=w), seed=3)) for w in (1.0, 1 - 1e-7)]
    assert texts[0] == texts[1]


def test_a_seed_gives_the_same_text_and_another_seed_another(pair: Pair) -> None:
    first, again, other = (text_of(run(pair, [1, 2], 20, Sampling(temperature=1.0), seed=s)) for s in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, mix_weight=0.3), Sampling(mix_weight=0.0)],
    ids=str,
)
def test_the_mask_token_is_never_chosen(sampling: Sampling) -> None:
    model = make_model("qwen3_moe", initializer_range=0.3)
    with torch.no_grad():
        model.lm_head.weight[MASK] *= 20  # wants the mask token half of the time
    pair = pair_of("qwen3_moe", model)
    ids = torch.tensor([[1, 2, 3]])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    assert MASK in wanted[0].tolist()
    assert MASK not in text_of(run(pair, [1, 2, 3], 40, sampling))


def test_a_smaller_block_than_trained_is_fine_and_a_larger_one_is_refused(walker: Pair) -> None:
    steps = run(walker, WALK, 20, block_size=2)
    assert text_of(steps) == text_of(run(walker, WALK, 20))
    assert max(step.accepted for step in steps) == 2
    with pytest.raises(ValueError, match="expected 2 to 4"):
        DecodePlan.tidar(SETTINGS, Sampling(), frozenset(), block_size=5)
    with pytest.raises(ValueError, match="expected 2 to 4"):
        DecodePlan.tidar(SETTINGS, Sampling(), frozenset(), block_size=1)


def test_a_plan_takes_its_proposals_from_the_checkpoint() -> None:
    def proposals(settings: TidarSettings, **options: Any) -> tuple[int, ...]:
        return DecodePlan.tidar(settings, Sampling(), frozenset(), **options).proposals

    chosen = TidarSettings(8, MASK, proposals=(1, 3, 5))
    assert proposals(chosen) == (1, 3, 5)
    assert proposals(chosen, proposals=(4, 2, 4)) == (2, 4)
    assert proposals(chosen, block_size=4) == (1, 3)
    assert proposals(TidarSettings(8, MASK, proposals=(6,)), block_size=4) == (4,)
    assert proposals(TidarSettings(4, MASK)) == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="from 1 to 8"):
        proposals(chosen, proposals=(9,))


def test_an_empty_prompt_and_an_empty_answer_are_refused(walker: Pair) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        run(walker, [], 5)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        run(walker, WALK, 0)


def test_a_family_that_cannot_work_is_refused_with_the_reason() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from zconvert.tidar.model import LayoutModel

    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, num_hidden_layers=1))
    model.config.layer_types = ["mamba"]
    with pytest.raises(ValueError, match="mamba"):
        LayoutModel(model)
