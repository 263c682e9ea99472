"""The choice of the backend, accepted, refused or described; and the launch table with its defaults and files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import backend
from kernels.backend import (
    DEFAULTS,
    BackendError,
    Launch,
    describe,
    launch_config,
    select,
    use_compiled,
    use_triton,
)


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
    with pytest.raises(BackendError, match="'cuda' is not one of auto, triton, reference"):
        select("cuda")  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_gpu")
def test_without_numba_the_reference_serves_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "numba", None)
    assert not use_compiled(torch.zeros(1))
    assert (describe()["backend"], describe()["numba"]) == ("reference", None)


@pytest.fixture
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "architecture", lambda: "sm_90")
    monkeypatch.setattr(backend, "TABLE", dict(backend.TABLE))


@pytest.mark.usefixtures("on_sm_90")
def test_a_row_of_the_table_comes_before_the_default() -> None:
    assert launch_config("paged_prefill", 128, torch.bfloat16) == Launch(64, 8, 2)
    assert launch_config("paged_prefill", 128, torch.float32) == DEFAULTS["paged_prefill"]
    assert launch_config("paged_prefill", 48, torch.bfloat16) == DEFAULTS["paged_prefill"]


def test_media_attention_has_one_shape_of_tile() -> None:
    """Decode and prefill sum in one order only while no row of the table takes 64 rows or more."""
    shapes = [launch for (operator, *_), launch in backend.TABLE.items() if operator == "media"]
    assert all(launch.block <= 32 and launch.num_warps == 4 for launch in [*shapes, DEFAULTS["media"]])


@pytest.mark.parametrize(
    ("supports", "avx512", "avx512_bf16", "expected"),
    [
        (False, False, False, False),  # AVX2
        (True, True, False, False),  # AVX-512 alone: oneDNN emulates bfloat16
        (True, True, True, True),
        (True, False, False, True),  # Arm
    ],
)
def test_emulated_bfloat16_is_not_arithmetic_in_bfloat16(
    supports: bool, avx512: bool, avx512_bf16: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supports, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert backend.has_bfloat16() is expected
