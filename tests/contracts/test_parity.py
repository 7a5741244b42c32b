"""The graft changes nothing for those who use the model as it was."""

from __future__ import annotations

import torch

from tests.contracts.models import Pair, random_ids


@torch.no_grad()
def test_a_grafted_model_without_layouts_is_the_stock_model(pair: Pair) -> None:
    ids = random_ids((2, 24), seed=11)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0  # left padding: the stock convolution zeroes these
    for attention_mask in (None, padded):
        grafted = pair.layout.model(input_ids=ids, attention_mask=attention_mask).logits
        stock = pair.plain(input_ids=ids, attention_mask=attention_mask).logits
        torch.testing.assert_close(grafted, stock, rtol=0, atol=0)


def test_a_grafted_model_generates_what_the_stock_model_generates(pair: Pair) -> None:
    ids = random_ids((1, 9), seed=12)
    grafted, stock = (
        model.generate(ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids))
        for model in (pair.layout.model, pair.plain)
    )
    assert grafted.tolist() == stock.tolist()


def test_the_graft_keeps_every_name_and_value_of_the_weights(pair: Pair) -> None:
    grafted, stock = pair.layout.model.state_dict(), pair.plain.state_dict()
    assert list(grafted) == list(stock)
    assert all(torch.equal(grafted[name], stock[name]) for name in stock)
