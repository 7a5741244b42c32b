"""`zconvert report`: the curves of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from zconvert.cli.ui import out


def command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A training run's folder; it may still go on.")],
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder to write into. Default: report/ in the run's folder.")
    ] = None,
) -> None:
    """Draw a run's losses, slot accuracies, acceptance and experts.

    PNG files, and one HTML page with all of them. Needs matplotlib: pip install 'zconvert[report]'.
    """
    from zconvert.training.report import write_report

    out.print(Text(str(write_report(run_dir, output))), soft_wrap=True)
