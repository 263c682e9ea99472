"""GET /docs: the OpenAPI document as a page, by Swagger UI.

The page works offline: its files come from this server, and its policy allows no other host and no inline script.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from server.api.responses import file_response
from server.errors import NotFound

STATIC = Path(__file__).resolve().parents[1] / "static"
SWAGGER_UI = Path(str(files("fastapi_offline"))) / "static"
ASSETS = {
    "docs.js": STATIC / "docs.js",
    "swagger-ui-bundle.js": SWAGGER_UI / "swagger-ui-bundle.js",
    "swagger-ui.css": SWAGGER_UI / "swagger-ui.css",
}


def page_headers(media: str) -> dict[str, str]:
    """Return the headers of a page and of its files; `media` has the directives for its images and videos."""
    return {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src 'self'; style-src 'self'; {media}; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


HEADERS = page_headers("img-src 'self' data:")

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def show_docs(request: Request) -> Response:
    return await file_response(STATIC / "docs.html", request, HEADERS)


@router.get("/docs/")
async def go_to_docs() -> Response:
    return RedirectResponse("../docs")


@router.get("/docs/{asset}")
async def show_asset(asset: str, request: Request) -> Response:
    if asset not in ASSETS:
        raise NotFound(f"/docs has no file {asset[:64]!r}")
    return await file_response(ASSETS[asset], request, HEADERS)
