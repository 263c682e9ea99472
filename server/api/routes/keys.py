"""Routes of `/v1/keys`: administrators make, list and revoke API keys."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.access.callers import Caller
from server.access.keys import card, log_change, manages
from server.access.quotas import Limits
from server.api.body import read_request
from server.api.openapi import describe
from server.api.responses import JSONResponse
from server.api.services import GivenServices
from server.errors import DatabaseUnavailable, Forbidden, KeyNotFound, LastKey
from server.schemas.keys import CreateKeyRequest, LimitFields
from server.schemas.responses import keys as responses
from server.schemas.responses.base import Deleted

router = APIRouter()

FIRST_KEY = (
    "this server has no key yet: create the first one with `flamboyance keys create NAME --role admin`, or set api_key"
)


@router.post(
    "/v1/keys",
    **describe("Keys", body=CreateKeyRequest, response=responses.NewKey, errors=(DatabaseUnavailable, Forbidden)),
)
async def create_key(request: Request, services: GivenServices) -> Response:
    """Create an API key.

    Its limits cannot exceed those of the key that creates it. Only this response contains its secret.
    """
    administrator = _administrator(request)
    fields = await read_request(CreateKeyRequest, request, services)
    tenant = administrator.tenant if fields.tenant is None else fields.tenant
    if not manages(administrator.tenant, tenant):
        raise Forbidden(f"keys of the tenant {tenant} are created by its own administrators", param="tenant")
    limits = _limits(fields.limits, administrator.limits)
    key, secret = await services.keys.create(fields.name, fields.role, limits, tenant=tenant)
    log_change("made", key, administrator.key)
    return JSONResponse({**card(key), "key": secret})


@router.get("/v1/keys", **describe("Keys", response=responses.Keys, errors=(DatabaseUnavailable, Forbidden)))
async def list_keys(request: Request, services: GivenServices) -> Response:
    """List API keys without their secrets.

    Administrators of the default tenant get the keys of all tenants, others those of their own tenant.
    """
    keys = await services.keys.all(_administrator(request).tenant)
    return JSONResponse({"object": "list", "data": [card(key) for key in keys]})


@router.delete(
    "/v1/keys/{key_id}",
    **describe("Keys", response=Deleted, errors=(DatabaseUnavailable, Forbidden, KeyNotFound, LastKey)),
)
async def revoke_key(key_id: str, request: Request, services: GivenServices) -> Response:
    """Revoke an API key.

    It is invalid at once on this server, and within seconds on others with the same database. The last key can be revoked
    only if the setting `api_key` is set, because a server without keys accepts every request.
    """
    administrator, may_be_last = _administrator(request), services.settings.api_key is not None
    key = await services.keys.revoke(key_id, may_be_last=may_be_last, tenant=administrator.tenant)
    log_change("revoked", key, administrator.key)
    return JSONResponse({"id": key.id, "object": "api_key", "deleted": True})


def _administrator(request: Request) -> Caller:
    """Return the caller. Raises `Forbidden` for an anonymous caller, who could otherwise take over an open server."""
    caller: Caller = request.state.caller
    if caller.is_anonymous:
        raise Forbidden(FIRST_KEY)
    return caller


def _limits(fields: LimitFields, most: Limits) -> Limits:
    """Return the limits of a new key; by default those of the key that creates it. Raises `Forbidden` for higher ones."""
    limits = msgspec.structs.asdict(most)
    for name, limit in fields.model_dump(exclude_none=True).items():
        if limits[name] is not None and limit > limits[name]:
            message = f"limits.{name}: exceeds the limit {limits[name]} of the key that creates it"
            raise Forbidden(message, param=f"limits.{name}")
        limits[name] = limit
    return Limits(**limits)
