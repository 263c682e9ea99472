"""The base of every request schema: unknown fields are refused by name, `null` means "not given", nothing is converted."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

from jiter import from_json
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from server.access.tenants import TENANT_NAME
from server.errors import InvalidRequest, UnsupportedParameter
from server.limits.deadline import MAX_SECONDS
from server.schemas.lists import stop_at_first_error
from server.schemas.parsing import MAX_NAME, not_json
from server.schemas.sentences import in_words
from server.schemas.separators import MAX_SEPARATORS, check_separators
from server.spelling import advice


class FieldError(ValueError):
    """A field that cannot be combined with the others of its schema; `param` is its path."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


# names that other servers and libraries use, and the fields that were probably meant
MEANT = {
    "classes": "candidates",
    "labels": "candidates",
    "functions": "tools",
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    **dict.fromkeys(("guided_json", "guided_choice", "guided_regex", "guided_grammar"), "structured_outputs"),
}

# what to do without fields of other servers that have no counterpart
INSTEAD = {
    "dimensions": "the model determines the number of dimensions",
    "grammar": "describe the answer with json, regex or choice",
    "images": "an image is a part of type image_url",
}


class UnknownField(ValueError):
    """A field that a schema does not have; `known` are those that it has, and `inner` the paths in its objects by name."""

    def __init__(self, name: str, known: Collection[str], inner: Mapping[str, str]) -> None:
        super().__init__(name[:MAX_NAME])
        self.name = name[:MAX_NAME]
        self._known, self._inner = known, inner

    def advice(self) -> str:
        """Return the field that was probably meant, for a message; empty if none has this name or a similar one.

        It takes a fraction of a millisecond, and a body may have 65,536 unknown fields, of which one is reported.
        """
        meant = MEANT.get(self.name, self.name)
        if path := meant if meant in self._known else self._inner.get(meant):
            return f"; did you mean {path}?"
        instead = f"; {INSTEAD[self.name]}" if self.name in INSTEAD else ""
        return advice(self.name, self._known) or instead


# whether an unknown field of the body that is being validated has been reported
_is_reported: ContextVar[bool] = ContextVar("_is_reported", default=False)
SchemaType = TypeVar("SchemaType", bound="Schema")

ID = r"^[A-Za-z0-9_.:-]{1,128}$"
EXAMPLE_ID = r"^\.{0,127}[A-Za-z0-9_:-][A-Za-z0-9_.:-]{0,127}$"
SET_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}$"
SHA_256 = r"^[0-9a-f]{64}$"
# without characters that a terminal obeys, and those that are invisible or change the direction of a text
KEY_NAME = r"^[^\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]*$"
# what a text of each pattern is, for messages
IN_WORDS = {
    ID: "1 to 128 ASCII letters, digits and the characters _.:-",
    EXAMPLE_ID: "1 to 128 ASCII letters, digits and the characters _.:-, and not of full stops alone",
    SET_NAME: "at most 128 ASCII letters, digits and the characters _.:-, beginning with a letter or digit",
    SHA_256: "64 hexadecimal digits in lower case",
    KEY_NAME: "a text without control characters, such as line breaks, and without invisible ones",
    TENANT_NAME: "at most 48 lower-case letters, digits and the characters _-, beginning with a letter or digit",
}

RequestId = Annotated[str, Field(pattern=ID)]
User = Annotated[str, Field(max_length=256)]
CacheSalt = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        description="The request shares caches of prompts, media and grammars only with requests that have the same salt.",
    ),
]


def _in_digits(value: object) -> object:
    """Return the value of a query parameter. Raises `ValueError` for what only Python reads as an integer, such as 1_0."""
    if isinstance(value, str) and not re.fullmatch(r"-?[0-9]+", value):
        raise ValueError("must be an integer")
    return value


QueryInteger = Annotated[int, BeforeValidator(_in_digits), Field(strict=False)]

LIMIT = "Maximum number of entries in the page."
AFTER = "The `last_id` of the previous page."

NULL = {"type": "null"}
# the name of an error of a schema's own, for what is not supported
NO_SUPPORT = "no_support"
# the tag of an object without the field that tells the members of a union apart; no value of the field has it
NO_TAG = "<"


def with_example(**fields: Any) -> ConfigDict:
    """Return the configuration of a schema whose documentation has an example."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    has_null: ClassVar[bool] = False
    # of fields in a body, with which it is validated in a fraction of a second
    max_names: ClassVar[int] = 2**14
    # an object of this schema, for a message, if its fields alone do not explain it
    such_as: ClassVar[str] = ""

    @classmethod
    @cache
    def names(cls) -> frozenset[str]:
        """Return the names that the fields have in a request."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    @cache
    def inner_paths(cls) -> Mapping[str, str]:
        """Return the paths of the fields of objects in a request, such as `examples.k`, by the names of these fields."""
        paths: dict[str, str] = {}
        for name, field in cls.model_fields.items():
            for schema in _schemas_of(field.annotation):
                paths |= {inner: f"{field.alias or name}.{inner}" for inner in schema.names() if inner not in paths}
        return paths

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, values: Any) -> Any:
        """Leave out fields that are null, which means "not given" unless `has_null`; report the first unknown field.

        Pydantic refuses the others by itself, in less time: a body may have 65,536.
        """
        if not isinstance(values, dict):
            return values
        fields = values if cls.has_null else {k: v for k, v in values.items() if v is not None}
        known = cls.names()
        if not fields.keys() <= known and not _is_reported.get():
            _is_reported.set(True)
            raise UnknownField(next(name for name in fields if name not in known), known, cls.inner_paths())
        return fields

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return stop_at_first_error(handler(source))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Document null as a value of every optional field."""
        reference = handler(schema)
        document = handler.resolve_ref_schema(reference)
        fields = document.get("properties", {})
        for name in fields.keys() - document.get("required", ()):
            fields[name] = or_null(fields[name])
        return reference


def _schemas_of(annotation: Any) -> list[type[Schema]]:
    """Return the schemas of an annotation that is one, or a union with some."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType, Annotated) else (annotation,)
    if members != (annotation,):
        return [schema for member in members for schema in _schemas_of(member)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Schema) else []


def or_null(field: JsonSchemaValue) -> JsonSchemaValue:
    """Return the JSON schema of a field that may also be null."""
    about = {key: value for key, value in field.items() if key in {"default", "description"}}
    value = {key: value for key, value in field.items() if key not in about}
    choices = value.get("anyOf", [value])
    if NULL in choices or "null" in value.get("type", ()):
        return field
    if "type" not in value or "const" in value:
        return {"anyOf": [*choices, NULL], **about}
    enum = {"enum": [*value["enum"], None]} if "enum" in value else {}
    return {**value, "type": [value["type"], "null"], **enum, **about}


class ModelRequest(Schema):
    """A request that may name the model."""

    model: str | None = Field(None, description="The name of a served model.")


class TimedRequest(ModelRequest):
    """A request that may limit the time it takes."""

    timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_SECONDS,
        description="Maximum duration in seconds, from the arrival of the request to its last token. A longer request ends "
        "with a 504.",
    )


class TrackedRequest(TimedRequest):
    """A request whose answer carries an id, which the client may choose."""

    request_id: RequestId | None = Field(
        None, description="Part of the `id` of the response. Default: the header `X-Request-Id`."
    )
    user: User | None = Field(None, description="Accepted and not used.")
    cache_salt: CacheSalt | None = None


class PrioritizedRequest(TrackedRequest):
    """A request that takes turns in the engine; one with a higher number yields to the others."""

    priority: int = Field(
        0,
        ge=-(2**31),
        le=2**31 - 1,
        description="Requests with a lower number run first. Numbers below 0 require the setting "
        "`allow_negative_priority`.",
    )


class ListRequest(Schema):
    """The query of a route that lists: up to `limit` entries after the entry `after`."""

    limit: Annotated[QueryInteger, Field(ge=1, le=1000, description=LIMIT)] = 20
    after: Annotated[str, Field(max_length=128, description=AFTER)] = ""


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
    """Return a discriminator by `field`. Tags stand in angle brackets, which tells them from a client's own names.

    The tag is `NO_TAG` if the field is missing. The tag of a value without fields is its type, without brackets.
    """

    def tag(value: Any) -> str:
        if isinstance(value, dict):
            return NO_TAG if value.get(field) is None else f"<{value[field]}>"
        return f"<{getattr(value, field)}>" if hasattr(value, field) else type(value).__name__

    # pydantic's error names the discriminator so: the path of the field from the value
    tag.__name__ = f".{field}"
    return tag


def form_of(value: Any) -> str:
    """Return the type of a value as the tag of a union of strings, lists and objects; for others its name."""
    for form, tag in ((str, "<string>"), (list, "<list>"), (dict | Schema, "<object>")):
        if isinstance(value, form):
            return tag
    return type(value).__name__


def read(schema: type[SchemaType], body: bytes, name: str = "the body") -> SchemaType:
    """Validate a JSON body, or other JSON with this name.

    Raises `InvalidRequest` that names the field at fault, unknown fields first, and `BodyTooLarge`.
    """
    check_separators(body, {**MAX_SEPARATORS, b":": schema.max_names}, name)
    try:
        values = from_json(body, catch_duplicate_keys=True)
    except ValueError as error:
        raise not_json(str(error), body) from None
    _is_reported.set(False)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        problem = next(filter(_is_unsupported, problems), problems[0])
    context = problem.get("ctx", {})
    param = getattr(context.get("error"), "param", None) or _param(problem["loc"])
    if _is_unsupported(problem):
        raise _unsupported(param, context)
    text = _message(schema, problem, context)
    if problem["type"] in (UNSUPPORTED_VALUE, NO_SUPPORT):
        raise UnsupportedParameter(f"{param}: {text}", param=param)
    raise InvalidRequest(f"{param or 'the body'}: {text}", param=param)


# pydantic's names for a value without a known tag, for an unknown field, and for a value that is none of several
UNKNOWN_TAG, UNKNOWN_FIELD, UNSUPPORTED_VALUE = "union_tag_invalid", "extra_forbidden", "literal_error"
# pydantic's names for a number beyond a field's bounds, and those of the bounds
OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _message(schema: type[Schema], problem: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    """Return what a value must be, instead of the one that has the problem."""
    if problem["type"] in OUT_OF_RANGE and (text := _range(schema, problem["loc"])):
        return text
    if words := IN_WORDS.get(context.get("pattern", "")):
        return f"must be {words}"
    if problem["type"] == "model_type" and (expected := _schemas_by_name().get(context["class_name"])):
        return f"must be an object {expected.such_as or 'with fields among ' + ', '.join(sorted(expected.names()))}"
    if problem["type"] == UNSUPPORTED_VALUE:
        return f"only {_as_json(context['expected'])} is supported"
    return in_words(problem)


def _as_json(literals: str) -> str:
    """Return literals, which pydantic lists as in Python, as in JSON."""
    return {"False": "false", "True": "true"}.get(literals, literals.replace("'", '"'))


@cache
def _schemas_by_name() -> dict[str, type[Schema]]:
    schemas = list(Schema.__subclasses__())
    for schema in schemas:
        schemas += schema.__subclasses__()
    return {schema.__name__: schema for schema in schemas}


def _range(schema: type[Schema], location: tuple[int | str, ...]) -> str:
    """Return the range of a number at the top of a schema, empty for any other location."""
    if len(location) > 1:
        return ""
    limits = schema.model_fields[str(location[0])].metadata
    bounds = [f"{BOUNDS[name]} {getattr(limit, name)}" for limit in limits for name in BOUNDS if hasattr(limit, name)]
    return f"must be {' and '.join(bounds)}" if bounds else ""


def _is_unsupported(problem: Mapping[str, Any]) -> bool:
    error = problem.get("ctx", {}).get("error")
    return problem["type"] in (UNKNOWN_TAG, UNKNOWN_FIELD) or isinstance(error, UnknownField)


def _unsupported(param: str | None, context: Mapping[str, Any]) -> InvalidRequest:
    """Return the error of an unknown field of the object at `param`, or of a value with an unknown tag or without one."""
    unknown = context.get("error")
    if isinstance(unknown, UnknownField):
        path = f"{param}.{unknown.name}" if param else unknown.name
        return UnsupportedParameter(f"unknown parameter {path}{unknown.advice()}", param=path)
    if "tag" not in context:
        return UnsupportedParameter(f"unknown parameter {param}", param=param)
    tag, known = context["tag"], context["expected_tags"].replace("<", "").replace(">", "")
    field = context["discriminator"].removesuffix("()")
    if not field.startswith("."):
        forms = " or ".join(known.replace("'", "").rsplit(", ", 1))
        return InvalidRequest(f"{param}: must be a {forms}", param=param)
    if not tag.startswith("<"):
        return InvalidRequest(f"{param}: must be an object whose {field[1:]} is one of {known}", param=param)
    at = f"{param}{field}"
    if tag == NO_TAG:
        return InvalidRequest(f"{at}: is required, one of {known}", param=at)
    name = tag[1:-1][:MAX_NAME] or "''"
    return UnsupportedParameter(f"{at}: no support for {name}, only {known}", param=at)


def _param(location: tuple[int | str, ...]) -> str | None:
    """Return the path of a location: ("prompt", "<list of parts>", 2, "<text>", "text") is `prompt[2].text`."""
    text = ""
    for step in location:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not step.startswith("<"):
            text += f".{step[:MAX_NAME]}" if text else step[:MAX_NAME]
    return text or None
