"""Commands as a user types them, in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from zconvert.cli.main import app


def run_command(*words: object, stdin: str | None = None) -> Result:
    """Runs `zconvert WORDS`; its exit code, stdout and stderr."""
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)
