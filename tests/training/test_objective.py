"""The losses: what is scored, and that micro-batches do not change them."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from tests.contracts.models import shared_random_pair
from tests.contracts.reference import block_logits, causal_logits
from zconvert.data.packing import Batch
from zconvert.tidar.layout import PADDING
from zconvert.training.objective import Targets, packed_losses
from zconvert.training.slots import random_offsets, row_generators

BLOCK, MASK = 4, 63


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, 12), generator=generator)
    documents = torch.tensor([[0] * 7 + [1] * 5, [0] * 9 + [PADDING] * 3])
    loss_mask = torch.ones_like(ids, dtype=torch.bool)
    loss_mask[0, :2] = False
    return Batch(ids, documents, loss_mask)


def test_padding_first_tokens_and_unscored_tokens_are_no_targets() -> None:
    targets = Targets.of(_batch())
    assert targets.diffusion.int().tolist() == [[0, 0] + [1] * 10, [1] * 9 + [0] * 3]
    # A clean logit is scored where the token after it is, within the document.
    assert targets.ar.int().tolist() == [[0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0], [1] * 8 + [0] * 4]


DOCUMENTS = ((0, slice(0, 7)), (0, slice(7, 12)), (1, slice(0, 9)))
"""row and columns of each"""


@pytest.mark.parametrize("name", ["zaya_sliding", "qwen3_moe"])
def test_the_ar_loss_is_the_plain_models_loss_on_each_document(name: str) -> None:
    pair, batch = shared_random_pair(name), _batch()
    with torch.no_grad():
        sums = packed_losses(pair.layout, batch, mask_token_id=MASK, block_size=BLOCK)
        expected = 0.0
        for row, columns in DOCUMENTS:
            ids, scored = batch.input_ids[row, columns], batch.loss_mask[row, columns]
            losses = F.cross_entropy(causal_logits(pair.plain, ids)[:-1], ids[1:], reduction="none")
            expected += losses[scored[1:]].sum().item()
    assert sums.ar.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["zaya_sliding", "qwen3_moe"])
@pytest.mark.parametrize("objective", ["data", "forward_kl", "total_variation"])
@torch.no_grad()
def test_mask_slots_learn_their_own_token_or_what_the_plain_model_says_there_of_their_document_alone(
    objective: Literal["data", "forward_kl", "total_variation"], name: str
) -> None:
    pair, batch = shared_random_pair(name), _batch()
    sums = packed_losses(pair.layout, batch, mask_token_id=MASK, block_size=BLOCK, offset=1, objective=objective)
    expected, correct, count = 0.0, torch.zeros(BLOCK), torch.zeros(BLOCK)
    for row, columns in DOCUMENTS:
        ids, scored = batch.input_ids[row, columns], batch.loss_mask[row, columns]
        p = F.one_hot(ids, pair.config.vocab_size).float()
        if objective != "data":  # AR predicts all tokens but a document's first, which is learnt from the data
            p[1:] = causal_logits(pair.plain, ids)[:-1].softmax(-1)
        for start, end in pairwise([0, *range(BLOCK - 1, len(ids), BLOCK), len(ids)]):
            q = block_logits(pair.plain, ids[:start], end - start).softmax(-1)
            target, here = p[start:end], scored[start:end]
            apart = (
                (q - target).abs() / 2 if objective == "total_variation" else torch.special.xlogy(target, target / q)
            )
            expected += apart[here].sum().item()
            count[: end - start] += here
            correct[: end - start] += here & (target.argmax(-1) == q.argmax(-1))
    assert sums.diffusion.item() == pytest.approx(expected, rel=1e-5)
    assert (sums.slot_correct.tolist(), sums.slot_count.tolist()) == (correct.tolist(), count.tolist())


def test_rows_together_give_the_sum_of_the_rows_apart() -> None:
    pair, batch = shared_random_pair("mixtral"), _batch()

    def run(rows: slice) -> tuple[float, float, list[int]]:
        part = Batch(batch.input_ids[rows], batch.document_ids[rows], batch.loss_mask[rows])
        with torch.no_grad():
            sums = packed_losses(pair.layout, part, mask_token_id=MASK, block_size=BLOCK)
        return sums.ar.item(), sums.diffusion.item(), sums.slot_count.tolist()

    both, first, second = run(slice(0, 2)), run(slice(0, 1)), run(slice(1, 2))
    assert both[0] == pytest.approx(first[0] + second[0], rel=1e-5)
    assert both[1] == pytest.approx(first[1] + second[1], rel=1e-5)
    assert both[2] == [a + b for a, b in zip(first[2], second[2], strict=True)]
    # Blocks of 4 in documents of 7, 5 and 9 tokens, the first two tokens not scored.
    assert both[2] == [2 + 2 + 3 - 1, 2 + 1 + 2 - 1, 2 + 1 + 2, 1 + 1 + 2]


def test_a_random_phase_is_one_for_each_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, PADDING, PADDING]])
    offsets = random_offsets(documents, 16, row_generators(0, range(2)))
    assert offsets.shape == documents.shape
    for document in range(3):
        assert len(set(offsets[0][documents[0] == document].tolist())) == 1
    assert int(offsets.min()) >= 0
    assert int(offsets.max()) < 16
    assert set(random_offsets(torch.arange(60)[None], 4, row_generators(0, [0])).flatten().tolist()) == {0, 1, 2, 3}
    # A row's phases are its own: whichever rows stand beside it, whichever process has it.
    assert torch.equal(random_offsets(documents[1:], 16, row_generators(0, [1])), offsets[1:])
    assert not torch.equal(random_offsets(documents[1:], 16, row_generators(1, [1])), offsets[1:])
