"""Every command of README.md and docs/ runs, on small stand-ins; those that cannot are parsed, and told apart here."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.docs.pages import PAGES, ROOT, SHELL, Block, Command, blocks
from tests.docs.world import World
from zconvert.cli.main import app
from zconvert.recipe import BY_STAGE, load_recipe

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
    """The real command line takes the words, and the recipes that they name are right; nothing is run."""
    name, *words = command.words[command.words.index("zconvert") + 1 :]
    assert name in CLI.commands, f"{place}: there is no command {name}"
    CLI.commands[name].make_context(name, list(words))
    for word in words:
        if word.startswith("recipes/"):
            load_recipe(ROOT / word, BY_STAGE[name])


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
        assert (ROOT / words[0]).exists(), place
    elif program == "curl":
        json.loads(words[words.index("-d") + 1])
    else:
        pytest.fail(f"{place}: nobody looks at {program}")


def test_no_command_is_skipped() -> None:
    """What is run, what is parsed alone (several devices, servers), and what belongs to others."""
    counted = Counter(
        kind_of(block, command)
        for page in WITH_COMMANDS
        for block in blocks(page)
        if block.language in SHELL
        for command in block.commands()
    )
    assert counted == {"run": 42, "run slowly": 20, "parsed": 7, "looked at": 14}


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
