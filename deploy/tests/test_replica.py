"""A replica without Ray: what it reports about its models."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from server.settings import Settings
from server.telemetry import logs

with warnings.catch_warnings():  # of Ray's own modules
    warnings.simplefilter("ignore")
    from ray import serve

    from deploy.ray import replica as module
    from deploy.ray.replica import Replica


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Replica:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="a"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(module, "set_up_process", lambda: None)
    monkeypatch.setattr(logs, "configure", lambda level, log_format: None)
    return Replica(Settings())


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({"first": "ready"}, "ready"),
        ({"first": "restarting", "second": "ready"}, "restarting"),
        ({"second": "restarting", "third": "ready"}, "ready"),
        ({"second": "restarting"}, "starting"),
        ({}, "starting"),
    ],
    ids=str,
)
async def test_a_replica_is_ready_also_if_others_have_replaced_its_first_model(
    states: dict[str, str], expected: str, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load balancer sends nothing to a fleet that is not ready, so the first model would never be loaded again."""
    loaded = {name: SimpleNamespace(application=SimpleNamespace(engine_state=state)) for name, state in states.items()}
    monkeypatch.setattr(replica, "_configs", dict.fromkeys(("first", "second", "third")))
    monkeypatch.setattr(replica, "_loaded", loaded)
    assert await replica.readiness() == expected
