"""Commands as users run them, on what strangers made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.commands import run_command as run


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
