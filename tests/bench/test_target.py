"""The processes of a server that a benchmark measures: one that ends while they are listed is no failure."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from bench.serving import free_port
from bench.target import Target

UNTIL_ITS_INPUT_ENDS = "import sys; sys.stdin.read()"


@pytest.fixture
def target() -> Target:
    """Return a target whose server is the process of this test."""
    return Target(free_port(), process=psutil.Process())


def test_a_child_that_has_ended_and_is_not_reaped_is_no_decoder(target: Target) -> None:
    command = [sys.executable, "-c", UNTIL_ITS_INPUT_ENDS, "server.media.decoder"]
    earlier = {decoder.pid for decoder in target.decoders()}  # of earlier tests in this process
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert {decoder.pid for decoder in target.decoders()} - earlier == {child.pid}
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie until it is reaped
        assert child.pid not in {decoder.pid for decoder in target.decoders()}
