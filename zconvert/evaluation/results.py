"""Samples and scores → `results.json`: pass@k with intervals, speed, what went wrong, differences and verdicts.

{"checkpoint": …, "n": 16, "k": [1, 4], "reference": "baseline", …,
 "tasks": {"gsm8k": {"problems": 200,
                     "columns": {"lossless": {"pass@1": 0.71, "pass@4": 0.84,
                                              "interval": {"pass@1": [0.66, 0.76], …},
                                              "tokens_per_forward": 5.1, "tokens_per_second": 660.0, …,
                                              "verdict": "no difference found",
                                              "difference": {"baseline": {"pass@1": {…}}, "ar": {…}}}}}}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zconvert.errors import UserError
from zconvert.evaluation.samplers import AR, BASELINE
from zconvert.evaluation.samples import (
    RESULTS_FILE,
    Sample,
    key_of,
    read_lines,
    read_settings,
    samples_file,
    scores_file,
    write_json,
)
from zconvert.evaluation.statistics import difference, interval_of_mean, pass_at_k
from zconvert.formats import EVALUATION


def check_k(ks: Sequence[int], n: int) -> None:
    """Raises a `UserError` where pass@k cannot be had from n samples."""
    for k in ks:
        if not 1 <= k <= n:
            raise UserError(
                f"pass@{k} cannot be estimated from {n} samples a problem",
                found=f"k = {k}, n = {n}",
                expected="k from 1 to n",
                fix=f"--n {k}" if k > n else "choose another --k",
            )


def write_results(folder: Path, problems: dict[str, list[str]]) -> dict[str, Any]:
    """Puts everything that was scored into `results.json`.

    Args:
        folder: of the evaluation.
        problems: task → names of the problems that were asked.

    Returns:
        what was written.

    Raises:
        UserError: samples or scores are missing, or a k is above n.
    """
    settings = read_settings(folder)
    check_k(settings["k"], settings["n"])
    columns = settings["columns"]
    reference = BASELINE if BASELINE in columns else AR if AR in columns else None
    tasks = {name: _task(folder, settings, name, problems[name], columns) for name in problems}
    about = {key: value for key, value in settings.items() if key not in ("tasks", "columns", "format_version")}
    document = {"format_version": EVALUATION, **about, "reference": reference, "tasks": tasks}
    write_json(folder / RESULTS_FILE, document)
    return document


def _task(folder: Path, settings: dict[str, Any], name: str, ids: list[str], columns: list[str]) -> dict[str, Any]:
    n, ks = settings["n"], settings["k"]
    entries: dict[str, dict[str, Any]] = {}
    each: dict[str, dict[int, list[float]]] = {}
    for column in columns:
        samples = _complete(samples_file(folder, name, column), ids, n)
        scores = _complete(scores_file(folder, name, column), ids, n)
        right = Counter(score["task_id"] for score in scores if score["right"])
        each[column] = {k: [pass_at_k(n, right[problem], k) for problem in ids] for k in ks}
        entries[column] = {**_quality(each[column], settings["seed"]), **_speed(samples), **_faults(samples, scores)}
    for column, entry in entries.items():
        others = [other for other in (BASELINE, AR) if other in columns and other != column != BASELINE]
        entry["difference"] = {
            other: {
                f"pass@{k}": difference(
                    each[column][k], each[other][k], margin=settings["margin"], seed=settings["seed"]
                ).to_dict()
                for k in ks
            }
            for other in others
        }
        entry["verdict"] = entry["difference"][others[0]][f"pass@{ks[0]}"]["verdict"] if others else None
        if AR in entries and column != AR:
            entry["speedup"] = entry["tokens_per_second"] / entries[AR]["tokens_per_second"]
    return {"problems": len(ids), "columns": entries}


def _complete(path: Path, ids: list[str], n: int) -> list[Sample]:
    wanted = {(problem, sample) for problem in ids for sample in range(n)}
    found = {key_of(row): row for row in read_lines(path)}
    missing = len(wanted - found.keys())
    if missing:
        raise UserError(
            f"{path} is not complete",
            found=f"{len(wanted) - missing} of {len(wanted)}",
            fix="run `zconvert evaluate` again with the same options: it goes on; then score",
        )
    return [found[key] for key in sorted(wanted)]


def _quality(each: dict[int, list[float]], seed: int) -> dict[str, Any]:
    means = {f"pass@{k}": sum(values) / len(values) for k, values in each.items()}
    intervals = {f"pass@{k}": list(interval_of_mean(v, low=0.0, high=1.0, seed=seed)) for k, v in each.items()}
    return {**means, "interval": intervals}


def _speed(samples: list[Sample]) -> dict[str, Any]:
    """The first token of a text comes from its prefill, so tokens per forward leave it out, as in `zconvert bench`."""
    tokens, seconds = sum(s["tokens"] for s in samples), sum(s["seconds"] for s in samples)
    return {
        "tokens_per_forward": (tokens - len(samples)) / max(1, sum(s["forwards"] for s in samples)),
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "mean_tokens": tokens / len(samples),
        "samples": len(samples),
        "seconds": seconds,
    }


def _faults(samples: list[Sample], scores: list[Sample]) -> dict[str, Any]:
    count = len(scores)
    faults: dict[str, Any] = {
        "cut_off": sum(score["cut_off"] for score in scores) / count,
        "without_answer": sum(score["answer"] is None for score in scores) / count,
        "looping": sum(score["loops"] for score in scores) / count,
    }
    reasons = Counter(score["reason"] for score in scores if "reason" in score)
    return {**faults, "reasons": dict(reasons.most_common())} if reasons else faults
