"""GET /: the playground, a web page for trying the server; it is built from `clients/playground` and calls this API.

The page works offline: its files come from this server, and its policy allows no other host and no inline script.
"""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from server.api.responses import file_response
from server.api.routes.docs import STATIC, page_headers
from server.api.services import GivenServices
from server.errors import NotFound

PAGE = STATIC / "playground"
PREFIX = "/playground/"
FILES = {path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.is_file()}
HEADERS = page_headers("img-src 'self' blob:; media-src 'self' blob:")
# the names of these files contain a hash of their content
HASHED = "assets/"
FOREVER = {"Cache-Control": "public, max-age=31536000, immutable"}
ASK_AGAIN = {"Cache-Control": "no-cache"}


def _refuse_if_off(services: GivenServices) -> None:
    if not services.settings.playground:
        raise NotFound("the playground of this server is switched off")


router = APIRouter(include_in_schema=False, dependencies=[Depends(_refuse_if_off)])


@router.get("/")
async def show_playground(request: Request) -> Response:
    return await file_response(FILES["index.html"], request, HEADERS | ASK_AGAIN)


@router.get("/playground")
async def go_to_playground() -> Response:
    return RedirectResponse("./")


@router.get(PREFIX + "{file:path}")
async def show_file(file: str, request: Request) -> Response:
    if not file:
        return RedirectResponse("../")
    if file not in FILES:
        raise NotFound(f"{PREFIX} has no file {file[:64]!r}")
    return await file_response(FILES[file], request, HEADERS | (FOREVER if file.startswith(HASHED) else ASK_AGAIN))
