"""The choice of the backend: which requests are accepted, which are refused, and how the choice is described."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import backend
from kernels.backend import BackendError, describe, select, use_compiled, use_triton


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    select("auto")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_auto_serves_a_cpu_with_numba_and_reports_the_reason() -> None:
    select("auto")
    assert not use_triton(torch.zeros(1))
    assert use_compiled(torch.zeros(1))
    assert describe() == {
        "requested": "auto",
        "backend": "numba",
        "reason": "torch sees no GPU",
        "torch": torch.__version__,
        "triton": backend.triton.__version__,
        "numba": backend.numba.__version__,
        "device": "cpu",
    }


@pytest.mark.usefixtures("no_gpu")
def test_requesting_triton_where_it_cannot_run_raises_and_changes_nothing() -> None:
    with pytest.raises(BackendError, match="requested, but torch sees no GPU"):
        select("triton")
    assert describe()["requested"] == "auto"


@pytest.mark.usefixtures("no_gpu")
def test_a_missing_triton_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(BackendError, match="triton is not installed"):
        select("triton")
    assert describe()["triton"] is None


def test_requested_triton_raises_for_a_cpu_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_obstacle", lambda: None)
    select("triton")
    with pytest.raises(BackendError, match="a tensor is on cpu"):
        use_triton(torch.zeros(1))


def test_a_requested_reference_is_used_even_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_obstacle", lambda: None)
    select("reference")
    assert not use_triton(torch.zeros(1))
    assert (describe()["backend"], describe()["reason"]) == ("reference", "requested")


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(BackendError, match="'cuda' is none of auto, triton, reference"):
        select("cuda")  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_gpu")
def test_without_numba_the_reference_serves_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "numba", None)
    assert not use_compiled(torch.zeros(1))
    assert (describe()["backend"], describe()["numba"]) == ("reference", None)
