"""Copies many tensors at once between host and device: each copy costs a launch, and one to the host also a wait.

On a CPU, which is both, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of each tensor in a copy


def upload(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of the host on the device, by one copy from pinned memory, for which the host does not wait."""
    if device.type == "cpu":
        return list(tables)
    packed = torch.empty(sum(map(_aligned_size, tables)), dtype=torch.uint8, pin_memory=True)
    for part, table in zip(unpack(packed, tables), tables, strict=True):
        part.copy_(table)
    return list(unpack(packed.to(device, non_blocking=True), tables))


def unpack(packed: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Return views of packed bytes, one after the other, with the shapes and dtypes of these tensors."""
    start = 0
    for tensor in tensors:
        yield packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _aligned_size(tensor)


def _aligned_size(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


class Together:
    """Copies that are made together, and what is done with each of them afterwards."""

    def __init__(self) -> None:
        self._pending: list[tuple[Sequence[Tensor], Callable[..., None]]] = []

    def add(self, tensors: Sequence[Tensor], then: Callable[..., None], *arguments: Any) -> None:
        """Call `then` with these arguments and the copies of the tensors, later."""
        self._pending.append((tensors, partial(then, *arguments)))

    @property
    def _tensors(self) -> list[Tensor]:
        return [tensor for tensors, _ in self._pending for tensor in tensors]

    def _use(self, copies: Iterable[Tensor]) -> None:
        """Make the calls in the order in which they were added."""
        pending, self._pending, copies = self._pending, [], iter(copies)
        for tensors, then in pending:
            then(*islice(copies, len(tensors)))


class Uploads(Together):
    """Copies to the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def run(self) -> None:
        self._use(upload(self._tensors, self._device))


class Downloads(Together):
    """Copies to the host. What is on a CPU is used at once, everything else when it has arrived.

    Once the copies have begun, the device may overwrite its tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begun: tuple[Tensor, torch.cuda.Event] | None = None  # all tensors in one on the host, and its arrival

    def begin(self) -> None:
        tensors = self._tensors
        if not tensors or tensors[0].is_cpu:
            self._use(tensors)
            return
        packed = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
        on_host = torch.empty(len(packed), dtype=torch.uint8, pin_memory=True)
        on_host.copy_(packed, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        self._begun = on_host, arrival

    def finish(self) -> None:
        """Wait for the copies that have begun, if there are any."""
        if self._begun is None:
            return
        (on_host, arrival), self._begun = self._begun, None
        arrival.synchronize()
        tensors = self._tensors
        parts = zip(on_host.split([tensor.nbytes for tensor in tensors]), tensors, strict=True)
        # a copy of each, because it begins at an aligned address
        self._use([part.clone().view(tensor.dtype).view(tensor.shape) for part, tensor in parts])


NUM_SIDES = 2


class Mirror:
    """Memory on the device with the same tensors as memory on the host, from which one copy brings their values.

    The host has two sets of the tensors: it can write the next values while the last ones are still copied.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        size, is_pinned = sum(map(_aligned_size, tensors)), device.type != "cpu"
        self._sources = [torch.zeros(size, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(NUM_SIDES)]
        self._target = torch.zeros(size, dtype=torch.uint8, device=device)
        self.on_host = [list(unpack(source, tensors)) for source in self._sources]
        self.on_device = list(unpack(self._target, tensors))
        for parts in self.on_host:
            for part, tensor in zip(parts, tensors, strict=True):
                part.copy_(tensor)
        self.send(NUM_SIDES - 1)  # the first step may be written to the first set before this copy ends

    def send(self, side: int) -> None:
        """Copy the values of a set to the device; the host may overwrite them once it has waited for a later result."""
        self._target.copy_(self._sources[side], non_blocking=True)
