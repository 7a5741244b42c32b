"""Problems × columns → samples: the same prompts, seeds and budget for every way to decode, on the batched engine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zconvert.checkpoint.load import prompt_ids
from zconvert.data.chat import asking_ids
from zconvert.errors import UserError
from zconvert.evaluation.samples import Key, append, key_of, open_to_append, read_lines, samples_file
from zconvert.evaluation.tasks import Problem, Task, prompt_text
from zconvert.serving.text import GrowingText
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Request, Result
from zconvert.tidar.engine import Engine, run
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import TidarSettings

_WARM_UP_TOKENS = 16
_BATCHES_IN_A_TURN = 16
"""texts that a column decodes at a stretch, in batches: at its end the batch runs empty, which is to cost little"""


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is."""

    task: str
    column: str
    done: int
    """samples, of all tasks and columns"""
    total: int


@dataclass(frozen=True)
class Column:
    """One way to decode."""

    name: str
    """baseline (another model's AR), ar, lossless, or mix:<w>"""
    model: LayoutModel
    plan: DecodePlan


def plans_of(
    settings: TidarSettings,
    weights: dict[str, float | None],
    sampling: Sampling,
    eos_token_ids: frozenset[int] = frozenset(),
    *,
    proposals: tuple[int, ...] | None = None,
    block_size: int | None = None,
    two_forwards: bool = False,
) -> dict[str, DecodePlan]:
    """How each sampler decodes.

    Args:
        settings: the checkpoint's.
        weights: `sampler_weights`.
        sampling: temperature and cut-offs, the same for all.
        eos_token_ids: tokens that end a text.
        proposals: accepted counts that get a block of mask slots; None: the checkpoint's.
        block_size: tokens a forward can yield at most; None: the checkpoint's.
        two_forwards: forwards verify and draft in turns.

    Raises:
        UserError: a setting that the checkpoint was not trained for.
    """
    plans = {}
    try:
        for name, weight in weights.items():
            if weight is None:
                plans[name] = DecodePlan.autoregressive(settings.mask_token_id, sampling, eos_token_ids)
            else:
                plans[name] = DecodePlan.tidar(
                    settings,
                    replace(sampling, mix_weight=weight),
                    eos_token_ids,
                    proposals=proposals,
                    block_size=block_size,
                    two_forwards=two_forwards,
                )
    except ValueError as error:
        raise UserError(f"these options cannot work: {error}", fix="see `zconvert evaluate --help`") from error
    return plans


@dataclass(frozen=True)
class Asked:
    """A task's problems as token ids, the same for every column."""

    task: Task
    problems: list[Problem]
    prompts: list[list[int]]
    max_new_tokens: int


def ask(
    task: Task,
    problems: list[Problem],
    tokenizer: Any,
    *,
    chat: bool,
    max_new_tokens: int | None,
    positions: int | None,
) -> Asked:
    """Turns problems into prompts.

    Args:
        task: their task.
        problems: from `problems_of`.
        tokenizer: the checkpoint's.
        chat: by the chat template.
        max_new_tokens: instead of the task's.
        positions: tokens that a text of the model can have; None: not known.

    Raises:
        UserError: there is no chat template, or a prompt and its answer are too long for the model.
    """
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"the task {task.name} is asked as a chat, and the tokenizer has no chat template",
            fix="--no-chat asks it as plain text",
        )
    budget = max_new_tokens or task.recipe.max_new_tokens
    prompts = []
    for problem in problems:
        ids = asking_ids(problem.messages, tokenizer) if chat else prompt_ids(tokenizer, prompt_text(task, problem))
        if positions is not None and len(ids) + budget > positions:
            raise UserError(
                f"problem {problem.id} of the task {task.name} does not fit the model",
                found=f"{len(ids)} tokens of prompt and {budget} for the answer",
                expected=f"at most {positions} tokens in all",
                fix="--max-new-tokens shortens the answers",
            )
        prompts.append(ids)
    return Asked(task, problems, prompts, budget)


def make_samples(
    folder: Path,
    asked: Sequence[Asked],
    columns: Sequence[Column],
    tokenizer: Any,
    *,
    n: int,
    seed: int,
    batch_size: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Makes the samples that are still missing; each is in its file as soon as its text ends.

    The columns take turns, so that whatever else the machine does hits all of them alike.

    Args:
        folder: of the evaluation.
        asked: from `ask`.
        columns: the ways to decode.
        tokenizer: the checkpoint's.
        n: samples of each problem.
        seed: of the random numbers. A sample's depend on it, the task, the problem and its number, and on nothing else.
        batch_size: texts that are decoded at a time.
        on_progress: told after each sample.

    Raises:
        UserError: samples are there of problems that were asked otherwise, or a file cannot be written.
    """
    done = {(i, j): _done(folder, one, column.name) for i, one in enumerate(asked) for j, column in enumerate(columns)}
    wanted = {i: [(p.id, s) for p in one.problems for s in range(n)] for i, one in enumerate(asked)}
    total = sum(map(len, wanted.values())) * len(columns)
    made = sum(len(done[i, j] & set(wanted[i])) for i, j in done)
    turn = _BATCHES_IN_A_TURN * batch_size
    for i, one in enumerate(asked):
        missing = [[key for key in wanted[i] if key not in done[i, j]] for j in range(len(columns))]
        for start in range(0, max(map(len, missing)), turn):
            for column, keys in zip(columns, missing, strict=True):
                for _ in _sample(folder, one, column, tokenizer, keys[start : start + turn], seed, batch_size):
                    made += 1
                    if on_progress is not None:
                        on_progress(Progress(one.task.name, column.name, made, total))


def _done(folder: Path, asked: Asked, column: str) -> set[Key]:
    digests = {problem.id: problem.digest for problem in asked.problems}
    path = samples_file(folder, asked.task.name, column)
    found = read_lines(path)
    for sample in found:
        if sample["task_id"] in digests and sample["prompt"] != digests[sample["task_id"]]:
            raise UserError(
                f"problem {sample['task_id']} was asked otherwise when {path} was made",
                fix="choose another --out, or remove that file",
            )
    return {key_of(sample) for sample in found}


def _sample(
    folder: Path, asked: Asked, column: Column, tokenizer: Any, missing: list[Key], seed: int, batch_size: int
) -> Iterator[None]:
    if not missing:
        return
    place = {problem.id: index for index, problem in enumerate(asked.problems)}
    stops = asked.task.recipe.stop

    texts: dict[Key, GrowingText] = {}

    def request(key: Key) -> Request:
        prompt = asked.prompts[place[key[0]]]
        texts[key] = GrowingText(tokenizer, prompt, stops)
        number = _seed(seed, asked.task.name, *key)
        stop = texts[key].stop if stops else None
        return Request(prompt, asked.max_new_tokens, seed=number, stop=stop, key=key)

    _warm_up(column, asked.prompts[0])
    engine = Engine(column.model, column.plan, max_batch=batch_size)
    with open_to_append(samples_file(folder, asked.task.name, column.name)) as file:
        before = time.perf_counter()
        for result in run(engine, map(request, missing)):
            now = time.perf_counter()
            problem = asked.problems[place[result.request.key[0]]]
            text = texts.pop(result.request.key)
            text.stop(result.tokens)
            append(file, {**_row(problem, result, text.take(final=True)), "seconds": now - before})
            before = now
            yield


def _warm_up(column: Column, prompt: list[int]) -> None:
    for _ in run(Engine(column.model, column.plan, max_batch=1), [Request(prompt, _WARM_UP_TOKENS, seed=0)]):
        pass


def _row(problem: Problem, result: Result, text: str) -> dict[str, Any]:
    """A line of samples. `seconds`, added to it, is the column's time since the sample before: they sum up to all."""
    return {
        "task_id": problem.id,
        "completion": text,
        "sample": result.request.key[1],
        "finish": result.finish,
        "tokens": len(result.tokens),
        "forwards": result.forwards,
        "prompt": problem.digest,
    }


def _seed(seed: int, task: str, problem: str, sample: int) -> int:
    text = f"{seed}\n{task}\n{problem}\n{sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
