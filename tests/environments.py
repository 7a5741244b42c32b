"""Virtual environments as somebody has who does not have zconvert: transformers, torch, what these need, nothing else.

torch is linked from the environment that the tests run in, since it takes minutes to install; transformers is linked
too, or installed by pip in the version asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement


def make_environment(folder: Path, transformers: str | None = None) -> Path:
    """Makes an environment; a test that cannot have it is skipped.

    Args:
        folder: to make it in.
        transformers: version to install, such as `4.57.*`; None links the one that is here, which needs no network.

    Returns:
        its Python.
    """
    venv.create(folder, with_pip=transformers is not None, symlinks=True)
    python = folder / "bin" / "python"
    if transformers is not None:
        pip = [str(python), "-m", "pip", "install", "--quiet", f"transformers=={transformers}"]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot install transformers {transformers}: {done.stderr.strip().splitlines()[-1:]}")
    linked = folder / "linked"
    linked.mkdir()
    for name in closure("torch") if transformers else closure("torch", "transformers"):
        distribution = metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (linked / entry).exists():  # some share a folder
                (linked / entry).symlink_to(Path(str(distribution.locate_file(entry))).resolve())
    # After pip, which would take the links for packages of its own; behind what pip installed.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "linked.pth").write_text(f"{linked}\n")
    return python


def closure(*names: str) -> set[str]:
    """Distributions with all that they require."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        wanted = (Requirement(line) for line in metadata.requires(name) or ())
        left += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def run_in(python: Path | str, code: str, *arguments: object, home: Path, **environment: str) -> Any:
    """Runs code in an environment; what it prints last is JSON.

    Args:
        python: from `make_environment`.
        code: of a script.
        arguments: `sys.argv[1:]` of it.
        home: folder of the Hub's cache.
        environment: variables to set.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=home,
        env={**variables, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


HERE = sys.executable
"""the Python of the tests"""
