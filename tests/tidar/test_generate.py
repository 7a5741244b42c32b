"""The entry point of custom_generate behaves as `model.generate` does, and refuses by name what it cannot honour."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

from tests.contracts.models import MASK, make_model
from zconvert.tidar.acceptance import Sampling, penalised, probabilities
from zconvert.tidar.generate import generate, layout_model_of, plan_of, token_ids
from zconvert.tidar.generate_options import merged_config, sampling_of
from zconvert.tidar.settings import TidarSettings

SETTINGS = TidarSettings(block_size=4, mask_token_id=MASK)


@pytest.fixture(scope="module")
def stock() -> Any:
    """A model that never chooses the mask token, decoded by transformers' own loop."""
    model = make_model("mixtral").eval()
    model.config.tidar = SETTINGS.to_dict()
    model.generation_config = GenerationConfig(suppress_tokens=[MASK], eos_token_id=None, pad_token_id=0)
    return model


@pytest.fixture
def model(stock: Any) -> Any:
    """The same weights; its configs can be changed."""
    own = copy.copy(stock)
    own.generation_config = copy.deepcopy(stock.generation_config)
    return own


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(1, MASK, (1, 9), generator=torch.Generator().manual_seed(3))


class Streamer:
    """Records what it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.seen.append("end")


class StopAtLength(StoppingCriteria):
    """Stops at a number of tokens, prompt included."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert input_ids.shape[1] <= self.length
        return torch.tensor([input_ids.shape[1] >= self.length])


@pytest.mark.parametrize("sampler", ["lossless", "ar"])
@pytest.mark.parametrize("length", [{"max_new_tokens": 17}, {"max_length": 26}, {}])
def test_greedy_text_is_that_of_transformers(
    model: Any, prompt: torch.Tensor, sampler: str, length: dict[str, Any]
) -> None:
    ours = generate(prompt, model=model, sampler=sampler, **length)
    assert torch.equal(ours, model.generate(prompt, do_sample=False, **length))
    assert not ours.is_inference()


def test_transformers_runs_it_by_name_of_the_function(model: Any, prompt: torch.Tensor) -> None:
    passed: dict[str, Any] = {"logits_processor": None, "synced_gpus": None, "assistant_model": None, "streamer": None}
    ours = generate(inputs=prompt, model=model, generation_config=None, max_new_tokens=5, **passed)
    assert ours.shape == (1, 14)


def test_rows_of_a_left_padded_batch_are_decoded_as_if_alone(model: Any, prompt: torch.Tensor) -> None:
    short = prompt[:, 4:]
    batch = torch.cat([prompt, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)])
    alone = [generate(row, model=model, max_new_tokens=8) for row in (prompt, short)]
    for mask in ((batch != 0).long(), None):
        both = generate(batch, model=model, attention_mask=mask, max_new_tokens=8)
        assert torch.equal(both[0], alone[0][0])
        assert torch.equal(both[1, 4:], alone[1][0])
        assert both[1, :4].tolist() == [0] * 4


def test_end_tokens_that_a_prompt_begins_with_are_no_padding(stock: Any, model: Any) -> None:
    prompt = torch.tensor([[7, 7, 3, 9]])
    options: dict[str, Any] = {"eos_token_id": 7, "pad_token_id": 7, "max_new_tokens": 8}
    expected = stock.generate(prompt, do_sample=False, **options)
    assert not torch.equal(expected[:, 4:], stock.generate(prompt[:, 2:], do_sample=False, **options)[:, 2:])
    assert torch.equal(generate(prompt, model=model, **options), expected)


def test_a_row_ends_at_eos_and_is_padded_on_the_right(model: Any, prompt: torch.Tensor) -> None:
    batch = torch.cat([prompt, prompt.flip(1)])
    free = generate(batch, model=model, max_new_tokens=12)
    eos = next(int(t) for t in free[0, 9:] if t not in free[1, 9:])
    both = generate(batch, model=model, max_new_tokens=12, eos_token_id=[eos, 62], pad_token_id=5)
    end = 9 + free[0, 9:].tolist().index(eos)
    assert torch.equal(both[0, : end + 1], free[0, : end + 1])
    assert set(both[0, end + 1 :].tolist()) <= {5}
    assert torch.equal(both[1], free[1, : both.shape[1]])


def test_a_padded_prompt_on_the_right_is_refused(model: Any, prompt: torch.Tensor) -> None:
    mask = torch.ones_like(prompt)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="padding_side='left'"):
        generate(prompt, model=model, attention_mask=mask)


def test_sampling_follows_the_seed_and_makes_no_mask_token(model: Any, prompt: torch.Tensor) -> None:
    def sample(seed: int, **options: Any) -> list[int]:
        options = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 24, **options}
        return generate(prompt, model=model, seed=seed, **options)[0].tolist()

    assert sample(1) == sample(1) != sample(2)
    assert MASK not in sample(3)
    assert sample(1, top_k=1) == sample(2, top_k=1) == generate(prompt, model=model, max_new_tokens=24)[0].tolist()
    assert len(sample(1, sampler="mixed", mix_weight=0.3)) == 33


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 7, "top_p": 0.8}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.95}, {"repetition_penalty": 1.4}],
    ids=str,
)
def test_tokens_are_drawn_from_the_distribution_of_transformers(
    stock: Any, prompt: torch.Tensor, options: dict[str, Any]
) -> None:
    asked = {"do_sample": True, **options}
    told = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    expected = stock.generate(prompt, max_new_tokens=1, **asked, **told)
    sampling = sampling_of(merged_config(stock, None, asked)[0])
    logits = expected.logits[0].float().index_fill(1, torch.tensor([MASK]), -torch.inf)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, prompt, True)
    found = probabilities(penalised(logits[:, None], seen, sampling.repetition_penalty)[:, 0], sampling)
    torch.testing.assert_close(found, expected.scores[0].softmax(-1))


def test_sampling_without_a_seed_follows_torchs_own(model: Any, prompt: torch.Tensor) -> None:
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(generate(prompt, model=model, do_sample=True, max_new_tokens=12))
    assert torch.equal(*texts)


def test_several_sequences_are_drawn_for_each_row(model: Any, prompt: torch.Tensor) -> None:
    drawn = generate(prompt, model=model, do_sample=True, temperature=3.0, num_return_sequences=3, max_new_tokens=9)
    assert len({tuple(row) for row in drawn.tolist()}) == 3
    with pytest.raises(ValueError, match="num_return_sequences"):
        generate(prompt, model=model, num_return_sequences=2)


def test_settings_come_from_the_call_then_the_given_config_then_the_models(model: Any, prompt: torch.Tensor) -> None:
    model.generation_config.max_new_tokens = 6
    assert generate(prompt, model=model).shape[1] == 15
    given = GenerationConfig(max_new_tokens=4)
    assert generate(prompt, given, model=model).shape[1] == 13
    assert generate(prompt, given, model=model, max_new_tokens=3).shape[1] == 12
    assert given.max_new_tokens == 4
    assert model.generation_config.max_new_tokens == 6


def test_a_streamer_gets_the_prompt_then_each_forwards_tokens(model: Any, prompt: torch.Tensor) -> None:
    streamer = Streamer()
    text = generate(prompt, model=model, streamer=streamer, max_new_tokens=10)[0].tolist()
    assert streamer.seen[0] == prompt[0].tolist()
    assert streamer.seen[-1] == "end"
    assert [t for tokens in streamer.seen[:-1] for t in tokens] == text
    with pytest.raises(ValueError, match="streamer"):
        generate(torch.cat([prompt, prompt]), model=model, streamer=streamer)


@pytest.mark.parametrize("length", [10, 13, 14])
def test_stopping_criteria_cut_within_a_forward(model: Any, prompt: torch.Tensor, length: int) -> None:
    free = generate(prompt, model=model, max_new_tokens=12)
    cut = generate(prompt, model=model, max_new_tokens=12, stopping_criteria=[StopAtLength(length)])
    assert torch.equal(cut, free[:, :length])


def test_a_dict_is_returned_where_it_is_asked_for(model: Any, prompt: torch.Tensor) -> None:
    output = generate(prompt, model=model, max_new_tokens=3, return_dict_in_generate=True)
    assert torch.equal(output.sequences, generate(prompt, model=model, max_new_tokens=3))


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.4}, {"repetition_penalty": 0.7}], ids=str)
def test_a_repetition_penalty_gives_the_text_of_transformers(
    stock: Any, model: Any, prompt: torch.Tensor, options: dict[str, Any]
) -> None:
    expected = stock.generate(prompt, max_new_tokens=16, do_sample=False, **options)
    assert not torch.equal(expected, stock.generate(prompt, max_new_tokens=16, do_sample=False))
    for proposals in ((1, 2, 3, 4), (1, 3)):
        assert torch.equal(generate(prompt, model=model, max_new_tokens=16, proposals=proposals, **options), expected)


@pytest.mark.parametrize("mode", ["single", "two"])
def test_a_batch_of_unequal_prompts_gives_the_text_of_each_alone(model: Any, mode: str) -> None:
    lengths = (9, 2, 5, 9)
    prompts = [torch.randint(1, MASK, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(p, (9 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (9 - p.shape[1], 0)) for p in prompts])
    for options in ({}, {"do_sample": True, "seed": 5}, {"sampler": "mixed", "do_sample": True, "seed": 5}):
        together = generate(ids, model=model, attention_mask=mask, max_new_tokens=12, mode=mode, **options)
        for row, prompt in enumerate(prompts):
            own = options | ({"seed": 5 + row} if "seed" in options else {})
            alone = generate(prompt, model=model, max_new_tokens=12, mode=mode, **own)
            assert together[row, 9:].tolist() == alone[0, prompt.shape[1] :].tolist()


def test_max_time_ends_a_text(model: Any, prompt: torch.Tensor) -> None:
    assert generate(prompt, model=model, max_new_tokens=30, max_time=1e-9).shape[1] == prompt.shape[1] + 1


def test_stop_strings_need_a_tokenizer(model: Any, prompt: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pass `tokenizer=`"):
        generate(prompt, model=model, stop_strings=["."])


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 2},
        {"suppress_tokens": [4, MASK]},
        {"output_scores": True},
        {"assistant_model": object()},
        {"logits_processor": [1]},
        {"inputs_embeds": torch.zeros(1, 2, 32)},
        {"wrong_name": 3},
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(model: Any, prompt: torch.Tensor, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"cannot honour {next(iter(option))}"):
        generate(prompt, model=model, **option)


def test_neutral_values_are_no_reason_to_refuse(model: Any, prompt: torch.Tensor) -> None:
    neutral: dict[str, Any] = {
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "min_length": 0,
        "use_cache": True,
        "output_scores": False,
    }
    assert generate(prompt, model=model, max_new_tokens=2, **neutral).shape == (1, 11)


def test_a_prompt_that_is_none_is_refused(model: Any, prompt: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no BOS token"):
        generate(model=model)
    with pytest.raises(ValueError, match="twice"):
        generate(prompt, input_ids=prompt, model=model)
    with pytest.raises(ValueError, match="expected token ids of shape"):
        generate(prompt[0], model=model)
    with pytest.raises(ValueError, match="leave room"):
        generate(prompt, model=model, max_length=9)
    model.generation_config.bos_token_id = 2
    assert generate(model=model, max_new_tokens=4).shape == (1, 5)


def test_a_model_that_is_not_converted_is_refused(prompt: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no tidar section"):
        generate(prompt, model=make_model("mixtral"))


def test_the_layout_model_is_made_once_for_each_model(model: Any) -> None:
    kept = layout_model_of(model)
    assert layout_model_of(model) is kept
    assert layout_model_of(copy.copy(model)) is not kept


def test_each_sampler_has_its_own_options() -> None:
    plan = plan_of(SETTINGS, Sampling(), frozenset(), sampler="mixed")
    assert plan.sampling.mix_weight == 0.5
    assert plan_of(SETTINGS, Sampling(mix_weight=0.2), frozenset()).sampling.mix_weight == 1.0
    assert plan_of(SETTINGS, Sampling(), frozenset(), sampler="ar").proposals == ()
    assert plan_of(SETTINGS, Sampling(), frozenset(), proposals=[3, 1]).proposals == (1, 3)
    for options in (
        {"sampler": "fast"},
        {"mix_weight": 0.5},
        {"sampler": "mixed", "mix_weight": 1.5},
        {"sampler": "ar", "proposals": (1,)},
        {"proposals": (5,)},
        {"block_size": 5},
    ):
        with pytest.raises(ValueError, match=r"sampler|mix_weight|proposals|block_size"):
            plan_of(SETTINGS, Sampling(), frozenset(), **options)


def test_end_tokens_are_read_in_every_form() -> None:
    assert token_ids(None) == token_ids([]) == frozenset()
    assert token_ids(3) == token_ids([3]) == token_ids(torch.tensor([3])) == {3}
