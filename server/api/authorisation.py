"""A dependency of all routes: the caller's role must permit the route."""

from __future__ import annotations

from starlette.requests import Request

from server.access.callers import Caller
from server.access.roles import OPERATOR_PATHS, may, needed_role
from server.errors import Forbidden


async def authorise(request: Request) -> None:
    """Refuse a request that the caller's role does not permit. Raises `Forbidden`."""
    caller: Caller = request.state.caller
    path: str = request.scope["route"].path
    needed = needed_role(request.method, path)
    if not may(caller.role, needed):
        raise Forbidden(f"{request.method} {path} needs a key with the role {needed}, this one has {caller.role}")
    if caller.tenant and path in OPERATOR_PATHS:
        raise Forbidden(f"{path} is about all tenants: it needs a key of the default tenant")
