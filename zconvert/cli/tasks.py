"""`zconvert tasks`: what models can be evaluated on."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from zconvert.cli import ui
from zconvert.cli.evaluate import progress_bars, task_names
from zconvert.cli.help import Command, Group, examples
from zconvert.errors import UserError

app = typer.Typer(
    cls=Group,
    help="List the tasks of `zconvert evaluate`, show one, or check one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="From `zconvert tasks list`, or a .yaml file; NAME=FILE takes its rows from a file.",
        autocompletion=task_names,
    ),
]


@app.command("list", cls=Command, epilog=examples("zconvert tasks list"))
@ui.handled
def list_tasks() -> None:
    """List the tasks that come with zconvert."""
    from zconvert.evaluation.tasks import load_task, names

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("Name", "Checked by"):
        table.add_column(column, no_wrap=True)
    table.add_column("What, and where its rows are", overflow="fold")
    for name in names():
        recipe = load_task(name).recipe
        what = Text(recipe.description).append(f"\n{recipe.dataset.path}", style="dim")
        table.add_row(Text(name, style="bold"), recipe.check.method, what)
    ui.out.print(table)


@app.command("show", cls=Command, epilog=examples("zconvert tasks show gsm8k > my-task.yaml"))
@ui.handled
def show_task(name: Name) -> None:
    """Print a task's file: copy it to write your own."""
    from zconvert.evaluation.tasks import load_task, task_file

    load_task(name)
    text = task_file(name).read_text(encoding="utf-8")
    ui.out.print(Syntax(text, "yaml", background_color="default") if ui.out.is_terminal else Text(text), soft_wrap=True)


@app.command(
    "check",
    cls=Command,
    epilog=examples(
        "zconvert tasks check gsm8k=./my-copy.jsonl", "zconvert tasks check ./my-task.yaml --allow-code-exec"
    ),
)
@ui.handled
def check_task(
    name: Name,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first N problems.")] = None,
    allow_code_exec: Annotated[
        bool,
        typer.Option("--allow-code-exec", help="Run the rows' own programs, in a sandbox, to score a task in code."),
    ] = False,
) -> None:
    """Read a task's rows, show its first prompt, and score the right answers that the rows have."""
    from zconvert.evaluation.scoring import check_solutions, require_scorable
    from zconvert.evaluation.tasks import load_task, problems_of, prompt_text

    task = load_task(name)
    problems = problems_of(task, limit)
    ui.out.print(Text(f"{task.name}: {len(problems)} problems; the first prompt, {problems[0].id}:"))
    ui.out.print(Text(prompt_text(task, problems[0])), soft_wrap=True, style="dim")
    if task.is_code and not allow_code_exec:
        ui.out.print("Solutions were not run: --allow-code-exec runs them.")
        return
    require_scorable([task], allow_code_exec=allow_code_exec)
    with progress_bars() as tell:
        scores = check_solutions(task, problems, on_progress=lambda n, count: tell(task.name, "solutions", n, count))
    if scores is None:
        ui.out.print("Its rows have no solutions to check.")
        return
    wrong = [score for score in scores if not score["right"]]
    ui.out.print(f"{len(scores) - len(wrong)} of {len(scores)} right answers are scored as right.")
    if wrong:
        raise UserError(
            f"right answers of the task {task.name} are scored as wrong",
            found="\n".join(_described(score) for score in wrong[:5]),
            fix="correct `answer:` or `check:` in the task; some data sets also have wrong rows",
        )


def _described(score: dict[str, object]) -> str:
    said = f"{score['reason']}: {score['detail']}" if "reason" in score else f"answer {score['answer']!r}"
    return f"{score['task_id']}: {said}"
