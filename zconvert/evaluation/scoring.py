"""Samples → scores: which are right, where the answer was, and what went wrong. May be repeated at any time.

Answers in text are judged here, programs in processes of their own, several at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zconvert.errors import UserError
from zconvert.evaluation.answers import extract, is_right, loops, require_maths
from zconvert.evaluation.samples import Sample, read_lines, samples_file, scores_file, write_whole
from zconvert.evaluation.sandbox import Limits, check_sandbox, run_code
from zconvert.evaluation.tasks import Problem, Task, fill, program_of
from zconvert.serving.text import StopStrings

Progress = Callable[[str, str, int, int], None]
"""told after each sample: task, column, samples scored of the column, samples in all of the column"""


def require_scorable(tasks: list[Task], *, allow_code_exec: bool) -> None:
    """Tells before anything is generated what scoring would fail for.

    Raises:
        UserError: programs would have to be run and may not, or cannot be here; a library is missing.
    """
    code = [task.name for task in tasks if task.is_code]
    if code and not allow_code_exec:
        raise UserError(
            f"the task {code[0]} is scored by running programs that the model wrote",
            found="no --allow-code-exec",
            fix="--allow-code-exec, after reading docs/evaluation.md; or --no-score, to make the samples alone",
        )
    if code:
        check_sandbox()
    if any(task.recipe.check.method == "math" for task in tasks):
        require_maths()


def score(
    folder: Path,
    task: Task,
    problems: list[Problem],
    columns: list[str],
    *,
    allow_code_exec: bool = False,
    on_progress: Progress | None = None,
) -> None:
    """Scores all samples of a task; scores that are there are replaced.

    Args:
        folder: of the evaluation.
        task: whose samples.
        problems: of the task, those that were sampled.
        columns: whose samples.
        allow_code_exec: run programs that the model wrote.
        on_progress: told after each sample.

    Raises:
        UserError: see `require_scorable`; a sample is of a problem that is not there.
    """
    require_scorable([task], allow_code_exec=allow_code_exec)
    known = {problem.id: problem for problem in problems}
    for column in columns:
        samples = [s for s in read_lines(samples_file(folder, task.name, column)) if s["task_id"] in known]
        scores = []
        for entry in _scores(task, known, samples):
            scores.append(entry)
            if on_progress is not None:
                on_progress(task.name, column, len(scores), len(samples))
        write_whole(scores_file(folder, task.name, column), scores)


def check_solutions(
    task: Task, problems: list[Problem], *, on_progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]] | None:
    """Scores the right answers that a task's rows have, as if a model had given them: a test of the task.

    Args:
        task: of code, only where it may be run.
        problems: of the task.
        on_progress: told after each: how many, of how many.

    Returns:
        a score for each problem, `right` where all is well; None where the rows have no solutions.

    Raises:
        UserError: a row lacks something.
    """
    template = task.recipe.solution
    if template is None:
        return None
    texts = [_up_to(task.recipe.stop, fill(template, problem.row, problem.id)) for problem in problems]
    samples = [
        {"task_id": problem.id, "sample": 0, "completion": text, "finish": "eos"}
        for problem, text in zip(problems, texts, strict=True)
    ]
    scores = []
    for entry in _scores(task, {problem.id: problem for problem in problems}, samples):
        scores.append(entry)
        if on_progress is not None:
            on_progress(len(scores), len(samples))
    return scores


def _up_to(strings: list[str], text: str) -> str:
    stops = StopStrings(strings)
    return stops.add(text) + stops.flush()


def _scores(task: Task, problems: dict[str, Problem], samples: list[Sample]) -> Iterator[dict[str, Any]]:
    if not task.is_code:
        for sample in samples:
            problem = problems[sample["task_id"]]
            answer = extract(sample["completion"], task.recipe.answer)
            assert problem.target is not None, "only code tasks have no target"
            yield _entry(sample, is_right(answer, problem.target, task.recipe.check), answer)
        return
    check = task.recipe.check
    limits = Limits(seconds=check.seconds, memory_mb=check.memory_mb)

    def judge(sample: Sample) -> dict[str, Any]:
        answer = extract(sample["completion"], task.recipe.answer)
        if answer is None:
            return _entry(sample, False, None)
        outcome = run_code(program_of(task, problems[sample["task_id"]].row, answer), limits)
        return {**_entry(sample, outcome.passed, answer), "reason": outcome.reason, "detail": outcome.detail}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(judge, samples)


def _entry(sample: Sample, right: bool, answer: str | None) -> dict[str, Any]:
    return {
        "task_id": sample["task_id"],
        "sample": sample["sample"],
        "right": right,
        "answer": answer,
        "cut_off": sample["finish"] == "length",
        "loops": loops(sample["completion"]),
    }
