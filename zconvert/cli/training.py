"""A training stage in the terminal: progress with both losses, and where it stopped."""

from __future__ import annotations

import os
import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zconvert.cli.launch import launch, leave_at_once, speaks, under_torchrun
from zconvert.cli.ui import EXIT_ERROR, err, out
from zconvert.errors import UserError

if TYPE_CHECKING:
    from zconvert.recipe import TrainingRecipe

RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE.yaml",
        help="Recipe of the stage; `zconvert recipes copy` has some to begin with.",
        show_default=False,
    ),
]


def run(settings: TrainingRecipe, recipe: Path, torchrun: list[str] | None) -> Path:
    """Runs a recipe's stage, here or in the processes that torchrun's options ask for; the new checkpoint's folder.

    Mistakes that need no torch to be seen are told before it is loaded, and before processes are started.
    """
    from zconvert.training.inputs import check_inputs

    if "WORLD_SIZE" not in os.environ:
        check_inputs(settings)
    if torchrun:
        launch([settings.stage, str(recipe)], torchrun)
    return run_shown(settings)


def print_made(settings: TrainingRecipe, checkpoint: Path) -> None:
    """Prints where a stage left its checkpoint, and what to do with it."""
    if speaks():
        out.print(Text(str(checkpoint)), soft_wrap=True)
        err.print(
            Text.assemble(("Next: ", "bold"), f"zconvert bench {shlex.quote(settings.output_dir)}"), soft_wrap=True
        )


def run_shown(settings: TrainingRecipe) -> Path:
    """Runs the stage of a recipe with its progress on stderr; the new checkpoint's folder."""
    from zconvert.training.loop import Interrupted, Progress
    from zconvert.training.parallel import first_to_fail, lost_the_others
    from zconvert.training.stages import train

    started = time.monotonic()
    first_step: list[int] = []
    newest: dict[str, Any] = {}

    # Into a file goes one line for each report instead of a display that redraws itself.
    console = err if speaks() else Console(quiet=True)
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def show(progress: Progress) -> None:
            if progress.message is not None:
                live.console.print(Text(progress.message), soft_wrap=True)
            metrics = progress.metrics
            if metrics is None:
                return
            if not first_step:
                first_step.append(metrics["step"] - settings.logging_steps)
            newest.update(metrics)  # what is measured now and then stays in view
            done = max(1, metrics["step"] - first_step[0])
            left = (time.monotonic() - started) / done * (metrics["max_steps"] - metrics["step"])
            if live.console.is_terminal:
                live.transient = False  # what was shown stays; an empty display would stay as an empty line
                live.update(_view(newest, left))
            else:
                live.console.print(_line(metrics, left), soft_wrap=True)

        try:
            folder = train(settings, show)
            leave_at_once(0)
            return folder
        except Interrupted as stop:
            leave_at_once(128 + stop.signal_number)
            live.console.print(Text(str(stop)), soft_wrap=True)
            raise typer.Exit(128 + stop.signal_number) from None
        except (KeyboardInterrupt, SystemExit) as stop:  # before the first step, or after the last
            code = 128 + (signal.SIGTERM if isinstance(stop, SystemExit) else signal.SIGINT)
            leave_at_once(code)
            raise typer.Exit(code) from None
        except Exception as error:
            leave_at_once(EXIT_ERROR)
            if lost_the_others(error) and not under_torchrun():
                raise UserError(
                    "another process of this run has ended, and this one cannot go on without it",
                    found=str(error).split("\n")[0][:200],
                    fix="look at what the others said; the same command continues from the newest train state",
                ) from error
            if not first_to_fail(error):
                raise typer.Exit(EXIT_ERROR) from None
            raise


def _view(metrics: dict[str, Any], left: float) -> Table:
    """Progress bar, the losses, the accuracy of each slot of a block, and what else was measured; 80 columns."""
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=metrics["max_steps"], completed=metrics["step"], width=30)
    grid.add_row("step", f"{metrics['step']}/{metrics['max_steps']}", bar, f"{_duration(left)} left")
    grid.add_row(
        "loss",
        f"{metrics['loss']:.4f}",
        f"AR {metrics['loss_ar']:.4f}  diffusion {metrics['loss_diffusion']:.4f}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
    )
    grid.add_row("slots", "", _slots(metrics["slot_accuracy"]), f"{metrics['expected_accepted']:.2f} accepted")
    if "evaluation" in metrics:
        found = metrics["evaluation"]
        losses = f"AR {found['loss_ar']:.4f}  diffusion {found['loss_diffusion']:.4f}"
        grid.add_row("held out", f"{found['loss']:.4f}", losses, _decoded(found))
        grid.add_row("", "", _slots(found["slot_accuracy"]), f"{found['expected_accepted']:.2f} accepted")
    if "moe" in metrics:
        grid.add_row("experts", "even to", _experts(metrics["moe"]), _drift(metrics["moe"]))
    return grid


def _slots(accuracies: list[float]) -> Text:
    """A bar for each slot, as wide as 16 of them at most."""
    shown = Text()
    for accuracy in accuracies[:: -(-len(accuracies) // 16)]:
        shown.append(" ▁▂▃▄▅▆▇█"[min(8, round(accuracy * 8))], style="green" if accuracy > 0.8 else "yellow")
    shown.append(f" {accuracies[0]:.0%} … {accuracies[-1]:.0%}")
    return shown


def _decoded(found: dict[str, Any]) -> str:
    measured = found.get("tokens_per_forward")
    return "" if measured is None else f"{measured:.2f} tokens/forward"


def _experts(moe: dict[str, Any]) -> str:
    """The worst router of each kind of tokens: entropy of its load against an even one, and experts nobody chose."""
    kinds = [(kind, moe[kind]) for kind in ("clean", "mask") if kind in moe]
    return "; ".join(f"{kind} {min(of['entropy']):.0%}, {sum(of['dead'])} dead" for kind, of in kinds)


def _drift(moe: dict[str, Any]) -> str:
    return f"{moe['drift']:.1%} drift" if "drift" in moe else ""


def _line(metrics: dict[str, Any], left: float) -> str:
    """The same in one line, for logs."""
    parts = [
        f"step {metrics['step']}/{metrics['max_steps']} loss {metrics['loss']:.4f} "
        f"ar {metrics['loss_ar']:.4f} diff {metrics['loss_diffusion']:.4f} "
        f"accepted {metrics['expected_accepted']:.2f}"
    ]
    if "moe" in metrics:
        parts.append(f"experts even to {_experts(metrics['moe'])} {_drift(metrics['moe'])}".rstrip())
    if "evaluation" in metrics:
        found = metrics["evaluation"]
        losses = f"ar {found['loss_ar']:.4f} diff {found['loss_diffusion']:.4f}"
        parts.append(f"held out {losses} accepted {found['expected_accepted']:.2f} {_decoded(found)}".rstrip())
    return " | ".join([*parts, f"{_duration(left)} left"])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
