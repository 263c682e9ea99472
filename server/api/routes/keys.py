"""Routes of `/v1/keys`: administrators make, list and revoke API keys."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.access.callers import Caller
from server.access.keys import Key, manages
from server.access.quotas import Limits
from server.api.body import JSONResponse, read_request
from server.api.openapi import describe
from server.api.services import GivenServices
from server.errors import DatabaseUnavailable, Forbidden, KeyNotFound, LastKey
from server.schemas.keys import CreateKeyRequest
from server.schemas.responses import keys as responses
from server.schemas.responses.base import Deleted

router = APIRouter()

FIRST_KEY = "this server has no key yet: make the first one with `flamboyance keys create`, or set api_key"


@router.post(
    "/v1/keys",
    **describe("Keys", body=CreateKeyRequest, response=responses.NewKey, errors=(DatabaseUnavailable, Forbidden)),
)
async def create_key(request: Request, services: GivenServices) -> Response:
    """Make an API key. Its secret is in this response alone."""
    administrator = _tenant(request)
    fields = await read_request(CreateKeyRequest, request, services)
    tenant = administrator if fields.tenant is None else fields.tenant
    if not manages(administrator, tenant):
        raise Forbidden(f"keys of the tenant {tenant} are made by its own administrators", param="tenant")
    limits = Limits(**fields.limits.model_dump())
    key, secret = await services.keys.create(fields.name, fields.role, limits, tenant=tenant)
    return JSONResponse({**_card(key), "key": secret})


@router.get("/v1/keys", **describe("Keys", response=responses.Keys, errors=(DatabaseUnavailable, Forbidden)))
async def list_keys(request: Request, services: GivenServices) -> Response:
    """List the API keys, without their secrets: those of the own tenant or, in the default tenant, of all."""
    keys = await services.keys.all(_tenant(request))
    return JSONResponse({"object": "list", "data": [_card(key) for key in keys]})


@router.delete(
    "/v1/keys/{key_id}",
    **describe("Keys", response=Deleted, errors=(DatabaseUnavailable, Forbidden, KeyNotFound, LastKey)),
)
async def revoke_key(key_id: str, request: Request, services: GivenServices) -> Response:
    """Revoke an API key: at once for this server, within seconds for others of the same database.

    The last key is kept, unless the setting `api_key` is set: a server without keys is open.
    """
    may_be_last = services.settings.api_key is not None
    key = await services.keys.revoke(key_id, may_be_last=may_be_last, tenant=_tenant(request))
    return JSONResponse({"id": key.id, "object": "api_key", "deleted": True})


def _tenant(request: Request) -> str:
    """Return the tenant of an administrator. A stranger does not take over an open server: raises `Forbidden`."""
    caller: Caller = request.state.caller
    if caller.is_anonymous:
        raise Forbidden(FIRST_KEY)
    return caller.tenant


def _card(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "role": key.role,
        "tenant": key.tenant or None,
        "limits": msgspec.structs.asdict(key.limits),
        "created_at": key.created_at,
    }
