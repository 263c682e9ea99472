"""The fixture of one tiny server that the tests of all clients share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.serving import tiny_server


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tiny_server(tmp_path_factory.mktemp("server")) as url:
        yield url
