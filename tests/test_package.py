"""The wheel has all that runs read and no more, the source distribution builds the same wheel, and users see its types.

Nothing is fetched: setuptools is asked by the hooks that pip would call.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import zconvert

ROOT = Path(__file__).parents[1]
INFO = f"zconvert-{zconvert.__version__}.dist-info"

PROGRAM = """
from pathlib import Path

from zconvert.checkpoint.describe import describe
from zconvert.checkpoint.source import Source, resolve
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.settings import TidarSettings
from zconvert.training import stages

source: Source = resolve("checkpoint")
told: dict[str, object] = describe(source)
settings = TidarSettings(block_size=16, mask_token_id=7)
proposals: tuple[int, ...] = settings.default_proposals()


def train(recipe: MidtrainRecipe) -> Path:
    steps: int = recipe.max_steps
    return stages.train(recipe, lambda progress: print(progress.message, steps))
"""


def _tracked() -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("what belongs to the package is what git tracks, and this is no clone")
    return [name for name in listed.split("\0") if (ROOT / name).is_file() or (ROOT / name).is_symlink()]


def _build(tree: Path, kind: str, out: Path) -> Path:
    """Builds an `sdist` or a `wheel` of a tree."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "absent from the `packages`" not in done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The source distribution, its wheel, and the wheel of the tree: of what git tracks, links and all."""
    folder = tmp_path_factory.mktemp("built")
    for name in _tracked():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "tree" / name, follow_symlinks=False)
    sdist = _build(folder / "tree", "sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    (folder / "other").mkdir()
    return sdist, _build(unpacked, "wheel", folder), _build(folder / "tree", "wheel", folder / "other")


def _files(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_the_source_distribution_builds_the_wheel_of_the_tree(built: tuple[Path, Path, Path]) -> None:
    _, of_the_sdist, of_the_tree = built
    assert _files(of_the_sdist) == _files(of_the_tree)


def test_the_wheel_has_all_modules_recipes_tasks_the_licence_and_py_typed_and_no_more(
    built: tuple[Path, Path, Path],
) -> None:
    _, wheel, _ = built
    code = {name for name in _tracked() if name.startswith("zconvert/") and name != "zconvert/recipes"}
    recipes = {f"zconvert/{name}" for name in _tracked() if name.startswith("recipes/")}
    own = {f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
    assert "zconvert/py.typed" in code
    assert set(_files(wheel)) == code | recipes | own | {f"{INFO}/licenses/LICENSE"}


def test_the_source_distribution_has_neither_tests_nor_what_git_does_not_track(built: tuple[Path, Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("zconvert.egg-info/")}
    recipes = {name for name in names if name.startswith("zconvert/recipes/")}
    assert {name.removeprefix("zconvert/") for name in recipes} | names - made - recipes <= set(_tracked())
    assert not [name for name in names if name.startswith("tests")]


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, in which the dependencies are those of this one; its Python."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(site)
    # Behind the wheel: an editable zconvert among the packages here comes last.
    (site / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    return folder / "bin" / "python"


def test_the_installed_wheel_runs_outside_of_the_repository(installed: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: str) -> str:
        command = [str(installed), "-m", "zconvert", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    where = "import zconvert; print(zconvert.__file__)"
    found = subprocess.run([str(installed), "-c", where], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(installed.parents[1])
    assert run("--version") == f"zconvert {zconvert.__version__}\n"
    assert "quickstart-gated" in run("recipes", "list")
    run("recipes", "copy", "quickstart", "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == sorted(
        path.name for path in (ROOT / "recipes" / "quickstart").iterdir()
    )
    assert "gsm8k" in run("tasks", "list")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", None),
        ("resolve(3)", 'Argument 1 to "resolve" has incompatible type "int"'),
        ("settings.block_length", '"TidarSettings" has no attribute "block_length"'),
    ],
)
def test_a_users_program_is_checked_against_the_types_of_the_installed_package(
    installed: Path, tmp_path: Path, line: str, complaint: str | None
) -> None:
    (tmp_path / "program.py").write_text(f"{PROGRAM}\n{line}\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(installed)]
    command += ["--cache-dir", str(installed.parents[1] / "mypy"), "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if complaint is None:
        assert done.returncode == 0, done.stdout
    else:
        assert done.returncode == 1
        assert complaint in done.stdout
