"""What the pages say of the code, and of each other, is so."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, Block, blocks
from tests.docs.world import World
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.families import FAMILIES

TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_TEST = re.compile(r"\[`[^`]+`\]\(\.\./([^)]+)\)`::(\w+)`")


def of_language(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def test_what_is_generated_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.stale() == [], "run python docs/generate.py"


def anchors(page: Path) -> Iterator[str]:
    """Of a page's headings, as GitHub names them."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        yield re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in _LINK.findall(text):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links {link}"
        assert not heading or heading in anchors(target), f"{page.name} links {link}"


def test_the_files_of_python_that_pages_name_are_there() -> None:
    code = [
        path for name in ("zconvert", "tests", "benchmarks", "examples", "docs") for path in (ROOT / name).rglob("*.py")
    ]
    for page in TEXTS:
        for name in re.findall(r"[\w/-]+\.py\b", page.read_text()):
            others = name.startswith(("srt/", "modeling_"))  # SGLang's, transformers'
            assert others or any(path.as_posix().endswith(f"/{name.lstrip('/')}") for path in code), (page.name, name)


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in PAGES if f"({page.name})" not in index and page.name != "README.md"]
    assert missing == []


def test_every_promise_names_a_test_that_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text().split("\n## Untrusted input")[0]
    promises = [line for line in page.split("\n") if line.startswith("| ") and not line.startswith("| promise")]
    assert len(promises) > 30
    for promise in promises:
        found = _TEST.search(promise)
        assert found, promise
        assert re.search(rf"^(async )?def {found[2]}\(", (ROOT / found[1]).read_text(), re.MULTILINE), promise


def test_the_numbers_of_families_are_those_of_the_table() -> None:
    experts = sum(not family.dense for family in FAMILIES.values())
    assert f"[{len(FAMILIES)} families]" in (ROOT / "README.md").read_text()
    told = f"{experts} mixtures of experts and {len(FAMILIES) - experts} dense families"
    assert told in (ROOT / "docs" / "faq.md").read_text()


def test_recipes_in_pages_are_right() -> None:
    shown = [yaml.safe_load(block.text) for block in of_language("yaml") if "file" not in block.marks]
    of_data = [settings for settings in shown if "datasets" in settings]
    assert len(of_data) >= 4
    for settings in of_data:
        MidtrainRecipe.model_validate({"base_model": "init", "output_dir": "run", "max_steps": 1, **settings})


def test_documents_in_pages_are_json() -> None:
    for block in of_language("json"):
        json.loads(block.text)


def test_the_arithmetic_in_pages_comes_out() -> None:
    examples = [block for block in of_language("python") if block.text.startswith(">>>")]
    assert examples
    for block in examples:
        test = doctest.DocTestParser().get_doctest(block.text, {}, block.place, str(block.page), block.line)
        assert doctest.DocTestRunner().run(test).failed == 0, block.place


def test_the_row_that_the_page_on_families_arrives_at_is_the_tables() -> None:
    (last,) = [block.text for block in of_language("python") if block.text.startswith('**_rows("cohere2_moe", ')]
    assert last.strip() in (ROOT / "zconvert" / "tidar" / "families.py").read_text()


@pytest.mark.slow
def test_an_exported_model_is_used_as_the_tutorial_says(world: World) -> None:
    (block,) = [block for block in of_language("python") if "with" in block.marks]
    world.put(block.marks["with"])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Mia has 27 apples." in done.stdout
