"""Routes of API keys, what their quotas and roles do to requests, and the command that makes the first one."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
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
from server.telemetry.logs import JsonFormatter
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


async def test_a_line_says_who_has_made_or_revoked_a_key(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fields = {"name": "of acme", "role": "admin", "tenant": "acme"}
    admin = (await http.post("/v1/keys", json=fields, headers=ADMIN)).json()
    header = {"Authorization": f"Bearer {admin['key']}"}
    made = (await http.post("/v1/keys", json={"name": "reader"}, headers=header)).json()
    assert (await http.delete(f"/v1/keys/{made['id']}", headers=header)).status_code == 200
    assert (await http.delete(f"/v1/keys/{made['id']}", headers=header)).status_code == 404
    assert changes(caplog) == [
        ("an API key was made", admin["id"], "admin", "acme", "api_key"),
        ("an API key was made", made["id"], "inference", "acme", admin["id"]),
        ("an API key was revoked", made["id"], "inference", "acme", admin["id"]),
    ]
    logged = "".join(JsonFormatter().format(record) for record in caplog.records)
    assert admin["id"] in logged
    assert not [secret for secret in (admin["key"], made["key"], SETTING) if secret in logged]


def changes(caplog: pytest.LogCaptureFixture) -> list[tuple[str, ...]]:
    """Return the lines about keys: the message, the key, its role and tenant, and who did it."""
    records = [vars(record) for record in caplog.records if record.name == "server.access.keys"]
    return [(line["message"], line["key"], line["role"], line["tenant"], line["by"]) for line in records]


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


async def test_candidates_count_for_the_quota_of_tokens(http: httpx.AsyncClient) -> None:
    header = await make(http, limits={"tokens": 10})
    body = {"prompt": "x", "candidates": ["a b c d e f g h i j", "b"]}
    statuses = [(await http.post("/v1/score", json=body, headers=header)).status_code for _ in range(2)]
    assert statuses == [200, 429]


async def test_the_text_of_a_search_counts_for_the_quota_of_tokens(http: httpx.AsyncClient) -> None:
    examples = [{"text": "a cat", "label": "cat"}, {"text": "a dog", "label": "dog"}]
    await http.post("/v1/support_sets", json={"name": "texts", "examples": examples}, headers=ADMIN)
    header = await make(http, limits={"tokens": 10})
    body = {"strategy": "rices_text", "query": {"text": "a b c d e f g h i j"}}
    responses = [await http.post("/v1/support_sets/texts/search", json=body, headers=header) for _ in range(2)]
    assert [response.status_code for response in responses] == [200, 429]
    metrics = (await http.get("/metrics", headers=ADMIN)).text
    assert re.search(r"^flamboyance:prompt_tokens_total\S* 1\d\.0$", metrics, re.MULTILINE)


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


async def test_health_is_answered_also_when_a_limit_is_used_up(http: httpx.AsyncClient) -> None:
    header = await make(http, limits={"requests": 1})
    paths = ("/health", "/health/progress", "/health/ready", "/health/live")
    for path in paths:  # none of these counts
        assert (await http.get(path, headers=header)).status_code == 200
    assert (await http.get("/v1/models", headers=header)).status_code == 200
    assert (await http.get("/v1/models", headers=header)).status_code == 429
    assert [(await http.get(path, headers=header)).status_code for path in paths] == [200] * 4


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_a_body_may_go_beyond_the_limit_of_bytes_once(
    http: httpx.AsyncClient, app: FastAPI, is_chunked: bool
) -> None:
    header = await make(http, limits={"bytes": 20}) | {"Content-Type": "application/json"}
    body = json.dumps({"prompt": "x" * 20}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for byte in body:
            yield bytes([byte])

    statuses = []
    # the other client reads the body of a request again, to compare it with the document
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for _ in range(2):
            content = pieces() if is_chunked else body
            statuses.append((await client.post("/v1/completions", content=content, headers=header)).status_code)
    assert statuses == [200, 429]


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
    refused = await http.post("/v1/completions", json=body, headers=await make(http, role="admin", tenant="acme"))
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "priority")
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
        assert "flamboyance keys create NAME --role admin" in refused.json()["error"]["message"]
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
    assert key_id in listed
    assert "team" in listed
    assert "acme" in listed
    assert "100 tokens/min" in listed
    assert "3 support sets" in listed
    assert secret not in listed
    assert main(["keys", "list", "--json", *location]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert [card[name] for name in ("id", "name", "tenant", "role")] == [key_id, "team", "acme", "inference"]
    assert {name: limit for name, limit in card["limits"].items() if limit} == {"tokens": 100, "support_sets": 3}
    assert main(["keys", "revoke", key_id, *location]) == 2
    assert "a server without keys is open: create another one first, or use --last" in capsys.readouterr().err
    assert main(["keys", "revoke", key_id, "--last", *location]) == 0
    assert main(["keys", "revoke", key_id, *location]) == 2
    assert "no API key has the id" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["keys", "create", "caf\udce9", *location])
    for tenant in ("../acme", "acme\n"):
        with pytest.raises(SystemExit):
            main(["keys", "create", "team", "--tenant", tenant, *location])
        assert "--tenant: at most 48 lower-case letters" in capsys.readouterr().err


def test_a_name_is_listed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("team [blue] x", "ops [/x]", ":cat:"):
        assert main(["keys", "create", name, "--data-dir", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--data-dir", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert all(f" {name} " in listed for name in ("team [blue] x", "ops [/x]", ":cat:"))


@pytest.mark.parametrize("name", ["\u00a0Ana", "👩\u200d🔬", "a\u180e", "a\u202e", "a\n"])
async def test_the_command_and_the_api_accept_the_same_names(
    name: str, http: httpx.AsyncClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = json.dumps({"name": name}).encode()
    response = await http.post("/v1/keys", content=body, headers=ADMIN | {"Content-Type": "application/json"})
    is_accepted = response.status_code == 200
    assert is_accepted or response.json()["error"]["param"] == "name"
    try:
        code = await asyncio.to_thread(main, ["keys", "create", name, "--data-dir", str(tmp_path)])
    except SystemExit:
        code = 2
        assert "1 to 128 characters are accepted" in capsys.readouterr().err
    assert code == (0 if is_accepted else 2)


def test_a_name_that_a_terminal_would_obey_is_listed_in_ascii(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def create() -> None:
        database = Database(f"sqlite:///{tmp_path / 'flamboyance.db'}")
        await Keys(database).create("\u009b31mred", "inference")
        database.close()

    asyncio.run(create())
    assert main(["keys", "list", "--data-dir", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "\\x9b31mred" in listed
    assert "\u009b" not in listed


@pytest.mark.parametrize("command", [["list"], ["create", "me"], ["revoke", "key_1"]])
def test_only_the_start_of_a_server_upgrades_the_tables(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server that runs on them may be older, and would not start again."""
    assert main(["keys", "create", "me", "--data-dir", str(tmp_path)]) == 0
    file = tmp_path / "flamboyance.db"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0005'")
    capsys.readouterr()
    assert main(["keys", *command, "--data-dir", str(tmp_path)]) == 2
    assert "its schema has version 0005, and the server upgrades it to" in capsys.readouterr().err
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("0005",)


@pytest.mark.parametrize("command", [["keys", "list"], ["keys", "revoke", "key_1"], ["backup", "copy.tar"]])
def test_a_command_that_needs_a_database_creates_no_folder(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "typo"
    assert main([*command, "--data-dir", str(folder)]) == 2
    assert capsys.readouterr().err == f"error: data_dir: the database {folder / 'flamboyance.db'} does not exist\n"
    assert not folder.exists()
    assert main(["keys", "create", "me", "--data-dir", str(folder)]) == 0
    assert main(["keys", "list", "--data-dir", str(folder)]) == 0


@pytest.mark.parametrize(("role", "is_advised"), [("inference", True), ("admin", False)])
def test_the_first_key_closes_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str, is_advised: bool
) -> None:
    closed = "the server now refuses requests without a key"
    assert main(["keys", "create", "me", "--role", role, "--data-dir", str(tmp_path)]) == 0
    notes = capsys.readouterr().err
    assert closed in notes
    assert ("create another one: keys create NAME --role admin" in notes) == is_advised
    assert main(["keys", "create", "you", "--data-dir", str(tmp_path)]) == 0
    assert closed not in capsys.readouterr().err


def test_the_command_logs_what_it_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAMBOYANCE_LOG_FORMAT", "json")
    assert main(["keys", "create", "me", "--role", "manage", "--data-dir", str(tmp_path)]) == 0
    secret, made = capsys.readouterr()
    line = change(made)
    assert (line["message"], line["role"], line["tenant"]) == ("an API key was made", "manage", None)
    assert line["by"] == "flamboyance keys"
    assert secret.strip() not in made
    assert main(["keys", "revoke", line["key"], "--last", "--data-dir", str(tmp_path)]) == 0
    revoked = change(capsys.readouterr().err)
    assert (revoked["message"], revoked["key"]) == ("an API key was revoked", line["key"])


def change(errors: str) -> dict[str, Any]:
    """Return the line about a key among those on standard error."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["logger"] == "server.access.keys"]
    return line
