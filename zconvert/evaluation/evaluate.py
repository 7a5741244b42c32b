"""`zconvert evaluate` from end to end: samples, scores, results, report; and the last three again for an old folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zconvert.checkpoint.folder import TUNING_FILE, own_folder
from zconvert.checkpoint.load import end_token_ids
from zconvert.checkpoint.source import Source
from zconvert.errors import UserError
from zconvert.evaluation import samples, scoring
from zconvert.evaluation.report import write_report
from zconvert.evaluation.results import check_k, write_results
from zconvert.evaluation.samplers import BASELINE, sampler_weights
from zconvert.evaluation.sampling import Column, Progress, ask, make_samples, plans_of
from zconvert.evaluation.tasks import Problem, Task, load_task, problems_of
from zconvert.formats import EVALUATION
from zconvert.page import require_drawing
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan
from zconvert.tidar.generate import layout_model_of
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import TidarSettings


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    tasks: Sequence[str]
    """as `load_task` takes them"""
    samplers: Sequence[str] = ("ar", "lossless")
    k: Sequence[int] = (1,)
    n: int = 1
    """samples of each problem"""
    sampling: Sampling = field(default_factory=Sampling)
    limit: int | None = None
    """problems of each task, from the start; None: all"""
    max_new_tokens: int | None = None
    """None: each task's own"""
    chat: bool | None = None
    """None: each task's own"""
    batch_size: int = 8
    seed: int = 0
    margin: float = 0.02
    """the smallest difference in pass@k that matters"""
    proposals: tuple[int, ...] | None = None
    block_size: int | None = None
    two_forwards: bool = False

    def __post_init__(self) -> None:
        check_k(self.k, self.n)
        sampler_weights(self.samplers)
        if self.n > 1 and self.sampling.greedy:
            raise UserError(
                "greedy decoding gives the same text every time",
                found=f"temperature 0 and n = {self.n}",
                fix="--temperature 0.8, or --n 1 and --k 1",
            )

    def decoding(self, settings: TidarSettings, eos_token_ids: frozenset[int] = frozenset()) -> dict[str, DecodePlan]:
        """Sampler → how it decodes a checkpoint with these settings.

        Raises:
            UserError: it was not trained for that.
        """
        return plans_of(
            settings,
            sampler_weights(self.samplers),
            self.sampling,
            eos_token_ids,
            proposals=self.proposals,
            block_size=self.block_size,
            two_forwards=self.two_forwards,
        )


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory."""

    source: Source
    model: Any
    tokenizer: Any


def evaluate(
    folder: Path,
    plan: Plan,
    settings: TidarSettings,
    checkpoint: Loaded,
    baseline: Loaded | None = None,
    *,
    with_scores: bool = True,
    allow_code_exec: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_score: scoring.Progress | None = None,
) -> dict[str, Any] | None:
    """Measures a checkpoint, or goes on with it where an earlier run was interrupted.

    Args:
        folder: of the evaluation.
        plan: what is to be measured.
        settings: the checkpoint's.
        checkpoint: the converted model.
        baseline: another to compare with, decoded by plain AR; its tokenizer is not used.
        with_scores: False makes the samples alone.
        allow_code_exec: run programs that the model wrote.
        on_progress: told after each sample made.
        on_score: told after each sample scored.

    Returns:
        what `write_results` wrote; None without scores.

    Raises:
        UserError: a task, an option or the folder does not fit, or another process writes to the folder.
    """
    tasks = [load_task(name) for name in plan.tasks]
    if with_scores:
        require_drawing()
        scoring.require_scorable(tasks, allow_code_exec=allow_code_exec)
    positions = getattr(checkpoint.model.config.get_text_config(), "max_position_embeddings", None)
    asked = [
        ask(
            task,
            problems_of(task, plan.limit),
            checkpoint.tokenizer,
            chat=task.recipe.chat if plan.chat is None else plan.chat,
            max_new_tokens=plan.max_new_tokens,
            positions=positions,
        )
        for task in tasks
    ]
    eos = end_token_ids(checkpoint.model, checkpoint.tokenizer)
    model = layout_model_of(checkpoint.model)
    columns = [Column(name, model, how) for name, how in plan.decoding(settings, eos).items()]
    if baseline is not None:
        ar = DecodePlan.autoregressive(settings.mask_token_id, plan.sampling, eos)
        columns.insert(0, Column(BASELINE, LayoutModel(baseline.model), ar))
    about = _about(plan, settings, checkpoint, baseline)
    told = {task.name: _told(task, argument, plan) for task, argument in zip(tasks, plan.tasks, strict=True)}
    with own_folder(folder):
        samples.go_on_with(folder, {**about, "columns": [column.name for column in columns], "tasks": told})
        make_samples(
            folder,
            asked,
            columns,
            checkpoint.tokenizer,
            n=plan.n,
            seed=plan.seed,
            batch_size=plan.batch_size,
            on_progress=on_progress,
        )
        if not with_scores:
            return None
        problems = [(one.task, one.problems) for one in asked]
        return _score(folder, problems, allow_code_exec=allow_code_exec, on_score=on_score)


def rescore(folder: Path, *, allow_code_exec: bool = False, on_score: scoring.Progress | None = None) -> dict[str, Any]:
    """Scores the samples of an evaluation again, by the tasks as they are now, and reports anew.

    Args:
        folder: of the evaluation.
        allow_code_exec: run programs that the model wrote.
        on_score: told after each sample.

    Raises:
        UserError: it is no such folder, is not complete, or a task is not to be had.
    """
    told = samples.read_settings(folder)["tasks"]
    tasks = [(load_task(task["argument"]), task["limit"]) for task in told.values()]
    problems = [(task, problems_of(task, limit)) for task, limit in tasks]
    with own_folder(folder):
        return _score(folder, problems, allow_code_exec=allow_code_exec, on_score=on_score)


def _score(
    folder: Path,
    problems: list[tuple[Task, list[Problem]]],
    *,
    allow_code_exec: bool,
    on_score: scoring.Progress | None,
) -> dict[str, Any]:
    columns = samples.read_settings(folder)["columns"]
    for task, asked in problems:
        scoring.score(folder, task, asked, columns, allow_code_exec=allow_code_exec, on_progress=on_score)
    results = write_results(folder, {task.name: [problem.id for problem in asked] for task, asked in problems})
    write_report(folder, results)
    return results


def _about(plan: Plan, settings: TidarSettings, checkpoint: Loaded, baseline: Loaded | None) -> dict[str, Any]:
    device = checkpoint.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "format_version": EVALUATION,
        "checkpoint": _identity(checkpoint.source),
        "baseline": None if baseline is None else _identity(baseline.source),
        "mode": settings.mode,
        "n": plan.n,
        "k": list(plan.k),
        "temperature": plan.sampling.temperature,
        "top_k": plan.sampling.top_k,
        "top_p": plan.sampling.top_p,
        "seed": plan.seed,
        "block_size": plan.block_size or settings.block_size,
        "proposals": None if plan.proposals is None else list(plan.proposals),
        "two_forwards": plan.two_forwards,
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "margin": plan.margin,
        "batch_size": plan.batch_size,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def _identity(source: Source) -> dict[str, Any]:
    """What tells a checkpoint from another, or from what is later written in its place."""
    if source.revision is not None:
        return {"name": source.name, "revision": source.revision}
    files = sorted(path for path in source.folder.iterdir() if path.suffix in (".safetensors", ".json"))
    files = [path for path in files if path.name != TUNING_FILE]  # grows while others decode with the checkpoint
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"name": source.name, "revision": None, "files": stamps}


def _processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def _told(task: Task, argument: str, plan: Plan) -> dict[str, Any]:
    asked = task.recipe.model_dump(mode="json", exclude={"description", "answer", "check"})
    changed = {"max_new_tokens": plan.max_new_tokens, "chat": plan.chat}
    asked |= {key: value for key, value in changed.items() if value is not None}
    return {"argument": argument, "limit": plan.limit, "asked": asked}
