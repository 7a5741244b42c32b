"""Faster and smaller ways to compute the same: checkpointed activations, grouped experts, bfloat16 forwards."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.families import family_pair
from tests.contracts.models import CONTRACT_MODELS, MASK, random_ids, shared_random_pair
from zconvert.errors import UserError
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts
from zconvert.training.implementations import checkpoint_activations, choose_experts
from zconvert.training.objective import packed_losses

BATCH: Any = SimpleNamespace(
    input_ids=random_ids((2, 24), seed=3),
    document_ids=torch.tensor([[0] * 13 + [1] * 11, [0] * 24]),
    loss_mask=torch.ones(2, 24, dtype=torch.bool),
)


def loss_and_gradients(model: LayoutModel, parameters: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = model.model if parameters is None else parameters
    parameters.zero_grad()
    sums = packed_losses(model, BATCH, mask_token_id=MASK, block_size=4)
    (sums.ar + sums.diffusion).backward()
    model.release_gate()
    return sums.ar + sums.diffusion, {n: p.grad.clone() for n, p in parameters.named_parameters() if p.grad is not None}


def count_layer_runs(model: LayoutModel) -> list[str]:
    """Grows by an entry whenever the first layer's attention norm runs."""
    runs: list[str] = []
    first = next(iter(model._decoder.layers))
    norm = next(module for name, module in first.named_modules() if "norm" in name)
    norm.register_forward_hook(lambda *_: runs.append("ran"))
    return runs


@pytest.mark.parametrize("name", list(CONTRACT_MODELS))
def test_gradients_with_checkpointed_activations_are_those_without(name: str) -> None:
    model = deepcopy(shared_random_pair(name).layout)
    model.model.train()
    loss, plain = loss_and_gradients(model)
    runs = count_layer_runs(model)
    checkpoint_activations(model)
    again, checkpointed = loss_and_gradients(model)
    assert len(runs) == 2, "the backward pass runs each layer again"
    assert torch.equal(again, loss)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        assert torch.equal(checkpointed[key], gradient), key


def test_a_frozen_source_is_checkpointed_too_and_stays_in_evaluation_mode() -> None:
    model = deepcopy(shared_random_pair("qwen3_moe").layout)
    gated = model.add_gated(GatedParts(rank=4, mlp="add", mlp_width=8))
    torch.manual_seed(0)
    for parameter in gated.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.model.requires_grad_(False)
    gated.train()
    _, plain = loss_and_gradients(model, gated)
    runs = count_layer_runs(model)
    checkpoint_activations(model)
    _, checkpointed = loss_and_gradients(model, gated)
    assert len(runs) == 3, "the clean half once; the mask half in both passes"
    assert plain.keys() == checkpointed.keys() == dict(gated.named_parameters()).keys()
    for key, gradient in plain.items():
        assert torch.equal(checkpointed[key], gradient), key
    assert not any(module.training for module in model.model.modules())


def test_a_family_without_checkpointing_is_told() -> None:
    with pytest.raises(UserError, match="jetmoe"):
        checkpoint_activations(family_pair("jetmoe").layout)


def test_experts_are_grouped_where_the_family_can_and_a_wish_that_it_cannot_is_refused() -> None:
    model = deepcopy(family_pair("qwen3_moe").layout)
    assert choose_experts(model, None, autocast=False) == "experts: grouped_mm"
    assert model.config._experts_implementation == "grouped_mm"
    assert choose_experts(model, "eager", autocast=True) == "experts: eager"
    assert model.config._experts_implementation == "eager"
    assert choose_experts(deepcopy(family_pair("dbrx").layout), None, autocast=True) == "experts: the model's own code"
    assert choose_experts(deepcopy(family_pair("llama").layout), None, autocast=True) == "experts: none"
    with pytest.raises(UserError, match="grouped_mm"):
        choose_experts(deepcopy(family_pair("dbrx").layout), "grouped_mm", autocast=False)


@pytest.mark.parametrize("name", ["zaya", "qwen3_moe", "gpt_oss"])
def test_grouped_experts_run_in_bfloat16_where_autocast_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = family_pair(name) if name == "gpt_oss" else shared_random_pair(name)
    model = deepcopy(pair.layout)
    seen = []
    stock = torch.nn.functional.grouped_mm

    def spy(states: Tensor, weight: Tensor, **options: Any) -> Tensor:
        seen.append((states.dtype, weight.dtype))
        return stock(states, weight, **options)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", spy)
    choose_experts(model, None, autocast=True)
    loss_and_gradients(model)
    assert set(seen) == {(torch.float32, torch.float32)}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = loss_and_gradients(model)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


@pytest.mark.parametrize("name", ["zaya", "zaya_sliding", "qwen3_moe", "mixtral"])
def test_the_loss_in_bfloat16_is_near_that_in_float32_and_no_weight_or_bias_changes_format(name: str) -> None:
    model = deepcopy(shared_random_pair(name).layout)
    # Weights of a size that models start with: with those of the contracts a rounding sends tokens to other experts.
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(0.3)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    choose_experts(model, None, autocast=True)
    exact, exact_gradients = loss_and_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, gradients = loss_and_gradients(model)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=5e-3)
    total = torch.stack([gradient.norm() for gradient in exact_gradients.values()]).norm()
    difference = torch.stack([(gradients[key] - exact_gradients[key]).norm() for key in exact_gradients]).norm()
    assert difference < 0.1 * total
    # Float32 masters, and the balancing biases that decide ZAYA's routes, are what they were.
    for key, value in model.model.state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key]), key
