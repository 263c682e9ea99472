"""Routes of API keys, what their quotas and roles do to requests, and the command that makes the first one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from flamboyance.command_line import main
from server.access.keys import Keys
from server.limits.admission import Ticket
from server.settings import Settings
from server.store.database import Database
from tests.server.conftest import image_part

pytestmark = pytest.mark.anyio
SETTING = "the key of the setting"
ADMIN = {"Authorization": f"Bearer {SETTING}"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"api_key": Settings(api_key=SETTING).api_key, "allow_negative_priority": True})


async def make(http: httpx.AsyncClient, **fields: Any) -> dict[str, str]:
    """Make a key, and return its header."""
    response = await http.post("/v1/keys", json={"name": "test", **fields}, headers=ADMIN)
    assert response.status_code == 200
    return {"Authorization": f"Bearer {response.json()['key']}"}


async def test_a_key_is_made_used_listed_and_revoked(http: httpx.AsyncClient) -> None:
    made = (await http.post("/v1/keys", json={"name": "team", "limits": {"requests": 9}}, headers=ADMIN)).json()
    assert (made["role"], made["limits"]["requests"], made["limits"]["tokens"]) == ("inference", 9, None)
    header = {"Authorization": f"Bearer {made['key']}"}
    assert (await http.post("/v1/completions", json={"prompt": "x"}, headers=header)).status_code == 200
    listed = (await http.get("/v1/keys", headers=ADMIN)).json()["data"]
    assert listed == [{name: value for name, value in made.items() if name != "key"}]
    assert (await http.delete(f"/v1/keys/{made['id']}", headers=ADMIN)).json()["deleted"] is True
    assert (await http.post("/v1/completions", json={"prompt": "x"}, headers=header)).status_code == 401
    assert (await http.delete(f"/v1/keys/{made['id']}", headers=ADMIN)).json()["error"]["code"] == "key_not_found"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\0"}, "name"),
        ({"name": "a", "role": "root"}, "role"),
        ({"name": "a", "limits": {"requests": 0}}, "limits.requests"),
        ({"name": "a", "limits": {"cats": 1}}, "limits.cats"),
    ],
)
async def test_a_wrong_field_is_named(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await http.post("/v1/keys", json=fields, headers=ADMIN)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["param"] == param


async def test_the_quota_of_requests(http: httpx.AsyncClient) -> None:
    header = await make(http, limits={"requests": 2})
    statuses = [
        (await http.post("/v1/completions", json={"prompt": "x"}, headers=header)).status_code for _ in range(3)
    ]
    assert statuses == [200, 200, 429]
    refused = await http.get("/v1/models", headers=header)
    assert refused.json()["error"]["code"] == "quota_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert (await http.get("/v1/models", headers=ADMIN)).status_code == 200


@pytest.mark.parametrize("limits", [{"tokens": 1}, {"media": 1}, {"bytes": 20}])
async def test_the_quota_of_what_a_request_uses(http: httpx.AsyncClient, limits: dict[str, int]) -> None:
    header = await make(http, limits=limits)
    body = {"prompt": [image_part(), {"type": "text", "text": "x"}]}
    statuses = [(await http.post("/v1/completions", json=body, headers=header)).status_code for _ in range(2)]
    assert statuses == [200, 429]


async def test_only_a_manager_goes_before_others(http: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "priority": -1}
    refused = await http.post("/v1/completions", json=body, headers=await make(http))
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "priority")
    allowed = await http.post("/v1/completions", json=body, headers=await make(http, role="manage"))
    assert allowed.status_code == 200
    yielding = await http.post("/v1/completions", json={"prompt": "x", "priority": 1}, headers=await make(http))
    assert yielding.status_code == 200


async def test_the_share_of_the_queue_is_a_keys_and_not_an_addresss(http: httpx.AsyncClient, app: FastAPI) -> None:
    services, seen = app.state.services, list[str]()
    ticket = services.admission.ticket

    def note(client: str) -> Ticket:
        seen.append(client)
        return ticket(client)

    services.admission.ticket = note
    for _ in range(2):
        await http.post("/v1/completions", json={"prompt": "x"}, headers=await make(http))
    keys = [key.id for key in await services.keys.all()]
    assert [client for client in seen if client.startswith("key_")] == keys


class TestOpenServer:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"api_key": None})

    async def test_a_stranger_cannot_make_the_first_key(self, http: httpx.AsyncClient) -> None:
        refused = await http.post("/v1/keys", json={"name": "mine", "role": "admin"})
        assert refused.status_code == 403
        assert "flamboyance keys create" in refused.json()["error"]["message"]
        assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200

    async def test_the_first_key_closes_the_server(
        self, http: httpx.AsyncClient, app: FastAPI, settings: Settings, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["keys", "create", "me", "--role", "admin", "--requests", "5", "--data-dir", str(settings.data_dir)]
        assert await asyncio.to_thread(main, command) == 0
        header = {"Authorization": f"Bearer {capsys.readouterr().out.strip()}"}
        assert (await http.get("/v1/models", headers=header)).status_code == 200
        assert (await http.get("/v1/models")).status_code == 401


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    location = ["--data-dir", str(tmp_path)]
    limits = ["--tokens", "100", "--support-sets", "3"]
    assert main(["keys", "create", "team", "--tenant", "acme", *limits, *location]) == 0
    secret = capsys.readouterr().out.strip()

    async def find() -> str | None:
        database = Database(f"sqlite:///{tmp_path / 'flamboyance.db'}")
        key = await Keys(database).find(secret)
        database.close()
        assert key is None or key.tenant == "acme"
        return None if key is None else key.id

    key_id = asyncio.run(find())
    assert key_id is not None
    assert main(["keys", "list", *location]) == 0
    listed = capsys.readouterr().out
    assert "team" in listed
    assert "acme" in listed
    assert "100 tokens/min" in listed
    assert "3 support sets" in listed
    assert secret not in listed
    assert main(["keys", "revoke", key_id, *location]) == 2
    assert "a server without keys is open" in capsys.readouterr().err
    assert main(["keys", "revoke", key_id, "--last", *location]) == 0
    assert main(["keys", "revoke", key_id, *location]) == 2
    assert "no API key has the id" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["keys", "create", "team", "--tenant", "../acme", *location])
    assert "--tenant: at most 48 lower-case letters" in capsys.readouterr().err
