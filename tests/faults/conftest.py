"""Inputs that the tests of faults share."""

from __future__ import annotations

import pytest

from tests.faults.commands import Base, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Checkpoints, data and a finished run, which no fault may touch."""
    return make_base(tmp_path_factory.mktemp("base"))
