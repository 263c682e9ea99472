"""Makes sure that `import kernels` imports the folder `kernels` of this repository.

A distribution of the same name would shadow the folder or be shadowed by it, and transformers behaves differently when
such a distribution is installed. In both cases the tests would test another program.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from importlib import metadata

import pytest

# Tiny models gain nothing from a second thread, and become slow if another process uses its core. The variable is set
# before torch is imported, and is inherited by servers that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Keep a command that a test runs in this process from sending the logs of later tests to its standard error."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def pytest_configure() -> None:
    refuse_foreign_kernels()


def refuse_foreign_kernels() -> None:
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    raise pytest.UsageError(
        f"the environment contains the distribution kernels {version}, which has the name of a folder of this repository: "
        "pip uninstall kernels"
    )
