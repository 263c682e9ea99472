"""What every test may rely on: the folder `kernels` of this repository is the one that `import kernels` finds.

A distribution of the same name would shadow it, or be shadowed by it, and transformers changes what it does when such
a distribution is there. Both would make tests say something about another program.
"""

from __future__ import annotations

import os
from importlib import metadata

import pytest

# Tiny models gain nothing from a second thread, and where another process has the core they lose it all to waiting.
# Set before torch is imported, and inherited by the servers that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    refuse_foreign_kernels()


def refuse_foreign_kernels() -> None:
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    raise pytest.UsageError(
        f"the environment holds the distribution kernels {version}, which has the name of this repository's folder: "
        "pip uninstall kernels"
    )
