"""Mask slots for some blocks of a row: which are drawn, and that what is left changes nothing for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.contracts.models import MASK, Pair, random_ids, shared_random_pair
from tests.training.runs import make_run, metrics_of
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.layout import NO_SLOT, PADDING, packed_layout
from zconvert.training import loop, stages
from zconvert.training.objective import Targets, packed_losses
from zconvert.training.slots import draw_slots, row_generators

BLOCK, LENGTH = 4, 26
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 12 + [2] * 7, [0] * 17 + [PADDING] * 9])
BATCH: Any = SimpleNamespace(
    input_ids=random_ids((2, LENGTH), seed=3),
    document_ids=DOCUMENTS,
    loss_mask=torch.arange(LENGTH).expand(2, LENGTH) > 4,
)
SCORED = BATCH.loss_mask & (DOCUMENTS != PADDING)


def draw(fraction: float, seed: int = 0, scored: Tensor = SCORED) -> Tensor:
    return draw_slots(DOCUMENTS, scored, BLOCK, 1, fraction, row_generators(seed, range(len(DOCUMENTS))))


def test_whole_blocks_are_drawn_of_those_that_are_scored_until_the_share_is_full() -> None:
    blocks = packed_layout(DOCUMENTS, BLOCK, 1).block_ids[:, LENGTH:]
    drawn = torch.zeros(2, LENGTH)
    for seed in range(50):
        slots = draw(0.5, seed)
        assert slots.shape == (2, 13)
        for row in range(2):
            kept = [int(i) for i in slots[row] if i != NO_SLOT]
            assert kept == sorted(set(kept))
            assert slots[row, len(kept) :].tolist() == [NO_SLOT] * (13 - len(kept))
            assert len(kept) > 13 - BLOCK, "no further block would have fitted"
            names = set(blocks[row, kept].tolist())
            assert kept == [i for i in range(LENGTH) if int(blocks[row, i]) in names], "whole blocks"
            assert all(SCORED[row][blocks[row] == name].any() for name in names)
            drawn[row, kept] += 1
    wanted = torch.stack([(blocks[row][:, None] == blocks[row][SCORED[row]]).any(1) for row in range(2)])
    assert torch.equal(drawn > 0, wanted), "every scored block has its turn, and no other"


def test_all_of_a_short_answer_is_kept() -> None:
    answer = SCORED & (torch.arange(LENGTH) > 20)
    slots = draw(0.4, scored=answer)
    assert Targets.of(SimpleNamespace(**{**vars(BATCH), "loss_mask": answer}), slots).diffusion.sum() == answer.sum()
    assert not answer[1].any()
    assert (slots[1] == NO_SLOT).all()


def names(layout: Any, slots: Tensor) -> list[list[Any]]:
    """What stands in each column of a row: a token, or the slot of a token."""
    clean = [[("token", i) for i in range(LENGTH)] for _ in range(len(slots))]
    return [row + [("slot", int(i)) for i in line] for row, line in zip(clean, slots, strict=True)]


def test_a_kept_slot_is_laid_out_as_among_all_slots() -> None:
    every = torch.arange(LENGTH).expand(2, LENGTH)
    full, slots = packed_layout(DOCUMENTS, BLOCK, 1), draw(0.5)
    part = packed_layout(DOCUMENTS, BLOCK, 1, slots)
    full_names, part_names = names(full, every), names(part, slots)
    for row in range(2):
        for column, name in enumerate(part_names[row]):
            if name == ("slot", NO_SLOT):
                assert part.document_ids[row, column] == PADDING
                continue
            there = full_names[row].index(name)
            for field in ("position_ids", "clean_limit", "block_ids", "document_ids"):
                assert getattr(part, field)[row, column] == getattr(full, field)[row, there], (field, name)
            before, expected = int(part.predecessors[row, column]), int(full.predecessors[row, there])
            assert (before < 0) == (expected < 0)
            assert before < 0 or part_names[row][before] == full_names[row][expected]
    assert part.first_slot == LENGTH


@pytest.mark.parametrize("name", ["zaya_sliding", "mixtral_sliding", "qwen3_moe"])
@pytest.mark.parametrize("objective", ["data", "forward_kl"])
def test_losses_of_kept_slots_are_those_among_all_slots(name: str, objective: Any) -> None:
    pair: Pair = shared_random_pair(name)
    slots = draw(0.5)

    def losses(batch: Any, kept: Tensor | None) -> tuple[float, float, list[int], list[int]]:
        with torch.no_grad():
            sums = packed_losses(
                pair.layout, batch, mask_token_id=MASK, block_size=BLOCK, offset=1, slots=kept, objective=objective
            )
        return sums.ar.item(), sums.diffusion.item(), sums.slot_correct.tolist(), sums.slot_count.tolist()

    found = losses(BATCH, slots)
    only = torch.zeros_like(SCORED)
    for row in range(2):
        only[row, slots[row][slots[row] != NO_SLOT]] = True
    expected = losses(SimpleNamespace(**{**vars(BATCH), "loss_mask": SCORED & only}), None)
    assert found[0] == pytest.approx(losses(BATCH, None)[0], rel=1e-5), "the AR loss does not change"
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert found[2:] == expected[2:]
    assert sum(found[3]) == int(Targets.of(BATCH, slots).diffusion.sum())


def test_a_run_with_half_the_slots_learns_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(loop, "row_generators", lambda seed, rows: drawn.extend(rows) or row_generators(seed, rows))
    diffusion = {"block_offset": "random", "diffusion_fraction": 0.5}
    settings = make_run(tmp_path, save_dtype="float32", max_steps=8, save_steps=4, diffusion=diffusion)
    whole = load_file(stages.train(MidtrainRecipe(**settings), lambda _: None) / "model.safetensors")
    assert drawn == list(range(8 * 2 * 2)), "each row of each forward of each step by a number of its own"
    rows = metrics_of(tmp_path / "run")
    assert rows[-1]["loss_diffusion"] < rows[0]["loss_diffusion"]
    state = next((tmp_path / "run").rglob("*step*4*"))
    other = {**settings, "output_dir": str(tmp_path / "other"), "resume_from_checkpoint": str(state)}
    resumed = load_file(stages.train(MidtrainRecipe(**other), lambda _: None) / "model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert metrics_of(tmp_path / "other") == rows[4:]
