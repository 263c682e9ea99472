"""The playground: its files are served with a strict policy, without the key, and only from its folder."""

from __future__ import annotations

import re

import httpx
import pytest
from pydantic import SecretStr

from server.api.routes.playground import FILES
from server.settings import Settings

pytestmark = pytest.mark.anyio


async def test_the_page_and_all_files_that_it_names_are_served(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    names = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(names) >= 3  # an icon, a script, a style
    for name in names:
        assert (await http.get(name)).status_code == 200, name


async def test_the_policy_permits_no_inline_script_and_no_other_host(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "//" not in policy
    assert "<script>" not in page.text
    assert " style=" not in page.text


async def test_hashed_files_are_kept_and_the_page_is_revalidated(
    http: httpx.AsyncClient,
) -> None:
    hashed = next(name for name in FILES if name.endswith(".js"))
    assert "immutable" in (await http.get(f"/playground/{hashed}")).headers["cache-control"]
    assert (await http.get("/")).headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/docs.js", "/playground/flamingo.svg"])
async def test_a_file_is_sent_whole_or_not_at_all(http: httpx.AsyncClient, path: str) -> None:
    whole = await http.get(path)
    assert int(whole.headers["content-length"]) == len(whole.content) > 0
    for part in ("bytes=0-9", "bytes=5-1", "bytes=999999999-", "lines=1-2", "junk"):
        response = await http.get(path, headers={"Range": part})
        assert (response.status_code, response.content) == (200, whole.content)
    for tag in (whole.headers["etag"], f'"other", W/{whole.headers["etag"]}', "*"):
        response = await http.get(path, headers={"If-None-Match": tag})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == whole.headers["etag"]
    assert (await http.get(path, headers={"If-None-Match": '"other"'})).content == whole.content


@pytest.mark.parametrize(
    ("path", "page"), [("/playground/", "/"), ("/playground", "/"), ("/docs/", "/docs")], ids=lambda path: path
)
async def test_a_path_that_is_almost_that_of_a_page_leads_to_it(http: httpx.AsyncClient, path: str, page: str) -> None:
    response = await http.get(path)
    assert response.is_redirect
    assert str(response.url.join(response.headers["location"]).path) == page
    assert not response.headers["location"].startswith("/"), "a proxy may serve the pages under a prefix"


@pytest.mark.parametrize("path", ["/playground/../docs.html", "/playground/%2e%2e/docs.html", "/playground/x"])
async def test_no_other_file_is_served(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).status_code == 404


class TestWithKey:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"api_key": SecretStr("very secret")})

    async def test_the_page_needs_no_key_and_what_it_calls_does(self, http: httpx.AsyncClient) -> None:
        assert (await http.get("/")).status_code == 200
        assert (await http.get("/playground/flamingo.svg")).status_code == 200
        assert (await http.get("/v1/models")).status_code == 401
        assert [(await http.get(path)).status_code for path in ("/playground", "/playground/", "/docs/")] == [307] * 3


class TestSwitchedOff:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"playground": False})

    @pytest.mark.parametrize("path", ["/", "/playground/flamingo.svg"])
    async def test_there_is_no_page(self, http: httpx.AsyncClient, path: str) -> None:
        assert (await http.get(path)).status_code == 404
