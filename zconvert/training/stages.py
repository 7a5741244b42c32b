"""The stages of the recipe: from a checkpoint and a recipe to a run folder with a new checkpoint in it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from zconvert.checkpoint.folder import writing
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.checkpoint.weights import save_gated, save_trained
from zconvert.data.documents import Documents, load_documents
from zconvert.data.packing import PackedRows
from zconvert.errors import UserError
from zconvert.recipe import ExtendContextRecipe, TrainingRecipe, dump_recipe
from zconvert.tidar.model import LayoutModel
from zconvert.training.context import ContextExtension
from zconvert.training.loop import OnProgress, Progress, Trainer
from zconvert.training.trackers import Trackers
from zconvert.training.watching import observers_of


def train(recipe: TrainingRecipe, on_progress: OnProgress) -> Path:
    """Runs a training stage on a converted checkpoint.

    Args:
        recipe: of the stage.
        on_progress: is told what happens.

    Returns:
        The new checkpoint's folder, `output_dir/checkpoint`.

    Raises:
        UserError: bad input; nothing is half-written.
        Interrupted: a signal came; the same call continues.
    """
    run_dir = Path(recipe.output_dir)
    final = run_dir / "checkpoint"
    if final.exists():
        raise UserError(
            f"{final} exists already: this run is complete",
            fix="choose another output_dir, or remove that folder to train anew or further",
        )
    trackers = Trackers(recipe)
    source = resolve(recipe.base_model, revision=recipe.revision)
    settings = require_converted(source)
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extension = None
    if isinstance(recipe, ExtendContextRecipe):
        extension = ContextExtension(source, settings, recipe.context, run_dir)
        _report_before(extension, recipe, device, on_progress)
        source = extension.source()
    model, tokenizer = load_model(source, dtype="float32", device=device)
    if recipe.experts_implementation is not None:
        _choose_experts(model, recipe.experts_implementation)
    model.config.use_cache = False
    rows_in_embedding = model.get_input_embeddings().weight.shape[0]
    on_progress(Progress(message=f"reading {', '.join(dataset.path for dataset in recipe.datasets)}"))
    documents = load_documents(recipe.datasets, tokenizer, vocabulary_rows=rows_in_embedding)
    if extension is not None:
        documents = extension.choose(documents, recipe.seed)
    rows = PackedRows(
        documents,
        sequence_len=recipe.sequence_len,
        rows=recipe.micro_batch_size,
        seed=recipe.seed,
        sample_packing=recipe.sample_packing,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    _write_recipe(run_dir, recipe)

    def tell(progress: Progress) -> None:
        if progress.metrics is not None:
            trackers.log(progress.metrics)
        on_progress(progress)

    trainer = Trainer(model, rows, recipe, settings, tell)
    trainer.observers += observers_of(trainer, tokenizer)
    try:
        trainer.run()
    finally:
        trackers.finish()
    if extension is not None:
        extension.report_after(trainer.layout_model, _measured_documents(recipe, tokenizer))
    on_progress(Progress(message=f"writing {final}"))
    trained = dataclasses.replace(
        settings, block_offset=recipe.diffusion.block_offset, stages=(*settings.stages, recipe.stage)
    )
    if trainer.gated is not None:
        save_gated(trainer.gated, source.folder, final, settings=trained)
    else:
        save_trained(model, source.folder, final, settings=trained, dtype=recipe.save_dtype)
    if extension is not None:
        extension.close()
    return final


def _report_before(extension: ContextExtension, recipe: TrainingRecipe, device: str, on_progress: OnProgress) -> None:
    """Measures base_model as it is, with its old positions."""
    on_progress(Progress(message=f"config.json changes: {json.dumps(extension.changes)}"))
    model, tokenizer = load_model(extension.original, dtype="float32", device=device)
    measured_on = ", ".join(dataset.path for dataset in recipe.evaluation.datasets or recipe.datasets)
    documents = _measured_documents(recipe, tokenizer)
    _write_recipe(Path(recipe.output_dir), recipe)
    extension.report_before(lambda: LayoutModel(model), documents, measured_on)


def _measured_documents(recipe: TrainingRecipe, tokenizer: Any) -> Documents:
    """Held-out documents where there are some, else those that are trained on."""
    return load_documents(recipe.evaluation.datasets or recipe.datasets, tokenizer)


def _choose_experts(model: Any, wanted: str) -> None:
    try:
        model.set_experts_implementation(wanted)
    except ValueError as error:
        raise UserError(
            f"experts_implementation {wanted} does not work with this model", found=error, fix="leave it out, or eager"
        ) from error


def _write_recipe(run_dir: Path, recipe: TrainingRecipe) -> None:
    """Puts the recipe, every setting written out, into the run's folder."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(
            f"output_dir {run_dir} is a file", expected="a folder, new or of this run", fix="choose another name"
        )
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        partial = run_dir / "recipe.yaml.partial"
        partial.write_text(dump_recipe(recipe))
        partial.replace(run_dir / "recipe.yaml")
