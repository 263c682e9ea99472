"""The base of every request schema: unknown fields are refused by name, `null` means "not given", nothing is converted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.errors import InvalidRequest, UnsupportedParameter

SchemaType = TypeVar("SchemaType", bound="Schema")

RequestId = Annotated[str, Field(pattern=r"^[\w.:-]{1,128}$")]
User = Annotated[str, Field(max_length=256)]


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class ModelRequest(Schema):
    """A request that may name the model."""

    model: str | None = None


class TrackedRequest(ModelRequest):
    """A request whose answer carries an id, which the client may choose."""

    request_id: RequestId | None = None
    user: User | None = None


class PrioritizedRequest(TrackedRequest):
    """A request that waits in the engine's queue; a lower priority runs first."""

    priority: int = Field(0, ge=-(2**31), le=2**31 - 1)


class ListRequest(Schema):
    """The query of a route that lists: up to `limit` entries after the entry `after`."""

    limit: Annotated[int, Field(ge=1, le=1000, strict=False)] = 20
    after: Annotated[str, Field(max_length=128)] = ""


def list_page(entries: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Return the answer of a route that lists; `entries` holds one more than `limit` where more follow."""
    data = entries[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(entries) > len(data),
    }


def tag_of(field: str) -> Callable[[Any], str]:
    """Return a discriminator by `field`. Tags stand in angle brackets, which tells them from a client's own names."""

    def tag(value: Any) -> str:
        name = value.get(field) if isinstance(value, dict) else getattr(value, field, type(value).__name__)
        return f"<{name}>"

    return tag


def read(schema: type[SchemaType], body: bytes) -> SchemaType:
    """Validate a JSON body. Raises `InvalidRequest` that names the field at fault, unknown fields first."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        problem = next((p for p in problems if p["type"] in UNSUPPORTED), problems[0])
    raise _refusal(problem["type"], _param(problem["loc"]), problem["msg"], problem.get("ctx", {}))


class QueryString(Protocol):
    """A parsed query string, as starlette's `QueryParams`: schemas are used where no HTTP library is loaded."""

    def multi_items(self) -> list[tuple[str, str]]: ...


def read_query(schema: type[SchemaType], query: QueryString) -> SchemaType:
    """Read a query string as `read` reads a body; a repeated name is refused."""
    items = query.multi_items()
    counts = Counter(name for name, _ in items)
    if repeated := next((name for name, count in counts.items() if count > 1), None):
        raise InvalidRequest(f"{repeated[:64]}: given more than once", param=repeated[:64])
    return read(schema, json.dumps(dict(items)).encode())


# pydantic's names for an unknown field and an unknown type of part
UNSUPPORTED = {"extra_forbidden", "union_tag_invalid"}


def _refusal(kind: str, param: str | None, message: str, context: dict[str, Any]) -> InvalidRequest:
    if kind == "extra_forbidden":
        return UnsupportedParameter(f"unknown parameter {param}", param=param)
    if kind == "union_tag_invalid":
        tag, known = (context[name].replace("<", "").replace(">", "") for name in ("tag", "expected_tags"))
        return UnsupportedParameter(f"{param}: no support for {tag[:64]}, only {known}", param=param)
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}")
    return InvalidRequest(f"{param or 'the body'}: {message}", param=param)


def _param(location: tuple[int | str, ...]) -> str | None:
    """Return the path of a location: ("prompt", "<parts>", 2, "<image_url>", "image_url") is `prompt[2].image_url`."""
    text = ""
    for step in location:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not step.startswith("<"):
            text += f".{step}" if text else step
    return text or None
