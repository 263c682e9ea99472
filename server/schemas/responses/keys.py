"""Responses about API keys."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.access.roles import Role
from server.schemas.responses.base import ListSchema, ResponseSchema


class KeyLimits(ResponseSchema):
    """Limits per minute, and the limit of support sets of the tenant. Null means no limit."""

    requests: int | None
    tokens: int | None
    bytes: int | None
    media: int | None
    support_sets: int | None


class Key(ResponseSchema):
    """An API key without its secret."""

    id: str
    object: Literal["api_key"]
    name: str
    role: Role
    tenant: str | None = Field(description="Null for the default tenant.")
    limits: KeyLimits
    created_at: float = Field(description="Unix time in seconds.")


class NewKey(Key):
    """An API key with its secret, which no other response contains."""

    key: str = Field(description="The secret, sent as `Authorization: Bearer KEY`.")


class Keys(ListSchema):
    data: list[Key]
