"""Web pages of other sites: names that lead to this machine, and origins that the settings permit."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from server.access.pages import LOCAL_NAMES, allowed_hosts, name_of
from server.app import create_app
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.conftest import png
from tests.server.fakes import FakeClient, served_model

pytestmark = pytest.mark.anyio
PAGE = "https://app.example.org"


def client(settings: Settings) -> httpx.AsyncClient:
    app = create_app(FakeClient(), served_model(), settings, Metrics("tiny"))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000")


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8000", "localhost"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]:8000", "[::1]"),
        ("[::1]", "[::1]"),
        ("localhost.:8000", "localhost"),
        ("localhost:", "localhost"),
        ("a.org:x", "a.org:x"),
        ("", ""),
    ],
)
def test_the_name_in_a_host_header(header: str, name: str) -> None:
    assert name_of(header) == name


def test_a_server_that_others_can_reach_accepts_any_name() -> None:
    assert allowed_hosts(Settings(host="0.0.0.0")) is None
    assert allowed_hosts(Settings(host="127.0.0.1", api_key="long enough")) is None
    assert allowed_hosts(Settings(host="127.0.0.1")) == LOCAL_NAMES
    assert allowed_hosts(Settings(host="127.0.0.2")) == frozenset({*LOCAL_NAMES, "127.0.0.2"})
    assert allowed_hosts(Settings(host="localhost")) == LOCAL_NAMES
    assert allowed_hosts(Settings(host="::ffff:127.0.0.1")) is not None
    assert allowed_hosts(Settings(host="0.0.0.0", allowed_hosts="A.org, b.org")) == frozenset({"a.org", "b.org"})


async def test_a_page_whose_name_leads_to_this_machine_is_refused(tmp_path: Path) -> None:
    async with client(Settings(data_dir=tmp_path)) as http:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", ""):
            assert (await http.get("/v1/models", headers={"Host": host})).status_code == 200
        for host in ("evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"):
            refused = await http.get("/v1/models", headers={"Host": host})
            assert (refused.status_code, refused.json()["error"]["code"]) == (421, "host_not_allowed")
        assert (await http.get("/health/live", headers={"Host": "10.1.2.3:8000"})).status_code == 200  # a probe


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("10.1.2.3:8000", 200),  # a scraper that knows the servers of a cluster by their addresses
        ("[fd00::1]:8000", 200),
        ("evil.example:8000", 421),
        ("10.1.2.3.evil.example", 421),
        ("0x7f.1", 421),
    ],
)
async def test_a_page_whose_name_leads_to_this_machine_reads_no_metrics(host: str, status: int, tmp_path: Path) -> None:
    async with client(Settings(data_dir=tmp_path)) as http:
        assert (await http.get("/metrics", headers={"Host": host})).status_code == status


@pytest.mark.parametrize(
    ("headers", "is_refused"),
    [
        ({}, False),
        ({"Origin": PAGE}, True),
        ({"Origin": "null"}, True),
        ({"Origin": "http://["}, True),
        ({"Origin": "http://localhost:8000"}, False),
        ({"Origin": "http://localhost:9000"}, True),
        ({"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}, True),
        ({"Origin": PAGE, "Sec-Fetch-Site": "same-site"}, True),
        ({"Sec-Fetch-Site": "cross-site"}, True),
        # a proxy has replaced the name in Host
        ({"Origin": PAGE, "Sec-Fetch-Site": "same-origin"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        # a page of another site cannot add it
        ({"Origin": PAGE, "Authorization": "Bearer any"}, False),
    ],
)
async def test_a_form_of_another_site_changes_nothing(
    headers: dict[str, str], is_refused: bool, tmp_path: Path
) -> None:
    """A browser sends a form, and a request without a body, to another site without asking it."""
    async with client(Settings(data_dir=tmp_path)) as http:
        page = repr(headers["Origin"]) if "Origin" in headers else "another site"
        form = await http.post("/v1/images", files={"file": ("a.png", png())}, headers=headers)
        without_body = await http.post("/v1/support_sets/none/evaluate", headers=headers)
        assert (form.status_code, without_body.status_code) == ((403, 403) if is_refused else (200, 404))
        if is_refused:
            assert form.json()["error"]["code"] == without_body.json()["error"]["code"] == "origin_not_allowed"
            assert form.json()["error"]["message"].startswith(f"pages of {page} may not send")
        assert (await http.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("origins", [PAGE, "*"])
async def test_a_page_of_a_permitted_origin_sends_forms(origins: str, tmp_path: Path) -> None:
    headers = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}
    async with client(Settings(data_dir=tmp_path, cors_origins=origins)) as http:
        assert (await http.post("/v1/images", files={"file": ("a.png", png())}, headers=headers)).status_code == 200


async def test_no_page_is_permitted_by_default(tmp_path: Path) -> None:
    async with client(Settings(data_dir=tmp_path)) as http:
        preflight = await http.options(
            "/v1/completions", headers={"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        )
        answered = await http.get("/v1/models", headers={"Origin": PAGE})
        assert not [
            name for response in (preflight, answered) for name in response.headers if name.startswith("access-")
        ]


async def test_a_page_of_a_permitted_origin_is_answered_without_a_key(tmp_path: Path) -> None:
    """The question of a browser has no key; the request that follows needs one."""
    question = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    async with client(
        Settings(data_dir=tmp_path, api_key="long enough", cors_origins=f"{PAGE}, https://b.org")
    ) as http:
        preflight = await http.options("/v1/completions", headers={"Origin": PAGE, **question})
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        other = await http.options("/v1/completions", headers={"Origin": "https://evil.example", **question})
        assert "access-control-allow-origin" not in other.headers
        answered = await http.get("/v1/models", headers={"Origin": PAGE, "Authorization": "Bearer long enough"})
        assert answered.headers["access-control-allow-origin"] == PAGE
        assert "X-Request-Id" in answered.headers["access-control-expose-headers"]
        refused = await http.get("/v1/models", headers={"Origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
