"""Requests about API keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.access.quotas import MAX_LIMIT
from server.access.roles import Role
from server.access.tenants import TENANT_NAME
from server.schemas.base import KEY_NAME, Schema, with_example

Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]


class LimitFields(Schema):
    """Limits per minute, and a limit of support sets. The limits of the key that creates a key are default and maximum."""

    requests: Limit | None = Field(None, description="Number of requests.")
    tokens: Limit | None = Field(None, description="Number of tokens of prompts, scored candidates and answers.")
    bytes: Limit | None = Field(None, description="Number of bytes of request bodies.")
    media: Limit | None = Field(None, description="Number of images and videos of prompts.")
    support_sets: Limit | None = Field(
        None,
        description="Not per minute: while the tenant has this number of support sets, the key cannot create another.",
    )


class CreateKeyRequest(Schema):
    """An API key to create."""

    model_config = with_example(name="search team", role="inference", limits={"requests": 600})

    name: str = Field(
        pattern=KEY_NAME, min_length=1, max_length=128, description="A name for the list of keys, such as the owner's."
    )
    role: Role = Field(
        "inference",
        description="`inference` runs the model and reads stored data. `manage` also changes stored data. `admin` also "
        "manages keys.",
    )
    limits: LimitFields = Field(default_factory=LimitFields)
    tenant: str | None = Field(
        None,
        pattern=TENANT_NAME,
        description=(
            "The keys of a tenant share support sets, uploads, evaluations and caches. Default: the tenant of the key that "
            "creates this one. Only administrators of the default tenant can create keys of other tenants."
        ),
    )
