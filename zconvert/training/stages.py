"""The stages of the recipe: from a checkpoint and a recipe to a run folder with a new checkpoint in it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zconvert.checkpoint.folder import writing
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.checkpoint.weights import pieces_on_disk, save_gated, save_trained
from zconvert.data.documents import load_documents
from zconvert.data.packing import PackedRows
from zconvert.errors import UserError
from zconvert.recipe import TrainingRecipe, dump_recipe
from zconvert.tidar.settings import TidarSettings
from zconvert.training.loop import Interrupted, Observer, OnProgress, Progress, Trainer
from zconvert.training.parallel import Parallel


def train(recipe: TrainingRecipe, on_progress: OnProgress, observers: Sequence[Observer] = ()) -> Path:
    """Runs a training stage on a converted checkpoint.

    Args:
        recipe: of the stage.
        on_progress: is told what happens, in the first process.
        observers: look at the run after each step, in every process.

    Returns:
        The new checkpoint's folder, `output_dir/checkpoint`.

    Raises:
        UserError: bad input; nothing is half-written.
        Interrupted: a signal came; the same call continues.
    """
    parallel = Parallel(recipe.parallel)
    run_dir = Path(recipe.output_dir)
    final = run_dir / "checkpoint"
    if final.exists():
        raise UserError(
            f"{final} exists already: this run is complete",
            fix="choose another output_dir, or remove that folder to train anew or further",
        )
    source = resolve(recipe.base_model, revision=recipe.revision)
    settings = require_converted(source)
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed + parallel.rank)  # dropout, if there is any, drops other units elsewhere
    _check_chunks(recipe, settings)
    report = on_progress if parallel.first else _say_nothing
    model, tokenizer = parallel.load(source)
    if recipe.experts_implementation is not None:
        _choose_experts(model, recipe.experts_implementation)
    model.config.use_cache = False
    rows_in_embedding = model.get_input_embeddings().weight.shape[0]
    report(Progress(message=f"reading {', '.join(dataset.path for dataset in recipe.datasets)}"))
    documents = load_documents(recipe.datasets, tokenizer, vocabulary_rows=rows_in_embedding)
    rows = PackedRows(
        documents,
        sequence_len=recipe.sequence_len,
        rows=recipe.micro_batch_size,
        seed=recipe.seed,
        sample_packing=recipe.sample_packing,
        pad_token_id=tokenizer.pad_token_id or 0,
        rank=parallel.data_rank,
        world=parallel.data_world,
    )
    if parallel.first:
        _write_recipe(run_dir, recipe)
    trainer = Trainer(model, rows, recipe, settings, report, parallel)
    trainer.observers += observers
    trained = dataclasses.replace(
        settings, block_offset=recipe.diffusion.block_offset, stages=(*settings.stages, recipe.stage)
    )

    def save_checkpoint(folder: Path) -> None:
        report(Progress(message=f"writing {folder}"))
        pieces = pieces_on_disk(model, parallel.gathered) if trainer.gated is None else iter(())
        if not parallel.first:
            collections.deque(pieces, maxlen=0)  # every process gives its shards
        elif trainer.gated is not None:
            save_gated(trainer.gated, source.folder, folder, settings=trained)
        else:
            save_trained(model, source.folder, folder, settings=trained, dtype=recipe.save_dtype, pieces=pieces)
        parallel.gather(None)  # it is there when any process goes on

    trainer.save_checkpoint = save_checkpoint
    try:
        trainer.run()
    except Interrupted:  # all processes together
        parallel.close()
        raise
    save_checkpoint(final)
    parallel.close()
    return final


def _check_chunks(recipe: TrainingRecipe, settings: TidarSettings) -> None:
    """Rows are cut into twice as many chunks as there are processes to share them; none shorter than a block."""
    chunks = 2 * recipe.parallel.context_parallel
    if chunks > 2 and (recipe.sequence_len % chunks or recipe.sequence_len // chunks < max(4, settings.block_size)):
        raise UserError(
            f"sequence_len is {recipe.sequence_len} with parallel.context_parallel {chunks // 2}",
            expected=f"a multiple of {chunks}, and at least {chunks * max(4, settings.block_size)}",
            fix="change sequence_len, or let fewer processes share a row",
        )


def _say_nothing(_progress: Progress) -> None:
    pass


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
