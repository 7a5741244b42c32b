"""Every command of README.md and docs/ runs, on small stand-ins; those that cannot are parsed, and told apart here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from tests.docs.pages import PAGES, ROOT, SHELL, Block, Command, blocks
from tests.docs.world import World
from zconvert.cli.main import app
from zconvert.recipe import BY_STAGE, load_pipeline, load_recipe

WITH_COMMANDS = [page for page in PAGES if any(block.language in SHELL for block in blocks(page))]


def named(page: Path) -> str:
    return page.stem


CLI: Any = typer.main.get_command(app)


def kind_of(block: Block, command: Command) -> str:
    """How a command is tested: run, run where there is time, parsed, or, where it is none of ours, looked at."""
    if "zconvert" not in command.words[:6]:
        return "looked at"
    if "parse" in block.marks or command.words[0] != "zconvert":
        return "parsed"
    return "run slowly" if "slow" in block.marks else "run"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_the_commands_of_a_page_run_in_their_order(page: Path, world: World) -> None:
    go_through(page, world, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in WITH_COMMANDS if any("slow" in b.marks for b in blocks(page))], ids=named
)
def test_so_do_all_of_them_where_there_is_time(page: Path, world: World) -> None:
    go_through(page, world, slow=True)


def go_through(page: Path, world: World, *, slow: bool) -> None:
    """Does what a page says, from its top."""
    for block in blocks(page):
        if "file" in block.marks:
            (world.folder / block.marks["file"]).write_text(block.text)
        if block.language not in SHELL or ("slow" in block.marks and not slow):
            continue
        for name in filter(None, block.marks.get("with", "").split(", ")):
            world.put(name)
        for command in block.commands():
            kind = kind_of(block, command)
            if kind == "looked at":
                look_at(command, block.place)
            elif kind == "parsed":
                parse(command, block.place)
            else:
                run(command, block, world, slow=slow)


def run(command: Command, block: Block, world: World, *, slow: bool) -> None:
    """Runs a command of a page, an export without its check unless slow; output that is shown has to be what comes."""
    code, out, err = world.run(command, small="exit" not in block.marks, verify=slow)
    shown = f"{block.place}: {' '.join(command.words)}\n{out}\n{err}"
    assert code == int(block.marks.get("exit", 0)), shown
    if "output" in block.marks:
        assert same(command.output) == same(err if code else out), shown


def same(text: str) -> list[str]:
    """Lines without the blanks at their ends, and without sizes, which depend on the versions that files name."""
    return [re.sub(r"[\d.]+ [kM]B", "… kB", line.rstrip()) for line in text.strip("\n").splitlines()]


def parse(command: Command, place: str) -> None:
    """Options and names of recipes must exist."""
    words = list(command.words)
    words = words[words.index("zconvert") + 1 :]
    check_options(words, place)
    for word in words:
        if word.endswith(".yaml") and word.startswith("recipes/"):
            if Path(word).stem.startswith("pipeline"):
                load_pipeline(ROOT / word)
            else:
                load_recipe(ROOT / word, BY_STAGE[words[0]])


def check_options(words: list[str], place: str) -> None:
    """Parses by the real command line; nothing is run."""
    name, rest = words[0], words[1:]
    group = CLI
    assert name in group.commands, f"{place}: there is no command {name}"
    command = group.commands[name]
    if isinstance(command, click.Group) or hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        command.make_context(name, rest)
    except click.exceptions.UsageError as error:
        pytest.fail(f"{place}: {' '.join(words)}: {error.format_message()}")


def look_at(command: Command, place: str) -> None:
    """Commands of others: what they name must be there."""
    program, *words = command.words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words if "=" not in word and word not in targets] == [], place
    elif program == "pip":
        extras = re.search(r"optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
        assert extras is not None
        known = re.findall(r"^([\w-]+) = ", extras[1], re.MULTILINE)
        wanted = [name for word in words for found in re.findall(r"\[(.*)\]", word) for name in found.split(",")]
        assert [name for name in wanted if name not in known] == [], place
    elif program == "python" and words[:2] == ["-m", "pytest"]:
        assert [word for word in words if word.endswith(".py") and not (ROOT / word).exists()] == [], place
    elif program == "python":
        script = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
        assert (ROOT / script).exists(), place
        if script.startswith("examples/tiny-zaya/problems.py"):
            subprocess.run([sys.executable, *words], check=True)
    elif program == "curl":
        json.loads(words[words.index("-d") + 1])
    else:
        assert (program, *words[:1]) in {("hf", "auth"), ("git", "clone")}, f"{place}: {program} is not looked at"


def test_no_command_is_skipped() -> None:
    """What is run, what is parsed alone (several devices, servers), and what belongs to others."""
    counted = Counter(
        kind_of(block, command)
        for page in WITH_COMMANDS
        for block in blocks(page)
        if block.language in SHELL
        for command in block.commands()
    )
    assert counted == {"run": 40, "run slowly": 20, "parsed": 7, "looked at": 14}


def test_commands_stand_in_blocks_that_are_tested() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language, f"{block.place}: a block without a language"
            if block.language not in SHELL:
                assert not re.search(r"^(\$ )?(zconvert|pip|make|torchrun) ", block.text, re.MULTILINE), block.place


def test_a_parsed_block_says_why_it_is_not_run() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.marks.get("parse", "a reason"), block.place
            assert set(block.marks) <= {"with", "parse", "slow", "file", "exit", "output"}, block.place


def test_commands_within_sentences_exist_with_their_options() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`zconvert ([^`]+)`", text.replace("\n", " ")):
            words = span.split()
            command = CLI.commands.get(words[0])
            assert command is not None, f"{page.name}: zconvert {span}"
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            assert [word for word in words if word.startswith("--") and word != "--" and word not in known] == [], span
