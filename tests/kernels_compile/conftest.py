"""Compiles the kernels with no GPU: `compile_for` gives the tests what a launch compiles to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import triton

from kernels.bench.ahead_of_time import Compiled, compiling, read

collect_ignore_glob = ["*"] if triton.knobs.runtime.interpret else []


@pytest.fixture
def compile_for() -> Callable[..., list[Compiled]]:
    """Return by `compile_for(target, launch)` the binaries that `launch()` would have started."""

    def compile_for(target: str, launch: Callable[[], object]) -> list[Compiled]:
        with compiling(target) as launched:
            launch()
        return read(launched, target)

    return compile_for
