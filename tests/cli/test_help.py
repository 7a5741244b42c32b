"""Every command's help: complete, in any width, with examples that are real commands; and docs/cli.md is made of it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from zconvert.cli import reference
from zconvert.cli.help import parts, render, summary, usage
from zconvert.cli.main import app

COMMANDS: dict[str, tuple[Any, Any]] = {
    context.command_path: (command, context) for command, context in reference.walk()
}


def page(path: str, width: int) -> list[str]:
    command, context = COMMANDS[path]
    return render(usage(command, context), list(parts(command, context)), width).plain.splitlines()


def example_lines(path: str) -> list[str]:
    command, context = COMMANDS[path]
    (lines,) = [part.lines for part in parts(command, context) if part.title == "Examples"]
    return lines


def examples(path: str) -> list[list[str]]:
    """The commands of zconvert among the examples, in words; what goes to and comes from files is the shell's."""
    commands = "\n".join(example_lines(path)).replace("\\\n", " ").splitlines()
    words = [shlex.split(command) for command in commands]
    ours = [each for each in words if each[0] == "zconvert"]
    return [each[: next((n for n, word in enumerate(each) if word in "<>"), len(each))] for each in ours]


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("path", COMMANDS)
def test_no_line_of_a_help_page_is_wider_than_the_terminal_or_hard_to_read(path: str, width: int) -> None:
    assert max(map(len, page(path, width))) <= min(width, 100)


@pytest.mark.parametrize("path", COMMANDS)
def test_in_40_columns_only_names_and_commands_that_are_to_be_copied_are_longer(path: str) -> None:
    verbatim = {f"  {line}" for line in example_lines(path)}
    assert [line for line in page(path, 40) if len(line) > 40 and " " in line.strip() and line not in verbatim] == []


@pytest.mark.parametrize("path", COMMANDS)
def test_no_name_of_an_option_is_cut(path: str) -> None:
    command, context = COMMANDS[path]
    options = [opt for parameter in command.get_params(context) for opt in parameter.opts if opt.startswith("--")]
    for width in (40, 80):
        text = "\n".join(page(path, width))
        assert [option for option in options if option not in text] == []


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_option_and_argument_says_what_it_is(path: str) -> None:
    command, context = COMMANDS[path]
    assert summary(command).endswith(".")
    for part in parts(command, context):
        for name, said in part.rows:
            assert len(said.split("[")[0].split()) >= 2, f"{name} says only {said!r}"


@pytest.mark.parametrize("path", COMMANDS)
def test_the_examples_in_the_help_are_commands_that_the_command_line_takes(path: str) -> None:
    assert examples(path), f"{path} has no example"
    for words in examples(path):
        shown, rest = " ".join(words), words[1:]
        command, context = COMMANDS["zconvert"]
        while hasattr(command, "commands"):
            command = command.commands[rest[0]]
            context = command.make_context(rest[0], rest[1:], parent=context)
            rest = rest[1:]
        assert f"{shown} ".startswith(f"{path} "), f"{shown} is no example of {path}"


def test_an_example_that_the_command_line_does_not_take_would_be_seen() -> None:
    command, context = COMMANDS["zconvert inspect"]
    with pytest.raises(Exception, match="No such option"):
        command.make_context("inspect", ["x", "--jsonn"], parent=context.parent)


def test_the_pages_name_what_can_be_left_out_in_brackets() -> None:
    assert usage(*COMMANDS["zconvert generate"]) == "zconvert generate [OPTIONS] CHECKPOINT [PROMPT]"
    assert usage(*COMMANDS["zconvert plan"]) == "zconvert plan [OPTIONS] CHECKPOINT|RECIPE..."
    assert usage(*COMMANDS["zconvert tasks"]) == "zconvert tasks [OPTIONS] COMMAND [ARGS]..."


def test_defaults_and_ranges_are_told_in_plain_words() -> None:
    lines = "\n".join(page("zconvert bench", 100))
    assert "--batch-size N " in lines
    assert "[default: 1, N>=1]" in lines
    assert "--sampler lossless|mixed|ar" in "\n".join(page("zconvert generate", 80))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "x", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["generate", "x", "--sampler", "y"], "'--sampler': 'y' is not one of 'lossless', 'mixed', 'ar'"),
        (["generate", "x", "--temprature", "1"], "--temperature"),
        (["generat"], "Did you mean 'generate'"),
        (["export", "x"], "--out, --hub or --check"),
    ],
)
def test_wrong_usage_names_the_option_what_was_given_and_what_it_could_be(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments, prog_name="zconvert")
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "Usage: zconvert" in result.stderr
    assert "Value error" not in result.stderr


def test_the_reference_in_docs_is_what_the_help_says() -> None:
    pinned = dict(
        line.split("==") for line in (Path(__file__).parents[2] / "constraints.txt").read_text().split() if "==" in line
    )
    if version("typer") != pinned["typer"]:
        pytest.skip("the words of another version of Typer")
    assert reference.FILE.read_text(encoding="utf-8") == reference.document(), "run `make docs`"


def test_the_reference_has_each_command_and_each_option() -> None:
    text = reference.document()
    for path, (command, context) in COMMANDS.items():
        assert f"\n## {path}\n" in text
        for parameter in command.get_params(context):
            assert all(f"{option}" in text for option in parameter.opts if option.startswith("--"))


def test_asking_for_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom zconvert.cli.main import main\nsys.argv = ['zconvert', 'evaluate', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def complete(words: str, **environment: str) -> list[str]:
    """What the shell offers after these words, by Typer's protocol for bash."""
    env = {"_ZCONVERT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    result = CliRunner().invoke(app, [], prog_name="zconvert", env={**env, **environment})
    assert result.exit_code == 0, result.output
    return result.stdout.split()


def test_the_shell_completes_commands_options_and_their_values() -> None:
    assert complete("zconvert mid") == ["midtrain"]
    assert complete("zconvert tasks ch") == ["check"]
    assert "--mask-token" in complete("zconvert convert-init --mask")
    assert complete("zconvert generate x --sampler l") == ["lossless"]
    assert complete("zconvert export x --check v") == ["vllm"]


def test_the_shell_completes_recipes_tasks_and_machines_by_name() -> None:
    assert complete("zconvert recipes copy zaya") == ["zaya1-8b"]
    assert complete("zconvert tasks show gsm") == ["gsm8k"]
    assert "gsm8k" in complete("zconvert evaluate x --tasks gs")
    assert "h100-80gb" in complete("zconvert plan x --gpu h1")
    assert "tidar-8b" in complete("zconvert plan x --accepted tidar")


@pytest.mark.parametrize("words", ["zconvert midtrain rec", "zconvert inspect ./", "zconvert bench x --prompts "])
def test_paths_are_left_to_the_shell_which_completes_files_where_nothing_is_offered(words: str) -> None:
    assert complete(words) == []


@pytest.mark.parametrize(
    ("shell", "mark"),
    [("bash", "complete -o default"), ("zsh", "#compdef zconvert"), ("fish", "complete --command zconvert")],
)
def test_the_completion_script_of_a_shell_can_be_had(shell: str, mark: str) -> None:
    result = CliRunner().invoke(app, [], prog_name="zconvert", env={"_ZCONVERT_COMPLETE": f"source_{shell}"})
    assert result.exit_code == 0
    assert mark in result.stdout
