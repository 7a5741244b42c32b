"""Gated weights: mask slots feel them, clean tokens never do."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts import checks
from tests.contracts.checks import BLOCK, ROWS, TOLERANCE
from tests.contracts.families import FAMILY_MODELS, family_pair
from tests.contracts.models import MASK, VOCAB, Pair, random_ids
from tests.contracts.reference import causal_logits
from zconvert.tidar.cache import TidarCache
from zconvert.tidar.families import FAMILIES
from zconvert.tidar.layout import decode_layout, packed_layout
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts
from zconvert.training.objective import hidden_halves

ROW = ROWS["offset 3 in several documents"]
ONE = ROWS["one document"]


ALL_PARTS: dict[str, Any] = {"mlp": "add", "norms": True, "router": True}


def gated_pair(model_type: str, mlp: Any = "replace", trained: bool = True, **parts: Any) -> Pair:
    """The untouched model beside one with gated weights, as they could be after some training."""
    plain = family_pair(model_type).plain
    layout = LayoutModel(deepcopy(plain))
    weights = layout.add_gated(GatedParts(rank=2, mlp=mlp, mlp_width=8, **parts))
    if trained:
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in weights.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return Pair(model_type, plain, layout)


def parts_of(model_type: str) -> dict[str, Any]:
    """Every part that a family can have."""
    routers = not FAMILIES[model_type].dense and model_type not in ("gemma4_text", "jetmoe")
    return {**ALL_PARTS, "router": routers}


def slot_logits(layout: LayoutModel, ids: Tensor, mask: int = MASK) -> Tensor:
    """(T,) -> (T, V): logits of the mask slots of a packed row of one document."""
    row = torch.cat([ids, torch.full_like(ids, mask)])[None]
    places = packed_layout(torch.zeros(1, len(ids), dtype=torch.long), BLOCK)
    return layout.logits(layout.hidden_states(row, places))[0, len(ids) :]


def block_logits(layout: LayoutModel, prefix: Tensor, cache: TidarCache | None = None, committed: int = 0) -> Tensor:
    """(B, V): logits of a block of mask slots after a prefix, of which `committed` tokens are in the cache."""
    new = prefix[committed:]
    places = decode_layout(committed, len(new), (len(new),), BLOCK)
    ids = torch.cat([new, torch.full((BLOCK,), MASK)])[None]
    return layout.logits(layout.hidden_states(ids, places, cache))[0, len(new) :]


@pytest.mark.parametrize("all_parts", [False, True])
@pytest.mark.parametrize("model_type", list(FAMILY_MODELS))
@torch.no_grad()
def test_every_family_keeps_its_ar_path_bit_for_bit_and_its_contracts(model_type: str, all_parts: bool) -> None:
    pair = gated_pair(model_type, **parts_of(model_type) if all_parts else {})
    model, ids = pair.layout.model, random_ids((24,), seed=1)
    assert list(model.state_dict()) == list(pair.plain.state_dict()), "the source's weights and names stay as they are"
    assert checks.clean_logits_differ(pair, ROW) < TOLERANCE
    assert checks.clean_logits_see_mask_slots(family_pair(model_type), ROW) < TOLERANCE
    assert checks.labels_leak(pair, ROW) < TOLERANCE

    # Mask slots: the packed row, a block alone and cached decoding are of one mind, and another than the source's.
    packed = slot_logits(pair.layout, ids)
    source = slot_logits(family_pair(model_type).layout, ids)
    assert float((packed - source).abs().max()) > 0.1
    cache = TidarCache()
    for start in (4, 8, 16):
        alone = block_logits(pair.layout, ids[:start])
        cached = block_logits(pair.layout, ids[:start], cache, cache.get_seq_length())
        cache.commit(start - cache.get_seq_length())
        for logits in (alone, cached):
            assert float((logits - packed[start : start + BLOCK]).abs().max()) < TOLERANCE
    # Last of all: forwards over mask slots leave nothing behind.
    assert torch.equal(model(input_ids=ids[None], use_cache=False).logits[0], causal_logits(pair.plain, ids))


@pytest.mark.parametrize("model_type", list(FAMILY_MODELS))
@torch.no_grad()
def test_every_family_takes_a_mask_token_beyond_its_rows(model_type: str) -> None:
    layout, ids = gated_pair(model_type).layout, random_ids((24,), seed=1)
    rows = layout.model.get_input_embeddings().weight.shape[0]
    assert torch.equal(slot_logits(layout, ids, mask=rows), slot_logits(layout, ids, mask=rows - 1))


@torch.no_grad()
def test_a_clean_token_beyond_the_rows_is_still_an_error() -> None:
    layout, ids = gated_pair("mixtral").layout, random_ids((24,), seed=1)
    ids[3] = VOCAB
    with pytest.raises(IndexError):
        slot_logits(layout, ids)


@pytest.mark.parametrize("model_type", ["mixtral", "zaya", "deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_added_parts_start_as_the_source(model_type: str) -> None:
    pair = gated_pair(model_type, trained=False, mask_embedding=False, **ALL_PARTS)
    ids = random_ids((24,), seed=1)
    assert torch.equal(slot_logits(pair.layout, ids), slot_logits(family_pair(model_type).layout, ids))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "zaya", "deepseek_v3", "gpt_oss", "llama4_text"])
@torch.no_grad()
def test_replaced_no_routed_expert_and_no_router_sees_a_mask_slot(model_type: str) -> None:
    def numbers_seen(layout: LayoutModel, run: Any) -> dict[str, int]:
        """How many numbers every router and every set of experts gets."""
        seen: dict[str, int] = {}
        for name, module in layout.model.named_modules():
            if name.rsplit(".", 1)[-1] in ("experts", "gate", "router"):
                module.register_forward_hook(lambda _m, inputs, _o, n=name: seen.update({n: inputs[0].numel()}))
        run()
        return seen

    ids = random_ids((24,), seed=1)
    source = deepcopy(family_pair(model_type).layout)
    causal = decode_layout(0, len(ids), (), BLOCK)
    expected = numbers_seen(source, lambda: source.hidden_states(ids[None], causal))
    assert expected, "there must be routers and experts to watch"
    replaced, added = gated_pair(model_type, "replace").layout, gated_pair(model_type, "add").layout
    assert numbers_seen(replaced, lambda: slot_logits(replaced, ids)) == expected
    twice = {name: 2 * count for name, count in expected.items()}
    assert numbers_seen(added, lambda: slot_logits(added, ids)) == twice


@pytest.mark.parametrize("parts", [{}, ALL_PARTS], ids=["default", "all"])
def test_gradients_reach_every_gated_weight_and_no_other(parts: dict[str, Any]) -> None:
    pair = gated_pair("zaya", **parts)
    assert pair.layout.gated is not None
    pair.layout.model.requires_grad_(False)
    ids = random_ids((24,), seed=1)
    torch.nn.functional.cross_entropy(slot_logits(pair.layout, ids), ids).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in pair.layout.gated.parameters() if p.grad is not None)
    missing = [name for name, p in pair.layout.gated.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad is None for p in pair.layout.model.parameters())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"mlp": "both"}, "mlp is 'both'"),
        ({"mlp_width": 0}, "mlp_width is 0"),
        ({"router": True}, "no router runs"),
    ],
)
def test_parts_that_cannot_be_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedParts(**parts)


@pytest.mark.parametrize("all_parts", [False, True])
@pytest.mark.parametrize("model_type", list(FAMILY_MODELS))
def test_the_clean_half_by_itself_and_then_the_mask_half_are_the_packed_row(model_type: str, all_parts: bool) -> None:
    pair = gated_pair(model_type, **parts_of(model_type) if all_parts else {})
    assert pair.layout.gated is not None
    pair.layout.model.requires_grad_(False)
    ids = random_ids((2, ROW.num_clean), seed=3)
    layout = packed_layout(ROW.document_ids.expand(2, -1), BLOCK, ROW.offset)
    row = torch.cat([ids, torch.full_like(ids, MASK)], dim=1)

    def gradients(hidden: Tensor) -> list[Tensor]:
        (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
        assert pair.layout.gated is not None
        found = [parameter.grad for parameter in pair.layout.gated.parameters()]
        pair.layout.gated.zero_grad()
        return [gradient for gradient in found if gradient is not None]

    packed = pair.layout.hidden_states(row, layout)
    expected = gradients(packed[:, ids.shape[1] :])
    pair.layout.release_gate()
    pair.layout.gated.gate.recompute = all_parts  # so that one of two recomputes
    clean, slots = hidden_halves(pair.layout, ids, torch.full_like(ids, MASK), layout)
    assert not clean.requires_grad
    torch.testing.assert_close(torch.cat([clean, slots], dim=1), packed, atol=TOLERANCE, rtol=0)
    found = gradients(slots)
    assert len(found) == len(expected)
    tolerance = 1e-3 if model_type == "gemma4_text" else 1e-4  # its gradients are the most sensitive to rounding
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance * max(1.0, float(theirs.abs().max())), rtol=0)


def test_what_the_backward_pass_keeps_shrinks_with_the_clean_half_apart_and_with_recomputation() -> None:
    pair = gated_pair("qwen3_moe")
    assert pair.layout.gated is not None
    pair.layout.model.requires_grad_(False)
    ids = random_ids((2, 64), seed=3)
    layout = packed_layout(torch.zeros_like(ids), BLOCK)

    def kept(forward: Callable[[], Any]) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            forward()
        return sum(sizes)

    row = torch.cat([ids, torch.full_like(ids, MASK)], dim=1)
    packed = kept(lambda: pair.layout.hidden_states(row, layout))
    pair.layout.release_gate()
    apart = kept(lambda: hidden_halves(pair.layout, ids, torch.full_like(ids, MASK), layout))
    pair.layout.gated.gate.recompute = True
    recomputed = kept(lambda: hidden_halves(pair.layout, ids, torch.full_like(ids, MASK), layout))
    assert apart < 0.6 * packed
    assert recomputed < 0.1 * packed
