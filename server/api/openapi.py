"""The OpenAPI document: routes describe themselves with `describe`, and `openapi_document` collects the descriptions.

Routes read their bodies and queries themselves, so FastAPI knows only their paths and docstrings. Requests are described by
the schemas that validate them, responses by schemas against which tests validate real responses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from itertools import chain
from typing import Any

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core.core_schema import NullableSchema, TaggedUnionSchema, WithDefaultSchema
from starlette.responses import Response
from starlette.routing import BaseRoute

from server.access.pages import SAFE_METHODS
from server.api.guard import METRICS_PATH, OPEN_PATHS
from server.api.responses import JSON
from server.errors import (
    BodyTimeout,
    BodyTooLarge,
    ClientOverShare,
    ContextLengthExceeded,
    DatabaseUnavailable,
    DeadlineExceeded,
    EngineDied,
    EngineFailed,
    EngineNotReady,
    EngineStalled,
    Forbidden,
    HostRefused,
    InvalidMedia,
    InvalidRequest,
    MediaNameTaken,
    MediaNotFetched,
    MediaNotFound,
    MediaUrlRefused,
    ModelNotFound,
    NamedMediaNotFound,
    OriginRefused,
    Overloaded,
    QuotaExceeded,
    ServerError,
    ShuttingDown,
    StorageUnavailable,
    SupportSetNotFound,
    TooManyPixels,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    UnsupportedParameter,
)
from server.schemas.base import ModelRequest, Schema, or_null
from server.schemas.responses.base import Error, ResponseSchema

# the errors of a route, by the components that it uses; `describe` adds those of reading a request
ENGINE = (EngineNotReady, EngineDied, EngineStalled, EngineFailed)
MEDIA = (
    InvalidMedia,
    TooManyPixels,
    MediaNotFetched,
    MediaUrlRefused,
    MediaNotFound,
    NamedMediaNotFound,
    MediaNameTaken,
    StorageUnavailable,
    Unavailable,
)
PROMPT = (*ENGINE, *MEDIA, ContextLengthExceeded)
SUPPORT_SET_ERRORS = (SupportSetNotFound, DatabaseUnavailable)
BODY = (
    UnsupportedParameter,
    UnsupportedMediaType,
    BodyTimeout,
    BodyTooLarge,
    ClientOverShare,
    Overloaded,
    ShuttingDown,
)
# errors of any request to a route that is not open: `ClientOverShare` and `Overloaded`, if its response is large
NOT_OPEN = (Unauthorized, Forbidden, UnsupportedParameter, QuotaExceeded, ClientOverShare, Overloaded, ShuttingDown)
# errors of any request
ANY = (InvalidRequest, HostRefused, DeadlineExceeded, ServerError)

EVENTS = "text/event-stream"
SCHEMAS = "#/components/schemas/"
STRING = {"type": "string"}

DESCRIPTION = """\
Few-shot inference with vision-language models of the Flamingo family. The API follows the OpenAI API.

An unknown field or an invalid value is an error that names the field. `null` means that a field is not set."""
TAGS = {
    "Completions": "Continue a prompt, which may contain images and videos.",
    "Chat": "Answer a conversation. Earlier questions and answers become shots of a prompt.",
    "Few-shot": "Answer a query after worked examples, with generated text or one of several candidates.",
    "Support sets": "Named, versioned sets of worked examples.",
    "Evaluations": "Leave-one-out evaluations of support sets.",
    "Images": "Upload images and videos once, and refer to them by id.",
    "Model": "The served model: its tokenizer, embeddings and attention.",
    "Keys": "API keys and their permissions.",
    "Health": "The state of the server.",
}
PATH_PARAMETERS = {
    "support_set": "The id or the name of a support set.",
    "example_id": "The id of an example.",
    "evaluation_id": "The id of an evaluation.",
    "image_id": "The id of an image or a video.",
    "key_id": "The id of an API key.",
    "name": "The name of a model.",
}
REQUEST_HEADERS = {
    "Idempotency-Key": "1 to 255 ASCII characters without spaces and control characters. If a request is repeated "
    "with the same key within a day, the repetition changes nothing and returns the first response.",
    "If-None-Match": "The `ETag` of an earlier response. If it still matches, the response is a 304.",
    "X-Request-Id": "The id of the request: 1 to 128 letters, digits or characters of `_.:-`. The response and the log "
    "contain it.",
    "X-Request-Timeout": "Maximum duration in seconds, from the arrival of the request to its last token. A longer request "
    "ends with a 504.",
}
RESPONSE_HEADERS = {
    "Content-Disposition": "The suggested name of the file.",
    "ETag": "Identifies the content, which never changes.",
    "Retry-After": "Seconds to wait before repeating the request.",
    "WWW-Authenticate": "`Bearer`.",
    "X-Request-Id": "The id of the request.",
    "X-Should-Retry": "`true` if the same request may succeed later, else `false`.",
}
BEARER = {"type": "http", "scheme": "bearer", "description": "Required if the server has API keys."}


class _JsonSchemas(GenerateJsonSchema):
    """JSON schemas without titles of fields and without null as a default."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def encode_default(self, dft: Any) -> Any:
        return super().encode_default(dft.model_dump(exclude_unset=True) if isinstance(dft, BaseModel) else dft)

    def default_schema(self, schema: WithDefaultSchema) -> JsonSchemaValue:
        document = super().default_schema(schema)
        return {key: value for key, value in document.items() if key != "default" or value is not None}

    def nullable_schema(self, schema: NullableSchema) -> JsonSchemaValue:
        return or_null(self.generate_inner(schema["schema"]))

    def tagged_union_schema(self, schema: TaggedUnionSchema) -> JsonSchemaValue:
        """Return a union without a discriminator: `openapi_document` adds it for objects; other values differ by type."""
        union = super().tagged_union_schema(schema)
        return union if all("$ref" in member for member in union["oneOf"]) else {"anyOf": union["oneOf"]}


def describe(
    tag: str,
    *,
    response: Any,
    chunk: Any = None,
    body: Any = None,
    is_body_required: bool = True,
    query: type[Schema] | None = None,
    errors: Iterable[type[ServerError]] = (),
    headers: Sequence[str] = (),
    response_headers: Sequence[str] = (),
    statuses: Sequence[int] = (200,),
) -> dict[str, Any]:
    """Return the arguments of a route's decorator that describe it in the OpenAPI document.

    `body` and `response` are the types of their JSON, or types by media type. The events of a stream have the type `chunk`.
    All `statuses` have the same response, but a 304 has no content. `errors` are those that reading the request does not
    raise.
    """
    content = _content(response)
    if chunk is not None:
        content[EVENTS] = {"schema": {"anyOf": [_schema(chunk), _schema(Error)]}}
    success = {"headers": _header_references(response_headers)}
    operation: dict[str, Any] = {"parameters": [*_query_parameters(query), *map(_header_parameter, headers)]}
    if body is not None:
        operation["requestBody"] = {"required": is_body_required, "content": _content(body)}
    return {
        "tags": [tag],
        "response_class": Response,
        "status_code": statuses[0],
        "responses": {
            **{
                status: {**success, "description": _description(status, chunk)}
                | ({} if status == HTTPStatus.NOT_MODIFIED else {"content": content})
                for status in statuses
            },
            **_error_responses([*_reading_errors(body), *errors, *ANY]),
        },
        "openapi_extra": operation,
    }


def operation_id(route: APIRoute) -> str:
    return route.name


def openapi_document(routes: Sequence[BaseRoute], title: str, version: str) -> dict[str, Any]:
    """Return the document of all described routes."""
    tags = [{"name": name, "description": text} for name, text in TAGS.items()]
    document = get_openapi(title=title, version=version, description=DESCRIPTION, routes=routes, tags=tags)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            is_open, is_safe = path in OPEN_PATHS - {METRICS_PATH}, method.upper() in SAFE_METHODS
            _complete(operation, is_open=is_open, errors=NOT_OPEN if is_safe else (*NOT_OPEN, OriginRefused))
    schemas = _schemas(node["$ref"] for node in _objects(document["paths"]) if "$ref" in node)
    for node in _objects(schemas):
        if "oneOf" in node:
            node["discriminator"] = _discriminator(node["oneOf"], schemas)
    document["security"] = [{"bearer": []}]
    document["components"] = {
        "securitySchemes": {"bearer": BEARER},
        "headers": {name: {"description": text, "schema": STRING} for name, text in RESPONSE_HEADERS.items()},
        "schemas": schemas,
    }
    return document


def _complete(operation: dict[str, Any], *, is_open: bool, errors: Sequence[type[ServerError]]) -> None:
    """Add what every operation has: the request id, the key, and `errors` unless it is open.

    The docstring's first line becomes the summary.
    """
    summary, _, details = operation.pop("description").partition("\n\n")
    operation["summary"] = summary.removesuffix(".")
    if details:
        operation["description"] = details
    for parameter in operation["parameters"]:
        if parameter["in"] == "path":
            parameter |= {"description": PATH_PARAMETERS[parameter["name"]], "schema": STRING}
    operation["parameters"] += map(_header_parameter, ("X-Request-Id", "X-Request-Timeout"))
    if is_open:
        operation["security"] = []
    if "HTTPValidationError" in str(operation["responses"].get("422")):
        del operation["responses"]["422"]  # FastAPI adds it for path parameters, but all their values are valid
    if not is_open:
        for status, response in _error_responses(errors).items():
            same = operation["responses"].setdefault(str(status), response)
            if codes := _codes([error for error in errors if error.code not in same["description"]], status):
                same["description"] = f"{same['description'].removesuffix('.')}, {codes}."
    operation["responses"] = dict(sorted(operation["responses"].items()))
    for response in operation["responses"].values():
        response["headers"] = {**response.get("headers", {}), **_header_references(["X-Request-Id"])}


def _discriminator(members: Sequence[JsonSchemaValue], schemas: Mapping[str, JsonSchemaValue]) -> dict[str, Any]:
    """Return the field whose constants distinguish the objects of a union, and the schema of each constant."""
    references = [member["$ref"] for member in members]
    fields = [schemas[reference.removeprefix(SCHEMAS)]["properties"] for reference in references]
    for name in fields[0]:
        constants = [_constants(each.get(name, {})) for each in fields]
        if all(constants) and sum(map(len, constants)) == len(set(chain(*constants))):
            pairs = zip(references, constants, strict=True)
            return {"propertyName": name, "mapping": {value: ref for ref, values in pairs for value in values}}
    raise ValueError(f"no field distinguishes {', '.join(references)}")


def _constants(field: JsonSchemaValue) -> list[str]:
    return field.get("enum", [field["const"]] if "const" in field else [])


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a JSON document, outer ones first."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _objects(child)


def _content(content: Any) -> dict[str, Any]:
    by_media_type = content if isinstance(content, Mapping) else {JSON: content}
    return {media_type: {"schema": _schema(kind)} for media_type, kind in by_media_type.items()}


def _schema(kind: type) -> JsonSchemaValue:
    """Return a reference to a schema, or the schema of bytes or text."""
    if issubclass(kind, BaseModel):
        return {"$ref": SCHEMAS + kind.__name__}
    return {**STRING, "format": "binary"} if kind is bytes else STRING


def _schemas(references: Iterable[str]) -> dict[str, JsonSchemaValue]:
    """Return the referenced schemas, including those that they reference."""
    classes = {kind.__name__: kind for kind in (*_subclasses(Schema), *_subclasses(ResponseSchema))}
    names = {reference.removeprefix(SCHEMAS) for reference in references} & classes.keys()
    _, document = models_json_schema(
        [(classes[name], "validation") for name in sorted(names)],
        ref_template=SCHEMAS + "{model}",
        schema_generator=_JsonSchemas,
    )
    return document["$defs"]


def _subclasses(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _description(status: int, chunk: Any) -> str:
    stream = " With `stream`, each server-sent event is a chunk or an error, and the last one is `[DONE]`."
    return f"{HTTPStatus(status).phrase}.{'' if chunk is None else stream}"


def _reading_errors(body: Any) -> Iterator[type[ServerError]]:
    """Yield the errors of `read_request`."""
    if body is not None:
        yield from BODY
    if isinstance(body, type) and issubclass(body, ModelRequest):
        yield ModelNotFound


def _error_responses(errors: Iterable[type[ServerError]]) -> dict[int, dict[str, Any]]:
    """Return a response per status, with the codes of its errors."""
    by_status: dict[int, list[type[ServerError]]] = {}
    for error in dict.fromkeys(errors):
        by_status.setdefault(error.status, []).append(error)
    return {status: _error_response(status, kinds) for status, kinds in sorted(by_status.items())}


def _error_response(status: int, errors: Sequence[type[ServerError]]) -> dict[str, Any]:
    retry = ["Retry-After"] if any(issubclass(error, Unavailable) for error in errors) else []
    key = ["WWW-Authenticate"] if Unauthorized in errors else []
    return {
        "description": f"{HTTPStatus(status).phrase}: {_codes(errors, status)}.",
        "headers": _header_references(["X-Should-Retry", *retry, *key]),
        "content": _content(Error),
    }


def _codes(errors: Iterable[type[ServerError]], status: int) -> str:
    return ", ".join(f"`{error.code}`" for error in errors if error.status == status)


def _query_parameters(query: type[Schema] | None) -> Iterator[dict[str, Any]]:
    if query is None:
        return
    document = query.model_json_schema(schema_generator=_JsonSchemas)
    for name, field in document["properties"].items():
        schema = _not_null(field)
        about = {"description": schema.pop("description")} if "description" in schema else {}
        is_required = name in document.get("required", ())
        yield {"name": name, "in": "query", "required": is_required, "schema": schema, **about}


def _not_null(field: JsonSchemaValue) -> JsonSchemaValue:
    """Return the schema of a field without null, which a query cannot hold, and without a default that is empty."""
    schema = {key: value for key, value in field.items() if key != "default" or value}
    if isinstance(schema["type"], list):
        schema["type"] = schema["type"][0]
    if "enum" in schema:
        schema["enum"] = [value for value in schema["enum"] if value is not None]
    return schema


def _header_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": REQUEST_HEADERS[name], "schema": STRING}


def _header_references(names: Iterable[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
