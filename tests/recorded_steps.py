"""A stand-in for CUDA graphs: a step is recorded as a list of operators and kernels, and replayed without its Python code.

As in a graph, a replay reads the tensors that the recorded step has read, and writes those that it has written: whatever
Python decided while it was recorded stays as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from server.engine.device.graphs import Step

Call = Callable[[], Any]


class _Recording(TorchDispatchMode):
    """Runs operators, and notes those that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.launches = Counter[str]()
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.is_paused:
            known = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            fresh = [isinstance(leaf, Tensor) and _address(leaf) not in known for leaf in tree_leaves(result)]
            writes = any(arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments)
            if writes:
                self.calls.append(lambda: func(*args, **kwargs))
            elif any(fresh):
                self.calls.append(lambda: _overwrite(result, fresh, func(*args, **kwargs)))
        return result

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Note the launches of Triton's kernels as well; what its interpreter does with torch is not part of the step."""
        run = InterpretedFunction.run

        def launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(lambda: run(kernel, *args, **kwargs))
            self.launches[kernel.fn.__name__] += 1
            self.is_paused = True
            try:
                return run(kernel, *args, **kwargs)
            finally:
                self.is_paused = False

        with mock.patch.object(InterpretedFunction, "run", launch):
            yield


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _overwrite(result: Any, fresh: list[bool], again: Any) -> None:
    for target, is_fresh, value in zip(tree_leaves(result), fresh, tree_leaves(again), strict=True):
        if is_fresh:
            target.copy_(value)


def record_on_cpu(step: Step, launches: list[Counter[str]] | None = None) -> Step:
    """Record a step, on a CPU where all that computes is an operator of torch or a kernel in Triton's interpreter.

    The number of launches of each kernel is appended to `launches`.
    """
    recording = _Recording()
    with recording, recording.kernels():
        step()
    if launches is not None:
        launches.append(recording.launches)

    def replay() -> None:
        for call in recording.calls:
            call()

    return replay
