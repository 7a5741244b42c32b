"""Fixtures shared by the tests of checkpoints on disk."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import make_checkpoint
from tests.environments import make_environment


@pytest.fixture(scope="session")
def _made_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes each kind of tiny checkpoint once a session; its folder is shared, so never edited."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(model_type: str, **options: Any) -> Path:
        key = (model_type, *sorted(options.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("made") / model_type, model_type, **options)
        return made[key]

    return make


@pytest.fixture
def tiny_checkpoint(_made_checkpoints: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`tiny_checkpoint(model_type, tied=, spare_rows=, mask_token=, shards=, dtype=)`: a fresh copy to damage."""
    counter = itertools.count()

    def copy(model_type: str, **options: Any) -> Path:
        source = _made_checkpoints(model_type, **options)
        return Path(shutil.copytree(source, tmp_path / f"source-{next(counter)}" / model_type))

    return copy


@pytest.fixture(scope="session")
def python_of_4_57(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with transformers 4.57 and torch; it takes minutes to install."""
    return make_environment(tmp_path_factory.mktemp("old") / "venv", "4.57.*")
