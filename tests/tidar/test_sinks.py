"""Attention sinks through SDPA against the eager attention of transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from tests.contracts.families import family_pair, make_family_model
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.sinks import NAME, sdpa_with_sinks


@pytest.mark.parametrize("queries", [5, 1])
def test_it_is_eager_attention_with_sinks(queries: int) -> None:
    torch.manual_seed(0)
    keys, heads = 7, 4
    module = SimpleNamespace(num_key_value_groups=2, sinks=torch.randn(heads), training=False)
    query, key, value = torch.randn(2, heads, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    additive = torch.zeros(queries, keys).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    expected, _ = eager_attention_forward(module, query, key, value, additive, scaling=0.3)
    for mask in [additive] + ([None] if queries == 1 else []):
        got, weights = sdpa_with_sinks(module, query, key, value, mask, scaling=0.3, s_aux=module.sinks, in_layout=True)
        assert weights is None
        torch.testing.assert_close(got, expected)
    without, _ = sdpa_with_sinks(module, query, key, value, additive, scaling=0.3, in_layout=True)
    assert not torch.allclose(without, expected, atol=1e-2), "the sinks must matter"


@pytest.mark.parametrize("model_type", ["flint", "gpt_oss", "granitemoe_swa", "mimo_v2_flash"])
def test_families_with_sinks_run_in_sdpa(model_type: str) -> None:
    pair = family_pair(model_type)
    assert pair.plain.config._attn_implementation == "eager"
    assert pair.layout.model.config._attn_implementation == NAME


def test_a_chosen_implementation_stays() -> None:
    model = make_family_model("gpt_oss")
    model.config._attn_implementation = "flex_attention"
    LayoutModel(model)
    assert model.config._attn_implementation == "flex_attention"


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["flint", "gpt_oss", "granitemoe_swa", "mimo_v2_flash"])
def test_the_plain_model_attends_as_it_always_did_bit_for_bit(model_type: str) -> None:
    pair = family_pair(model_type)
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    for attention_mask in (None, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])):
        got = pair.layout.model(input_ids=ids, attention_mask=attention_mask).logits
        assert torch.equal(got, pair.plain(input_ids=ids, attention_mask=attention_mask).logits)
