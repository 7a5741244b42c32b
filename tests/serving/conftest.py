"""One tiny model for all tests of serving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.endpoint import Endpoint, Model, make_converted, serving


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="package")
def model(checkpoint: Path) -> Model:
    return Model.load(checkpoint)


@pytest.fixture(scope="module")
def endpoint(model: Model) -> Iterator[Endpoint]:
    with serving(model) as running:
        yield running
