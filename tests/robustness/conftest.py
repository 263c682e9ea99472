"""The fixture of one server in its own process, with a model of random weights, that the short forms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.random_models import folder
from bench.target import Target, running
from server.settings import Settings


@pytest.fixture(scope="session")
def target() -> Iterator[Target]:
    settings = Settings(model=str(folder("tiny")), num_threads=1, decode_processes=1)
    with running(settings) as target:
        yield target
