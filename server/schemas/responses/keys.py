"""Responses about API keys."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.access.roles import Role
from server.schemas.responses.base import ListSchema, ResponseSchema


class KeyLimits(ResponseSchema):
    """The amounts that a key may use in a minute, and the support sets of its tenant; null where it has no limit."""

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
    created_at: float = Field(description="In Unix seconds.")


class NewKey(Key):
    """An API key with its secret, which is shown once."""

    key: str = Field(description="The secret, sent as `Authorization: Bearer KEY`.")


class Keys(ListSchema):
    data: list[Key]
