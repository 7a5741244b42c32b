"""Predecessor-aware CCA against the stock projection of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import ZayaConfig
from transformers.models.zaya.modeling_zaya import ZayaCCAProjection

from zconvert.tidar.cache import TidarCache
from zconvert.tidar.cca import PredecessorAwareCCA, graft_cca
from zconvert.tidar.layout import Layout, decode_layout, packed_layout
from zconvert.tidar.predecessors import Predecessors
from zconvert.tidar.predecessors import predecessors_of as over_past

KERNELS = [(2, 2), (3, 2), (2, 3), (4, 3), (1, 2), (2, 1)]


def projection(k0: int, k1: int, *, bias: bool = False) -> tuple[ZayaConfig, ZayaCCAProjection]:
    torch.manual_seed(0)
    config = ZayaConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_hidden_layers=1,
        attention_bias=bias,
        cca_time0=k0,
        cca_time1=k1,
    )
    module = ZayaCCAProjection(config, layer_idx=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return config, module


def aware(config: ZayaConfig, stock: ZayaCCAProjection) -> PredecessorAwareCCA:
    grafted = PredecessorAwareCCA(config, layer_idx=0)
    grafted.load_state_dict(stock.state_dict())
    return grafted


def predecessors_of(layout: Layout, config: ZayaConfig, cache: TidarCache | None) -> Predecessors:
    return over_past(layout, (config.cca_time0 - 1) + (config.cca_time1 - 1), cache)


def states(length: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(1))


def assert_same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def text(length: int, rows: int = 1) -> Layout:
    """Plain causal text."""
    return decode_layout([0] * rows, length, (), 2)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("k0", "k1"), KERNELS)
def test_on_plain_text_it_is_the_stock_projection(k0: int, k1: int, bias: bool) -> None:
    config, stock = projection(k0, k1, bias=bias)
    grafted, hidden, layout = aware(config, stock), states(9, rows=2), text(9, rows=2)
    assert_same(grafted(hidden, None, predecessors_of(layout, config, None)), stock(hidden, None, None))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("k0", "k1"), KERNELS)
def test_cached_text_continues_after_the_accepted_tokens(k0: int, k1: int, bias: bool) -> None:
    config, stock = projection(k0, k1, bias=bias)
    grafted, cache = aware(config, stock), TidarCache()
    kept = states(0)
    for round_, (count, accepted) in enumerate([(1, 1), (5, 2), (4, 4), (3, 1), (1, 1)]):
        new = torch.randn(1, count, 16, generator=torch.Generator().manual_seed(round_))
        got = grafted(new, cache, predecessors_of(decode_layout(cache.get_seq_length(), count, (), 2), config, cache))
        whole = stock(torch.cat([kept, new], dim=1), None, None)
        assert_same(got, tuple(part[:, -count:] for part in whole))
        cache.commit(accepted)
        kept = torch.cat([kept, new[:, :accepted]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("k0", "k1"), KERNELS)
def test_every_document_and_block_reads_as_if_it_stood_alone(k0: int, k1: int) -> None:
    config, stock = projection(k0, k1, bias=True)
    grafted, block, lengths = aware(config, stock), 3, (7, 1, 5)
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    hidden, total = states(2 * 13), sum(lengths)
    got = grafted(hidden, None, predecessors_of(packed_layout(ids, block), config, None))
    start = 0
    for length in lengths:
        clean, slots = hidden[:, start : start + length], hidden[:, total + start : total + start + length]
        assert_same(tuple(part[:, start : start + length] for part in got), stock(clean, None, None))
        for first in range(0, length, block):
            alone = stock(torch.cat([clean[:, :first], slots[:, first : first + block]], dim=1), None, None)
            here = slice(total + start + first, total + start + min(first + block, length))
            assert_same(tuple(part[:, here] for part in got), tuple(part[:, first:] for part in alone))
        start += length


@torch.no_grad()
def test_proposals_follow_the_draft_that_they_plan_for() -> None:
    config, stock = projection(3, 3, bias=True)
    grafted, cache = aware(config, stock), TidarCache()
    prompt, new = states(4), states(4 + 3 * 3)
    grafted(prompt, cache, predecessors_of(decode_layout(0, 4, (), 3), config, cache))
    cache.commit(4)
    got = grafted(new, cache, predecessors_of(decode_layout(4, 4, (1, 2, 4), 3), config, cache))
    for place, count in enumerate((1, 2, 4)):
        here = slice(4 + 3 * place, 7 + 3 * place)
        alone = stock(torch.cat([prompt, new[:, :count], new[:, here]], dim=1), None, None)
        assert_same(tuple(part[:, here] for part in got), tuple(part[:, -3:] for part in alone))


@torch.no_grad()
def test_without_predecessors_it_is_the_stock_projection_padding_included() -> None:
    config, stock = projection(2, 2)
    grafted, hidden = aware(config, stock), states(6, rows=2)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for conv_mask in (None, padding):
        got, expected = grafted(hidden, None, conv_mask), stock(hidden, None, conv_mask)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_grafting_keeps_the_modules_and_is_harmless_twice() -> None:
    _, stock = projection(2, 2)
    model = torch.nn.ModuleList([stock, torch.nn.Linear(2, 2)])
    names = list(model.state_dict())
    graft_cca(model)
    graft_cca(model)
    assert type(model[0]) is PredecessorAwareCCA
    assert model[0] is stock
    assert list(model.state_dict()) == names
