"""A run's folder -> its curves as PNG, and one HTML page that needs no other file.

Everything is read from what a run leaves: `metrics.jsonl`, `routing.json`, `context.json`, `recipe.yaml`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import own_folder
from zconvert.checkpoint.run_folder import METRICS_FILE, REPORT_FOLDER
from zconvert.errors import UserError
from zconvert.page import png, write_page
from zconvert.training.context import CONTEXT_FILE
from zconvert.training.moe import ROUTING_FILE


@dataclass(frozen=True)
class Run:
    """What a run has left so far."""

    folder: Path
    rows: list[dict[str, Any]]
    routing: dict[str, Any]
    context: dict[str, Any]
    recipe: str

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Reads a run's folder; a run may still go on.

        Raises:
            UserError: it is no run's folder, or has no metrics yet.
        """
        rows = []
        try:
            for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:  # a line that is being written
                    break
        except OSError as error:
            raise UserError(
                f"{folder} is not the folder of a training run",
                found=f"{METRICS_FILE}: {error.strerror}",
                expected="the output_dir of a recipe",
                fix="give the run's folder, not its checkpoint",
            ) from error
        if not rows:
            raise UserError(f"{folder} has no metrics yet", fix="wait for its first step that is logged")
        recipe = folder / "recipe.yaml"
        text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
        return cls(folder, rows, _read(folder / ROUTING_FILE), _read(folder / CONTEXT_FILE), text)

    def series(self, *path: str) -> tuple[list[int], list[Any]]:
        """Steps and values of a metric, where it was told; its path through nested keys."""
        steps, values = [], []
        for row in self.rows:
            value: Any = row
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                steps.append(row["step"])
                values.append(value)
        return steps, values


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Draws everything that a run has measured.

    Args:
        run_dir: of a run, which may still go on.
        out: folder to write into; what an earlier report left there is replaced. None: `report/` in the run's folder.

    Returns:
        the page, with the images beside it and also inside.

    Raises:
        UserError: no such run, no matplotlib, or the folder cannot be written.
    """
    run = Run.read(run_dir)
    images = {name: image for name, draw in _FIGURES.items() if (image := _png(draw, run)) is not None}
    folder = run_dir / REPORT_FOLDER if out is None else out
    with own_folder(folder):
        return write_page(folder, _title(run), images, **_page(run))


def _png(draw: Callable[[Run, Any], bool], run: Run) -> bytes | None:
    return png(lambda figure: draw(run, figure.subplots()))


def _losses(run: Run, axes: Any) -> bool:
    for key, label in (("loss_ar", "AR"), ("loss_diffusion", "diffusion")):
        (line,) = axes.plot(*run.series(key), label=label)
        steps, values = run.series("evaluation", key)
        if steps:
            axes.plot(steps, values, "o--", color=line.get_color(), label=f"{label}, held out")
    return _labelled(axes, "Losses", "nats a token")


def _accepted(run: Run, axes: Any) -> bool:
    axes.plot(*run.series("expected_accepted"), label="expected from slot accuracy")
    for key, label in (("expected_accepted", "the same, held out"), ("tokens_per_forward", "measured by decoding")):
        steps, values = run.series("evaluation", key)
        if steps:
            axes.plot(steps, values, "o--", label=label)
    return _labelled(axes, "Tokens that a forward yields", "tokens")


def _slots(run: Run, axes: Any) -> bool:
    steps, profiles = run.series("slot_accuracy")
    chosen = sorted({0, len(steps) // 2, len(steps) - 1})
    for number in chosen:
        axes.plot(range(len(profiles[number])), profiles[number], "o-", label=f"step {steps[number]}")
    held_out = run.series("evaluation", "slot_accuracy")
    if held_out[0]:
        axes.plot(range(len(held_out[1][-1])), held_out[1][-1], "s--", label=f"step {held_out[0][-1]}, held out")
    axes.set_ylim(0, 1)
    return _labelled(axes, "Accuracy of mask slots by place in the block", "share right", "slot")


def _experts(run: Run, axes: Any) -> bool:
    drawn = False
    for kind in ("clean", "mask"):
        steps, values = run.series("moe", kind, "entropy")
        if steps:
            (line,) = axes.plot(steps, [sum(each) / len(each) for each in values], label=f"{kind}, mean of routers")
            axes.plot(steps, [min(each) for each in values], ":", color=line.get_color(), label=f"{kind}, lowest")
            drawn = True
    steps, values = run.series("moe", "drift")
    if steps:
        axes.plot(steps, values, "k--", label="choices that differ from base_model's")
    axes.set_ylim(0, 1.02)
    return drawn and _labelled(axes, "How evenly experts are used (1: all alike), and drift", "share")


def _routing(run: Run, axes: Any) -> bool:
    if "clean" not in run.routing:
        return False
    loads = [run.routing[kind] for kind in ("clean", "mask") if kind in run.routing]
    # An even load is 1; the kinds stand side by side.
    side_by_side = [[share * len(each) for each in both for share in each] for both in zip(*loads, strict=True)]
    image = axes.imshow(side_by_side, aspect="auto", vmin=0, vmax=3, cmap="viridis", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="load, 1 is even")
    experts = len(loads[0][0])
    if len(loads) > 1:
        axes.axvline(experts - 0.5, color="white")
    axes.set(xlabel="experts: of clean tokens, then of mask slots", ylabel="router")
    axes.set_title(f"Load of every expert, step {run.routing['step']}")
    return True


def _context(run: Run, axes: Any) -> bool:
    if "before" not in run.context:
        return False
    for when, style in (("before", "o:"), ("after", "o-")):
        for key, colour, label in (("loss_ar", "C0", "AR"), ("loss_diffusion", "C1", "diffusion")):
            rows = [row for row in run.context.get(when, []) if row[key] is not None]
            middle = [(row["from"] + row["to"]) / 2 for row in rows]
            axes.plot(middle, [row[key] for row in rows], style, color=colour, label=f"{label} {when}")
    axes.axvline(run.context["original_len"], color="grey", linewidth=1)
    return _labelled(axes, "Loss by position; the line is the length before", "nats a token", "position")


def _optimizer(run: Run, axes: Any) -> bool:
    axes.plot(*run.series("grad_norm"), label="gradient norm")
    axes.set_yscale("log")
    other = axes.twinx()
    other.plot(*run.series("learning_rate"), "k:")
    other.set_ylabel("learning rate (dotted)")
    return _labelled(axes, "Optimizer", "gradient norm")


_FIGURES: dict[str, Callable[[Run, Any], bool]] = {
    "losses": _losses,
    "accepted": _accepted,
    "slots": _slots,
    "context": _context,
    "experts": _experts,
    "routing": _routing,
    "optimizer": _optimizer,
}


def _labelled(axes: Any, title: str, y: str, x: str = "step") -> bool:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
    return True


def _title(run: Run) -> str:
    last = run.rows[-1]
    return f"{run.folder.resolve().name}, step {last['step']} of {last['max_steps']}"


def _page(run: Run) -> dict[str, str]:
    """What stands above and below the images."""
    numbers = {key: value for key, value in run.rows[-1].items() if isinstance(value, int | float)}
    evaluated = run.series("evaluation")[1]
    if evaluated:
        measured = {key: value for key, value in evaluated[-1].items() if isinstance(value, int | float)}
        numbers |= {f"held out: {key}": value for key, value in measured.items()}
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{value:,.6g}</td></tr>" for key, value in numbers.items())
    recipe = f"<details><summary>recipe</summary><pre>{html.escape(run.recipe)}</pre></details>"
    return {"above": f"<table>{rows}</table>", "below": recipe}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
