"""The API process is set up to share processors with the worker."""

from __future__ import annotations

import sys

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from server.engine_client.spare import Spare
from server.serving import serve
from server.settings import Settings, SettingsError

pytestmark = pytest.mark.anyio


async def test_products_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    with threadpool_limits(limits=2, user_api="blas"):
        with pytest.raises(SettingsError):
            await serve(Settings(model="/nowhere"), Spare("no:worker", 1.0))
        threads = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
    assert set(threads) == {1}
