"""Freed buffers of bodies go back to the system; measured in a process of its own, whose heap no other test has used."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# after a large body, smaller ones that come and go, and each time a small object that stays
PROGRAM = """
import sys
import psutil
from server.allocator import return_freed_memory

if sys.argv[1] == "adjusted":
    return_freed_memory()
before, kept = psutil.Process().memory_info().rss, []
bytearray(b"x") * (30 << 20)
for _ in range(20):
    bodies = [bytearray(b"x") * (8 << 20) for _ in range(8)]
    kept.append(b"y" * (100 << 10))
    del bodies
print((psutil.Process().memory_info().rss - before) >> 20)
"""


def growth(setting: str) -> int:
    """Return by how many MiB a process has grown after it has freed its bodies."""
    command = [sys.executable, "-c", PROGRAM, setting]
    return int(subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed buffers")
def test_freed_bodies_go_back_to_the_system() -> None:
    assert growth("default") > 40, "glibc keeps them by default: the program shows what is prevented"
    assert growth("adjusted") < 10
