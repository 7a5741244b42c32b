"""The frame of the command line: help, version, exit codes, and errors in a form people can act on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    *("doctor", "inspect", "plan", "convert-init", "midtrain", "extend-context", "sft", "run", "report", "recipes"),
    *("generate", "serve", "bench", "evaluate", "score", "lm-eval", "export", "tasks"),
)

# A command of its own for each way in which one can end, under the same frame as the real ones.
ENDINGS = """
import typer
from zconvert.cli import ui
from zconvert.errors import UserError

app = typer.Typer(pretty_exceptions_enable=False)

def command(ending: str) -> None:
    if ending == "user-error":
        raise UserError("out/x [already] exists", found="3 files " + "and more " * 12 + "\\n- one", fix="rename")
    if ending == "path":
        raise UserError("there is no " + "/a/long-path/" * 12 + "x.json")
    if ending == "bug":
        raise RuntimeError("something\\nbroke")
    if ending == "interrupt":
        raise KeyboardInterrupt
    if ending == "bad-option":
        raise typer.BadParameter("not that one")
    if ending == "json":
        ui.err.print("working")
        ui.print_json({"token": "<m\\xe4sk>", "n": 1})
    if ending == "not-json":
        ui.print_json({"n": float("nan")})
    if ending == "pipe":
        while True:
            ui.out.print("line")

app.command()(ui.handled(command))
app()
"""


def run(*arguments: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("ZCONVERT_DEBUG", "NO_COLOR", "FORCE_COLOR", "PYTHONIOENCODING", "GITHUB_ACTIONS")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"COLUMNS": "80", "PYTHONUTF8": "1", **environment}
    start = ["-c", code] if code else ["-m", "zconvert"]
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, env=env, timeout=120)


def end(ending: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(ending, code=ENDINGS, **environment)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_help_lists_every_command_in_the_order_of_use_in_any_width(width: int) -> None:
    done = run("--help", COLUMNS=str(width))
    assert (done.returncode, done.stderr) == (0, "")
    places = [done.stdout.index(f"\n  {name}{' ' if width > 40 else chr(10)}") for name in COMMANDS]
    assert places == sorted(places)
    assert "\x1b" not in done.stdout


def test_version_is_the_packages() -> None:
    from zconvert import __version__

    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"zconvert {__version__}\n")


def test_no_arguments_show_the_help_and_exit_2() -> None:
    done = run()
    assert done.returncode == 2
    assert "convert-init" in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["inspekt"], ["inspect"], ["inspect", "--nope"]])
def test_wrong_usage_exits_2_and_leaves_stdout_empty(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error" in done.stderr


@pytest.mark.parametrize("command", ["inspect", "convert-init", "bench", "export"])
def test_a_missing_checkpoint_is_a_short_error_on_stderr(command: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")] if command in ("convert-init", "export") else []
    done = run(command, str(tmp_path / "missing"), *out)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_recipe_is_a_short_error_on_stderr(tmp_path: Path) -> None:
    done = run("midtrain", str(tmp_path / "missing.yaml"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")


def test_a_user_error_exits_1_with_its_parts_hanging_under_their_names() -> None:
    done = end("user-error")
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert lines[0] == "Error: out/x [already] exists"
    assert lines[1].startswith("  found:    3 files and more ")
    assert re.match(r" {12}\S.* more", lines[2])
    assert lines[-2] == "            - one"
    assert lines[-1] == "  fix:      rename"
    assert max(map(len, lines)) <= 80


def test_a_long_path_in_an_error_stays_in_one_piece() -> None:
    assert "/a/long-path/" * 12 + "x.json" in end("path").stderr


def test_an_unexpected_error_is_one_line_and_says_how_to_see_more() -> None:
    done = end("bug")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Unexpected error: RuntimeError: something broke\n")
    assert "ZCONVERT_DEBUG=1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("ending", ["user-error", "bug", "interrupt"])
def test_debugging_shows_the_traceback(ending: str) -> None:
    assert "Traceback" in end(ending, ZCONVERT_DEBUG="1").stderr


def test_an_interrupt_exits_130() -> None:
    done = end("interrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_a_bad_parameter_found_inside_a_command_is_still_wrong_usage() -> None:
    assert end("bad-option").returncode == 2


def test_json_goes_to_stdout_alone_and_is_plain() -> None:
    done = end("json", FORCE_COLOR="1", PYTHONUTF8="0", LC_ALL="C")
    assert json.loads(done.stdout) == {"token": "<mäsk>", "n": 1}
    assert "\x1b" not in done.stdout
    assert "working" in done.stderr


def test_numbers_that_json_lacks_are_never_written() -> None:
    done = end("not-json")
    assert (done.returncode, done.stdout) == (1, "")


def test_colours_come_to_terminals_only_and_never_with_no_color() -> None:
    assert "\x1b" not in end("user-error").stderr
    assert "\x1b" in end("user-error", FORCE_COLOR="1").stderr
    assert "\x1b" not in end("user-error", FORCE_COLOR="1", NO_COLOR="1").stderr


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ENDINGS, "pipe"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()
