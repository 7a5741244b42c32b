"""Chunked losses: the plain ones in value and gradient, for every kind of head."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.contracts.families import family_pair
from tests.contracts.models import VOCAB, shared_random_pair
from zconvert.tidar.model import LayoutModel
from zconvert.training import loss as losses
from zconvert.training.loss import cross_entropy_sum, divergence_sum, variation_sum

TOKENS = 29
HEADS = ["qwen3_moe", "granite", "cohere", "gemma2", "inkling_text"]  # plain, divided, scaled, capped, Inkling's


def states(seed: int, width: int = 32) -> Tensor:
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed))


LABELS = torch.randint(60, (TOKENS,), generator=torch.Generator().manual_seed(2))
STARTS = torch.arange(TOKENS) % 9 == 0


def plain_cross_entropy(model: LayoutModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    logits = model.logits(hidden)
    return F.cross_entropy(logits, LABELS, reduction="sum"), logits.argmax(-1) == LABELS


def plain_divergence(model: LayoutModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        p = model.logits(states(5)).softmax(-1)
        p[STARTS] = F.one_hot(LABELS[STARTS], p.shape[-1]).float()
    logits = model.logits(hidden)
    return F.kl_div(logits.log_softmax(-1), p, reduction="sum"), logits.argmax(-1) == p.argmax(-1)


def plain_variation(model: LayoutModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        p = model.logits(states(5)).softmax(-1)
        p[STARTS] = F.one_hot(LABELS[STARTS], p.shape[-1]).float()
    logits = model.logits(hidden)
    return (logits.softmax(-1) - p).abs().sum() / 2, logits.argmax(-1) == p.argmax(-1)


def chunked_variation(model: LayoutModel, hidden: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    return variation_sum(model, hidden, states(5), LABELS, STARTS, chunk)


def chunked_cross_entropy(model: LayoutModel, hidden: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    return cross_entropy_sum(model, hidden, LABELS, chunk)


def chunked_divergence(model: LayoutModel, hidden: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    return divergence_sum(model, hidden, states(5), LABELS, STARTS, chunk)


OBJECTIVES: list[Any] = [
    pytest.param(chunked_cross_entropy, plain_cross_entropy, id="cross_entropy"),
    pytest.param(chunked_divergence, plain_divergence, id="divergence"),
    pytest.param(chunked_variation, plain_variation, id="variation"),
]


def results(model: LayoutModel, run: Callable[[LayoutModel, Tensor], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Value, gradients of a scaled loss, and what is right."""
    hidden = states(1).requires_grad_()
    parameters = {f"head {name}": p for name, p in model._head.named_parameters() if p.requires_grad}
    loss, correct = run(model, hidden)
    gradients = torch.autograd.grad(0.3 * loss, [hidden, *parameters.values()])
    return {"loss": loss.detach(), "correct": correct, **dict(zip(["hidden", *parameters], gradients, strict=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # 1e-6 of the largest entry: sums over chunks are taken in another order.
        tolerance = 1e-6 * max(1.0, float(value.float().abs().max()))
        torch.testing.assert_close(
            found[name], value, rtol=1e-6, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("chunk", [TOKENS, 7, 1, None])
@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize(("chunked", "plain"), OBJECTIVES)
def test_the_chunked_loss_is_the_plain_one_in_value_and_gradient(
    chunked: Any, plain: Any, family: str, chunk: int | None
) -> None:
    model = family_pair(family).layout
    assert_same(results(model, lambda m, h: chunked(m, h, chunk)), results(model, plain))


@pytest.mark.parametrize(("chunked", "plain"), OBJECTIVES)
def test_so_it_is_for_a_head_with_a_bias_a_frozen_head_and_a_head_of_another_class(chunked: Any, plain: Any) -> None:
    model = deepcopy(family_pair("qwen3_moe").layout)
    model._head.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB))
    assert_same(results(model, lambda m, h: chunked(m, h, 7)), results(model, plain))

    class Grafted(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    model._head.__class__ = Grafted
    assert model.linear_head is None
    assert_same(results(model, lambda m, h: chunked(m, h, 7)), results(model, plain))

    model._head.__class__ = nn.Linear
    model._head.requires_grad_(False)
    found = results(model, lambda m, h: chunked(m, h, 7))
    assert "head weight" not in found
    assert_same(found, results(model, plain))


@pytest.mark.parametrize(("chunked", "plain"), OBJECTIVES)
def test_without_gradients_the_value_is_the_same(chunked: Any, plain: Any) -> None:
    model = shared_random_pair("zaya").layout
    with torch.no_grad():
        found, expected = chunked(model, states(1), 7), plain(model, states(1))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("chunked", "plain"), OBJECTIVES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2", "inkling_text"])
def test_each_chunks_logits_are_made_once_where_the_head_is_linear_and_never_more_than_a_chunks(
    chunked: Any, plain: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deepcopy(family_pair(family).layout)
    rows: list[int] = []
    made = model.finish_logits
    monkeypatch.setattr(model, "finish_logits", lambda logits: rows.append(len(logits)) or made(logits))
    results(model, lambda m, h: chunked(m, h, 7))
    assert max(rows) <= 7
    of_teacher = 0 if chunked is chunked_cross_entropy else TOKENS
    if family == "inkling_text":
        assert sum(rows) == 2 * (TOKENS + of_teacher)
    else:
        assert sum(rows) == TOKENS + of_teacher


def test_a_chunk_of_no_stated_size_shrinks_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deepcopy(shared_random_pair("qwen3_moe").layout)
    rows: list[int] = []
    made = model.finish_logits
    monkeypatch.setattr(model, "finish_logits", lambda logits: rows.append(len(logits)) or made(logits))
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 10 * VOCAB)
    cross_entropy_sum(model, states(1).requires_grad_(), LABELS)
    assert rows == [10, 10, 9]


def test_in_bfloat16_logits_are_rounded_and_their_sums_are_not() -> None:
    model = shared_random_pair("zaya").layout
    exact = results(model, plain_cross_entropy)

    def run(chunked: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return results(model, (lambda m, h: chunked_cross_entropy(m, h, 7)) if chunked else plain_cross_entropy)

    found, plain = run(True), run(False)
    assert found["loss"].dtype == found["head weight"].dtype == torch.float32
    # The same products as autocast makes, so the same loss; it lies near the exact one.
    torch.testing.assert_close(found["loss"], plain["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["loss"], exact["loss"], rtol=5e-3, atol=0)
    for name in ("hidden", "head weight"):
        assert (found[name] - exact[name]).norm() < 0.02 * exact[name].norm(), name


def test_a_second_backward_pass_is_refused() -> None:
    hidden = states(1).requires_grad_()
    loss, _ = cross_entropy_sum(shared_random_pair("qwen3_moe").layout, hidden, LABELS, 7)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(loss, hidden)
