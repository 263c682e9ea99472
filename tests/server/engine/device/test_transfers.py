"""Tensors that are copied together arrive as they were, whatever their dtypes and sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.engine.device.transfers import Downloads, Mirror, upload
from tests.stand_in_device import DEVICE, DeviceTensor, stand_in_device

TENSORS = [
    torch.tensor([True, False, True]),
    torch.arange(5) - 2,
    torch.zeros(0, 7, dtype=torch.int64),
    torch.tensor(3.5),
    torch.arange(6, dtype=torch.int32).view(2, 3).T,
    torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16),
    torch.tensor([0.1], dtype=torch.float64),
]


def begun(tensors: list[Tensor]) -> tuple[Downloads, list[Tensor]]:
    """Begin to copy tensors to the host; return the copies, and the list that they enter when they have arrived."""
    downloads, arrived = Downloads(), list[Tensor]()
    downloads.add(tensors, lambda *copies: arrived.extend(copies))
    downloads.begin()
    return downloads, arrived


def assert_equal(copies: list[Tensor]) -> None:
    assert [copy.dtype for copy in copies] == [tensor.dtype for tensor in TENSORS]
    for copy, tensor in zip(copies, TENSORS, strict=True):
        assert torch.equal(copy, tensor)


def test_copies_equal_the_tensors() -> None:
    with stand_in_device() as waits:
        copies = upload(TENSORS, DEVICE)
        assert all(isinstance(copy, DeviceTensor) for copy in copies)
        assert (waits, waits.num_uploads) == ([], 1)
        download, results = begun(copies)
        assert (waits, results) == ([], [])
        download.finish()
        assert waits == ["copy to the host"]
    assert_equal(results)


def test_a_cpu_copies_nothing() -> None:
    _, copies = begun(upload(TENSORS, torch.device("cpu")))
    assert all(copy is tensor for copy, tensor in zip(copies, TENSORS, strict=True))


def test_a_mirror_has_the_values_that_were_sent_last() -> None:
    mirror = Mirror(TENSORS, torch.device("cpu"))
    assert_equal(mirror.on_device)
    for side, value in ((1, 9), (0, 8), (1, 7)):
        mirror.on_host[side][1].fill_(value)
        assert mirror.on_device[1].tolist() != [value] * 5
        mirror.send(side)
        assert mirror.on_device[1].tolist() == [value] * 5


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_results_are_used_in_the_order_in_which_they_were_added(device: str) -> None:
    downloads, calls = Downloads(), list[tuple[str, list[int]]]()
    with stand_in_device() as waits:
        for name, values in (("first", [1, 2]), ("second", [3])):
            tensors = upload(list(map(torch.tensor, values)), torch.device(device))
            downloads.add(tensors, lambda name, *v: calls.append((name, list(map(int, v)))), name)
        assert not calls
        downloads.begin()
        assert bool(calls) == (device == "cpu")
        downloads.finish()
        downloads.finish()
        assert len(waits) == (device == "meta")
    assert calls == [("first", [1, 2]), ("second", [3])]


def test_what_the_device_does_after_a_copy_has_begun_does_not_change_it() -> None:
    with stand_in_device():
        copies = upload(TENSORS, DEVICE)
        download, results = begun(copies)
        for copy in copies:
            copy.zero_()
        download.finish()
    assert_equal(results)
