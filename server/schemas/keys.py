"""Requests about API keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.access.quotas import MAX_LIMIT
from server.access.roles import Role
from server.access.tenants import TENANT_NAME
from server.schemas.base import Schema, with_example

# PostgreSQL has no text with a NUL
KEY_NAME = r"^[^\x00-\x1f\x7f]*$"

Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]


class LimitFields(Schema):
    """The amounts that a key may use in a minute, and support sets; what is not given is as in the key that makes it."""

    requests: Limit | None = None
    tokens: Limit | None = Field(None, description="Tokens of prompts and answers.")
    bytes: Limit | None = Field(None, description="Bytes of request bodies.")
    media: Limit | None = Field(None, description="Images and videos of prompts.")
    support_sets: Limit | None = Field(
        None, description="Not per minute: the key creates no support set if its tenant has this many."
    )


class CreateKeyRequest(Schema):
    """An API key to make."""

    model_config = with_example(name="search team", role="inference", limits={"requests": 600})

    name: str = Field(
        pattern=KEY_NAME, min_length=1, max_length=128, description="Whose key it is, for the list of keys."
    )
    role: Role = Field(
        "inference",
        description="`inference` runs the model and reads, `manage` also changes stored items, `admin` also manages keys.",
    )
    limits: LimitFields = Field(default_factory=LimitFields)
    tenant: str | None = Field(
        None,
        pattern=TENANT_NAME,
        description=(
            "The name of the keys that share support sets, uploads, evaluations and caches. Default: that of the key which "
            "makes this one. Only administrators of the default tenant make keys for others."
        ),
    )
