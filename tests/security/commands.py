"""Commands as users run them, on what strangers made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from zconvert.cli.main import app


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def refused(*arguments: object, stdin: str | None = None) -> str:
    """What the command says on stderr when it refuses, on one line."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert "Unexpected error" not in result.output
    return " ".join(result.stderr.split())


def edit_json(path: Path, **members: Any) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **members}))
