"""The OpenAPI document: valid, complete, and true of the server, whose real responses `documented.check` checks."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from openapi_spec_validator import validate

from server.api.guard import METRICS_PATH, OPEN_PATHS
from server.api.openapi import TAGS
from server.app import ROUTERS
from server.openapi import document
from server.version import VERSION
from tests.server.documented import check, operation_steps

pytestmark = pytest.mark.anyio


def operations() -> dict[tuple[str, str], dict[str, Any]]:
    """Return every operation of the document by its method and path."""
    paths = document()["paths"].items()
    return {(method, path): operation for path, by_method in paths for method, operation in by_method.items()}


def objects(node: Any) -> list[dict[str, Any]]:
    children = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    return [*([node] if isinstance(node, dict) else []), *(item for child in children for item in objects(child))]


def test_the_document_is_valid() -> None:
    validate(document())
    assert document()["openapi"].startswith("3.1")


def test_it_has_every_route_and_nothing_else() -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    described = {
        (method.lower(), route.path.replace(":path", ""))
        for route in routes
        if route.include_in_schema
        for method in route.methods or ()
    }
    assert operations().keys() == described
    hidden = {route.path for route in routes if not route.include_in_schema}
    assert hidden == {"/docs", "/docs/", "/docs/{asset}", "/", "/playground", "/playground/{file:path}"}


def test_every_operation_is_described() -> None:
    for key, operation in operations().items():
        assert operation["summary"][0].isupper(), key
        assert "\n" not in operation["summary"], key
        assert operation["tags"][0] in TAGS, key
        assert all(parameter.get("description") for parameter in operation["parameters"])
    ids = [operation["operationId"] for operation in operations().values()]
    assert len(ids) == len(set(ids))
    assert {operation["tags"][0] for operation in operations().values()} == TAGS.keys()


def test_requests_with_unknown_fields_do_not_conform() -> None:
    for name, schema in document()["components"]["schemas"].items():
        # a message of a response may be sent back, with null for what it does not have
        allowed = {"type": "null"} if name == "AssistantMessage" else False
        assert schema["additionalProperties"] == allowed, name


def test_unions_of_objects_have_a_discriminator_and_no_internal_tag() -> None:
    unions = [node for node in objects(document()) if "oneOf" in node]
    assert {union["discriminator"]["propertyName"] for union in unions} == {"type", "role", "status"}
    for union in unions:
        members = {member["$ref"] for member in union["oneOf"]}
        assert set(union["discriminator"]["mapping"].values()) == members
        assert len(members) == len(union["oneOf"])
    assert "<" not in str(document()["components"])


def test_only_open_paths_need_no_key() -> None:
    assert document()["security"] == [{"bearer": []}]
    for (_, path), operation in operations().items():
        is_open = path in OPEN_PATHS - {METRICS_PATH}  # a setting closes /metrics
        assert ("security" in operation) == is_open
        assert ("401" in operation["responses"]) == (not is_open)


def test_only_requests_that_change_something_are_refused_to_pages_of_other_sites() -> None:
    for (method, path), operation in operations().items():
        is_documented = "`origin_not_allowed`" in str(operation["responses"].get("403"))
        assert is_documented == (method in ("post", "patch", "delete")), path


def test_streams_are_of_chunks() -> None:
    streamed = {
        path: content["text/event-stream"]["schema"]["anyOf"][0]["$ref"].rpartition("/")[2]
        for (_, path), operation in operations().items()
        if "text/event-stream" in (content := operation["responses"].get("200", {}).get("content", {}))
    }
    assert streamed == {
        "/v1/completions": "CompletionChunk",
        "/v1/chat/completions": "ChatCompletionChunk",
        "/v1/fewshot/completions": "FewShotCompletionChunk",
    }


def test_a_response_that_only_says_not_modified_has_no_content() -> None:
    responses = operations()["get", "/v1/images/{image_id}/content"]["responses"]
    assert responses["304"].keys() == {"description", "headers"}
    assert responses["200"]["content"].keys() == {"image/*", "video/*"}


async def test_the_server_gives_the_document_to_anybody(http: httpx.AsyncClient) -> None:
    response = await http.get("/openapi.json")
    assert response.json() == document()
    assert response.json()["info"]["version"] == VERSION


async def test_the_document_is_written_once(http: httpx.AsyncClient, app: FastAPI) -> None:
    first = await http.get("/openapi.json")
    app.openapi()["info"]["title"] = "written again"
    assert (await http.get("/openapi.json")).content == first.content


async def test_examples_of_requests_are_accepted(http: httpx.AsyncClient, app: FastAPI) -> None:
    _, secret = await app.state.services.keys.create("test", "admin")
    http.headers["Authorization"] = f"Bearer {secret}"
    schemas = document()["components"]["schemas"]
    num_examples = 0
    for (method, path), operation in operations().items():
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {"schema": {"$ref": ""}})
        for example in schemas.get(content["schema"]["$ref"].rpartition("/")[2], {}).get("examples", ()):
            response = await http.request(method, path.replace("{support_set}", "sums"), json=example)
            assert response.status_code == 200, response.text
            num_examples += 1
    assert num_examples >= 8


class TestCheck:
    """The check that stands over all tests of routes sees what it should."""

    async def response(self, http: httpx.AsyncClient, **changes: Any) -> httpx.Response:
        response = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        body = {**response.json(), **changes}
        return httpx.Response(response.status_code, headers={"X-Request-Id": "a"}, json=body, request=response.request)

    async def test_it_passes_what_is_documented(self, http: httpx.AsyncClient) -> None:
        check(await self.response(http))

    @pytest.mark.parametrize(
        "change", [{"new_field": 1}, {"created": "now"}, {"choices": [{"index": 0}]}, {"id": None}]
    )
    async def test_it_refuses_a_response_that_differs(self, http: httpx.AsyncClient, change: dict[str, Any]) -> None:
        response = await self.response(http, **change)
        with pytest.raises(AssertionError, match=next(iter(change))):
            check(response)

    async def test_it_refuses_a_status_that_is_not_documented(self, http: httpx.AsyncClient) -> None:
        response = await self.response(http)
        response.status_code = 418
        with pytest.raises(AssertionError, match="418 is not documented"):
            check(response)

    async def test_it_refuses_an_error_that_is_not_documented(self, http: httpx.AsyncClient) -> None:
        request = (await self.response(http)).request
        error = {"message": "", "type": "invalid_request_error", "param": None, "code": "new_code"}
        headers = {"X-Request-Id": "a", "X-Should-Retry": "false"}
        response = httpx.Response(400, headers=headers, json={"error": error}, request=request)
        with pytest.raises(AssertionError, match="new_code"):
            check(response)

    async def test_it_refuses_a_stream_without_an_end(self, http: httpx.AsyncClient) -> None:
        whole = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True})
        headers = {"X-Request-Id": "a", "content-type": "text/event-stream"}
        text = whole.text.replace("data: [DONE]", "")
        with pytest.raises(AssertionError):
            check(httpx.Response(200, headers=headers, text=text, request=whole.request))

    def test_it_refuses_a_route_that_is_not_documented(self) -> None:
        request = httpx.Request("GET", "http://localhost/v1/secret")
        assert operation_steps(request) is None
        with pytest.raises(AssertionError, match="not in the document"):
            check(httpx.Response(200, request=request))


class TestPage:
    async def test_it_loads_files_of_this_server_alone(self, http: httpx.AsyncClient) -> None:
        page = await http.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "<script>" not in page.text
        assert "://" not in page.text
        for path in ("/docs/docs.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"):
            assert path.removeprefix("/") in page.text
            asset = await http.get(path)
            assert asset.status_code == 200, path
            assert asset.headers["x-content-type-options"] == "nosniff"

    async def test_it_has_no_other_files(self, http: httpx.AsyncClient) -> None:
        for name in ("docs.html", "..%2Fopenapi.py", "redoc.standalone.js"):
            response = await http.get(f"/docs/{name}")
            assert response.status_code == 404, name
