"""`zconvert recipes`: the recipes that come with zconvert."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from zconvert.checkpoint.folder import new_folder
from zconvert.cli import ui
from zconvert.cli.help import Command, Group, examples
from zconvert.errors import UserError

FOLDER = Path(__file__).parent.parent / "recipes"

app = typer.Typer(
    cls=Group,
    help="List the recipes that come with zconvert, or copy some to edit.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list", cls=Command, epilog=examples("zconvert recipes list"))
@ui.handled
def list_recipes() -> None:
    """List the recipes, one folder a model."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("Name", no_wrap=True)
    table.add_column("What")
    for folder in folders():
        files = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        table.add_row(Text(folder.name, style="bold"), Text(f"{_about(folder)}\n{files}"))
    ui.out.print(table)


@app.command(
    "copy",
    cls=Command,
    epilog=examples("zconvert recipes copy zaya1-8b", "zconvert recipes copy qwen3-30b-a3b ./my-recipes"),
)
@ui.handled
def copy_recipes(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="From `zconvert recipes list`.",
            autocompletion=lambda: [each.name for each in folders()],
        ),
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Folder to make; must not exist. Default: ./NAME.")
    ] = None,
) -> None:
    """Copy a model's recipes into a new folder, to be edited and run."""
    found = {each.name: each for each in folders()}
    if name not in found:
        raise UserError(f"there are no recipes named {name}", expected=", ".join(found), fix="zconvert recipes list")
    output = folder or Path(name)
    with new_folder(output) as made:
        for path in sorted(found[name].iterdir()):
            text = path.read_text(encoding="utf-8")  # recipes name each other, and a chat template beside them
            (made / path.name).write_text(text.replace(f"recipes/{name}/", f"{output.as_posix()}/"), encoding="utf-8")
    ui.out.print(Text(str(output)), soft_wrap=True)
    ui.err.print("Next: edit them, as their comments say (zconvert plan PIPELINE tells what it takes), then")
    for path in sorted(output.glob("pipeline*.yaml"), key=lambda path: path.stem):
        ui.err.print(Text(f"  zconvert run {shlex.quote(str(path))}"), soft_wrap=True)


def folders() -> list[Path]:
    """The folders of recipes, by name."""
    return sorted(path.parent for path in FOLDER.glob("*/pipeline.yaml"))


def _about(folder: Path) -> str:
    """The first line of the pipeline's comment."""
    return (folder / "pipeline.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
