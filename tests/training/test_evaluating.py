"""Evaluation during a run: measured on held-out rows by both losses and by decoding, and harmless to the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import make_run, metrics_of
from zconvert.checkpoint.load import end_token_ids, load_model
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.data.documents import Document, Documents
from zconvert.data.loading import load_documents
from zconvert.data.packing import PackedRows
from zconvert.errors import UserError
from zconvert.evaluation.bench import bench, entry_of, points
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.model import LayoutModel
from zconvert.training import stages
from zconvert.training.evaluating import held_out_prompts, held_out_rows
from zconvert.training.loop import Trainer
from zconvert.training.watching import observers_of


def documents(*lengths: int) -> Documents:
    return Documents.of(Document(list(range(10, 10 + n)), [True] * n) for n in lengths)


def test_prompts_are_beginnings_that_leave_half_of_a_document_to_go_on_with() -> None:
    found = held_out_prompts(documents(1, 4, 20, 9), prompts=2, prompt_tokens=5)
    assert found == [[10, 11], [10, 11, 12, 13, 14]]


def test_held_out_rows_are_no_more_than_there_is_data_for() -> None:
    rows = held_out_rows(documents(8, 8, 8), rows=100, sequence_len=8, rows_per_batch=2, pad=0)
    assert [batch.input_ids.shape for batch in rows] == [(2, 8)]


def with_evaluation(folder: Path, model_type: str = "zaya", **changes: Any) -> dict[str, Any]:
    settings = make_run(folder, model_type, max_steps=5, logging_steps=1, **changes)
    held_out = folder / "held_out.jsonl"
    held_out.write_text(
        "".join(json.dumps({"text": f"seven men sing {n} to the stone. " * 2}) + "\n" for n in range(6))
    )
    evaluation = {"datasets": [{"path": str(held_out)}], "steps": 2, "rows": 4, "prompts": 2, "new_tokens": 10}
    return {**settings, "evaluation": evaluation}


def train(settings: dict[str, Any], say: Callable[[str | None], None] = lambda _: None) -> Path:
    return stages.train(MidtrainRecipe(**settings), lambda progress: say(progress.message))


def test_held_out_data_that_are_missing_are_told_before_anything_is_read(tmp_path: Path) -> None:
    missing = {"datasets": [{"path": str(tmp_path / "nowhere.jsonl")}], "steps": 2}
    recipe = MidtrainRecipe.model_validate(make_run(tmp_path, evaluation=missing))
    said: list[object] = []
    with pytest.raises(UserError, match="nowhere"):
        stages.train(recipe, said.append)
    assert said == []


def test_bad_rows_of_held_out_data_that_are_left_out_are_told_of(tmp_path: Path) -> None:
    settings = with_evaluation(tmp_path)
    (held_out,) = settings["evaluation"]["datasets"]
    with open(held_out["path"], "a") as file:
        file.write("no row\n")
    held_out["on_bad_row"] = "skip"
    said: list[str | None] = []
    train({**settings, "max_steps": 1, "save_steps": 1, "warmup_steps": 0}, said.append)
    assert [text for text in said if text is not None and "held_out.jsonl is not JSON" in text]


@pytest.mark.parametrize("model_type", ["zaya", "mixtral"])
def test_evaluating_changes_nothing_of_the_run(tmp_path: Path, model_type: str) -> None:
    settings = with_evaluation(tmp_path, model_type, gradient_checkpointing=True)
    watched = metrics_of(train(settings).parent)
    del settings["evaluation"]
    plain = metrics_of(train({**settings, "output_dir": str(tmp_path / "plain")}).parent)
    assert ["evaluation" in row for row in watched] == [False, True, False, True, True]
    for row in watched:
        row.pop("evaluation", None)
    assert watched == plain


def trainer_of(settings: dict[str, Any]) -> tuple[Trainer, Any]:
    recipe = MidtrainRecipe(**settings)
    source = resolve(recipe.base_model)
    model, tokenizer = load_model(source, dtype="float32", device="cpu")
    loaded = load_documents(recipe.datasets, tokenizer)
    rows = PackedRows(loaded, sequence_len=32, rows=2, seed=0, sample_packing=True, pad_token_id=0)
    return Trainer(model, rows, recipe, require_converted(source), lambda _: None), tokenizer


def test_measured_acceptance_is_that_of_bench_and_losses_are_means_over_tokens(tmp_path: Path) -> None:
    trainer, tokenizer = trainer_of(with_evaluation(tmp_path))
    evaluator = observers_of(trainer, tokenizer)[-1]
    found = evaluator.evaluate(trainer)  # type: ignore[attr-defined]
    measured = bench(
        trainer.layout_model,
        evaluator.prompts,  # type: ignore[attr-defined]
        trainer.settings,
        points(max_new_tokens=(10,), mix_weights=(), rivals=()),
        eos_token_ids=end_token_ids(trainer.model, tokenizer),
    )
    lossless = entry_of(measured, sampler="lossless")
    assert lossless is not None
    assert found["tokens_per_forward"] == lossless["tokens_per_forward"]
    # An untrained model guesses: about log(rows of the embedding) nats a token.
    assert found["loss_ar"] == pytest.approx(torch.tensor(64.0).log().item(), abs=0.3)
    assert found["loss"] == pytest.approx((found["loss_ar"] + found["loss_diffusion"]) / 2)
    assert len(found["slot_accuracy"]) == trainer.settings.block_size


def test_the_model_goes_back_to_training_mode(tmp_path: Path) -> None:
    trainer, tokenizer = trainer_of(with_evaluation(tmp_path))
    trainer.model.train()
    evaluator = observers_of(trainer, tokenizer)[-1]
    evaluator.evaluate(trainer)  # type: ignore[attr-defined]
    assert trainer.model.training
    assert isinstance(trainer.layout_model, LayoutModel)
