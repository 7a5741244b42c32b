"""Imports point down, the shipped package stands alone, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zconvert

PACKAGE = Path(zconvert.__file__).parent

LEAVES = {"errors", "formats", "recipe", "tidar"}
LIBRARY = LEAVES | {"data", "checkpoint", "planning", "page"}
ALLOWED = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "formats": {"errors"},
    "tidar": set(),
    "recipe": {"errors", "tidar.settings"},  # settings: one definition of the block size and its checks
    "data": LEAVES | {"checkpoint.folder"},  # folders that appear whole: tokenised data are kept in such
    "checkpoint": LEAVES,
    "page": {"errors", "checkpoint.folder"},
    "doctor": {"checkpoint.parity"},
    "doctor_probe": set(),
    "planning": LEAVES | {"checkpoint"},
    "training": LIBRARY,
    "serving": LIBRARY,
    "evaluation": LIBRARY | {"serving"},
    "cli": LIBRARY | {"training", "serving", "evaluation", "doctor"},
}
"""what each part of the package may import of the rest (itself always, the version number always)"""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, also inside functions: `zconvert.errors.UserError`."""
    package = ["zconvert", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"zconvert/{part} has no place in the import order: give it one in this test"
    for name in imports_of(path):
        inside = name.removeprefix("zconvert.")
        if name.split(".")[0] != "zconvert" or inside in ("zconvert", "__version__"):
            continue
        allowed = any(f"{inside}.".startswith(f"{other}.") for other in ALLOWED[part] | {part})
        assert allowed, f"{path} imports {name}, but {part} may import only {sorted(ALLOWED[part])}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "tidar").rglob("*.py")), ids=lambda path: path.name)
def test_the_shipped_package_is_flat_and_needs_only_torch_and_transformers(path: Path) -> None:
    assert path.parent == PACKAGE / "tidar", "transformers copies no sub-packages of custom_generate/"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path}:{node.lineno}: imports leave the package"
            assert node.module, f"{path}:{node.lineno}: `from . import x` is missed by transformers' loader"
            assert "." not in node.module, f"{path}:{node.lineno}: sub-packages are missed by transformers' loader"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            tops = {name.split(".")[0] for name in names}
            shipped_with = {"torch", "transformers", "safetensors", "__future__"}  # transformers brings safetensors
            foreign = tops - shipped_with - sys.stdlib_module_names
            assert not foreign, f"{path}:{node.lineno} imports {foreign}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_knows_of_terminals(path: Path) -> None:
    if part_of(path) not in ("cli", "__main__"):
        tops = {name.split(".")[0] for name in imports_of(path)}
        assert not tops & {"rich", "typer", "click"}, f"{path} imports {tops & {'rich', 'typer', 'click'}}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_never_prints_or_quits(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exit", "quit"), f"{path}:{node.lineno} calls {node.func.id}"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "module",
    [
        "zconvert.cli.main",
        "zconvert.doctor",
        "zconvert.recipe",
        "zconvert.checkpoint.describe",
        "zconvert.checkpoint.source",
        "zconvert.checkpoint.headers",
        "zconvert.checkpoint.mask_token",
        "zconvert.evaluation.tasks",
        "zconvert.planning.calibrate",
        "zconvert.planning.plan",
        "zconvert.tidar.families",
        "zconvert.tidar.settings",
    ],
)
def test_importing_it_in_a_fresh_interpreter_loads_no_torch(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print(*sys.modules)").split()
    assert not {"torch", "transformers", "accelerate", "numpy"} & set(loaded)


def test_the_command_line_starts_without_what_only_some_commands_need() -> None:
    loaded = run_python("import sys, zconvert.cli.main; print(*sys.modules)").split()
    assert not {"pydantic", "yaml", "huggingface_hub", "datasets", "matplotlib", "uvicorn"} & set(loaded)
