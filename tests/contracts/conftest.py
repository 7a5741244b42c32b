"""Every row of the table in turn, with random weights and with trained ones."""

from __future__ import annotations

import pytest

from tests.contracts.models import CONTRACT_MODELS, Pair, shared_random_pair
from tests.contracts.training import trained_pair


@pytest.fixture(scope="session", params=list(CONTRACT_MODELS))
def pair(request: pytest.FixtureRequest) -> Pair:
    """Random weights, whose drafts are nearly always wrong."""
    return shared_random_pair(request.param)


@pytest.fixture(scope="session", params=list(CONTRACT_MODELS))
def trained(request: pytest.FixtureRequest) -> Pair:
    """Trained weights, whose drafts are often right."""
    return trained_pair(request.param)
