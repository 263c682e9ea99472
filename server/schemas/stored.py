"""Requests about what is stored: images and videos, and support sets with their examples and evaluations.

In a change of a set, `null` removes a value; elsewhere it means "not given".
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, GetJsonSchemaHandler, Tag, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, to_jsonable_python

from model.prompt import ShotsAttend
from server.schemas.base import (
    AFTER,
    EXAMPLE_ID,
    ID,
    LIMIT,
    SET_NAME,
    FieldError,
    ListRequest,
    ModelRequest,
    QueryInteger,
    Schema,
    TimedRequest,
    with_example,
)
from server.schemas.fewshot import (
    MAX_CANDIDATES,
    MAX_LABEL,
    MAX_SHOTS,
    VERSION,
    CandidateField,
    Comparing,
    MediaFields,
    Method,
    Order,
    ShotFields,
    Strategy,
    TemplateChoice,
    Version,
    WeighingFields,
)
from server.schemas.json_object import check_numbers
from server.schemas.prompt import ATTEND
from server.store.staging import ID_PREFIX


class UploadRequest(Schema):
    """An image or a video, as `data` or as `url`."""

    data: str | None = Field(None, description="The bytes in base64.")
    url: str | None = Field(None, description="Instead of `data`: a URL, as in a prompt.")
    object: Literal["image", "video"] = Field("image", description="The kind of media at a fetched `url`.")

    @model_validator(mode="after")
    def _one_of_two(self) -> UploadRequest:
        if (self.data is None) == (self.url is None):
            raise ValueError("give either data or url")
        return self


class UploadForm(Schema):
    """A form with the bytes of an image or a video as the file `file`."""

    file: bytes


class ListImagesRequest(ListRequest):
    object: Literal["image", "video"] | None = Field(None, description="Return only images, or only videos.")


MAX_TEXT = 65536
# of fields in the examples of a request
MAX_NAMES = 2**16
MAX_METADATA_BYTES = 16384
# ten years
MAX_TTL = 315_360_000
MAX_POOL = 1024
NAME = "A unique name of up to 128 ASCII letters, digits and characters of `_.:-`, which begins with a letter or digit."
PINNED = "Keep the media of the latest version encoded."
LABEL = "The label of the answer, of up to 1,024 characters. Store a longer answer as `text`."
METADATA = "Any JSON object of up to 16 KiB."
EXPECTED_VERSION = "The latest version. If it is another one, nothing changes and the response is a 409."


def _no_zero(text: str) -> str:
    if "\0" in text:
        raise ValueError("a text may not contain the character U+0000")
    return text


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from chain.from_iterable(map(_strings, value.values()))
        case list():
            yield from chain.from_iterable(map(_strings, value))


def _small(metadata: dict[str, Any]) -> dict[str, Any]:
    size = len(json.dumps(check_numbers(metadata), ensure_ascii=False, separators=(",", ":")).encode())
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"{size} bytes of metadata, the limit is {MAX_METADATA_BYTES}")
    return metadata


def _is_no_id(name: str) -> str:
    if name.startswith(ID_PREFIX):
        raise ValueError(f"a name may not begin with {ID_PREFIX}, which marks ids")
    return name


def _in_future(moment: float) -> float:
    if not time.time() < moment < time.time() + MAX_TTL:
        raise ValueError(f"must be in the future, by at most {MAX_TTL} seconds")
    return moment


StoredText = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_no_zero)]
StoredLabel = Annotated[str, Field(max_length=MAX_LABEL), AfterValidator(_no_zero)]
Metadata = Annotated[dict[str, Any], AfterValidator(_small)]
SetName = Annotated[str, Field(pattern=SET_NAME), AfterValidator(_is_no_id)]
# Clients remove `.` and `..` from the path of a URL, as its standard says: to delete such an example would delete its set.
ExampleId = Annotated[str, Field(pattern=EXAMPLE_ID, max_length=128)]
QueryVersion = Annotated[QueryInteger, Field(ge=1, le=2**31 - 1)]
Moment = Annotated[float, AfterValidator(_in_future)]
Seconds = Annotated[float, Field(gt=0, le=MAX_TTL)]


class ExampleFields(ShotFields):
    """An example to store."""

    id: ExampleId | None = Field(None, description="Default: an id that the server generates.")
    text: StoredText = Field("", description="The text of the answer.")
    question: StoredText = Field("", description="The question.")
    label: StoredLabel = Field("", description=LABEL)
    metadata: Metadata = Field({}, description=METADATA)

    @model_validator(mode="after")
    def _shows_something(self) -> ExampleFields:
        if not (self.image or self.media or self.text or self.label):
            raise ValueError("an example needs media, a text or a label")
        return self


def _different(examples: list[ExampleFields]) -> list[ExampleFields]:
    seen: set[str] = set()
    for index, example in enumerate(examples):
        if example.id in seen:
            raise FieldError(f"an earlier example has the id {example.id!r}", param=f"examples[{index}].id")
        seen |= {example.id} if example.id is not None else set()
    return examples


Examples = Annotated[list[ExampleFields], AfterValidator(_different)]


class Lifetime(Schema):
    """When a set expires. Without either field, it stays until it is deleted."""

    ttl_seconds: Seconds | None = Field(None, description="Seconds until the set expires.")
    expires_at: Moment | None = Field(
        None, description="Instead of `ttl_seconds`: the expiry as a Unix time in seconds."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Lifetime:
        if self.ttl_seconds is not None and self.expires_at is not None:
            raise ValueError("give either ttl_seconds or expires_at")
        return self

    def end(self, now: float) -> float | None:
        return self.expires_at if self.ttl_seconds is None else now + self.ttl_seconds


class CreateRequest(Lifetime):
    model_config = with_example(name="sums", examples=[{"id": "a1", "question": "2 + 2?", "text": "4"}])

    max_names: ClassVar[int] = MAX_NAMES
    name: SetName | None = Field(None, description=NAME)
    examples: Examples = Field([], description="The examples of version 1.")
    pinned: bool = Field(False, description=PINNED)
    metadata: Metadata = Field({}, description=METADATA)


class ImportRequest(Schema):
    name: SetName | None = Field(None, description="The name of the set. Default: the name in the archive.")


class UpdateRequest(Lifetime):
    has_null: ClassVar[bool] = True  # it removes a value

    name: SetName | None = Field(None, description=NAME)
    pinned: bool = Field(False, description=PINNED)
    metadata: Metadata | None = Field(None, description=METADATA)
    expected_version: Version | None = Field(None, description=EXPECTED_VERSION)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Document no defaults: a field that is left out stays as it is."""
        reference = handler(schema)
        for field in handler.resolve_ref_schema(reference)["properties"].values():
            field.pop("default", None)
        return reference

    def changes(self, now: float) -> dict[str, Any]:
        names, changes = self.model_fields_set, dict[str, Any]()
        if "name" in names:
            changes["name"] = self.name
        if names & {"ttl_seconds", "expires_at"}:
            changes["expires_at"] = self.end(now)
        if "pinned" in names:
            changes["is_pinned"] = self.pinned
        if "metadata" in names:
            changes["metadata"] = self.metadata or {}
        return changes


class PutExamplesRequest(Schema):
    model_config = with_example(examples=[{"id": "a2", "question": "3 + 3?", "text": "6"}])

    max_names: ClassVar[int] = MAX_NAMES
    examples: Annotated[Examples, Field(min_length=1)]
    expected_version: Version | None = Field(None, description=EXPECTED_VERSION)


class WarmRequest(Schema):
    """The parts of a version to compute in advance: all media, vectors for a strategy, and shots for a template."""

    version: Version | None = Field(None, description=VERSION)
    strategy: Comparing = Field("rices_image", description="`rices_text` and `mixed` also embed the texts.")
    template: TemplateChoice | None = Field(
        None, description="Compute the first `k` shots of prompts with this template."
    )
    shots_attend: ShotsAttend = Field(
        "previous",
        description="`alone`: compute each example as a shot that attends alone. Requires `template`.",
    )
    k: int | None = Field(
        None,
        ge=1,
        description="Number of shots. Default: 4, or all with `shots_attend` `alone`. Requires `template`.",
    )
    wait: bool = Field(
        False, description="Respond when the warming has ended. Otherwise it continues in the background."
    )

    @model_validator(mode="after")
    def _k_is_of_a_template(self) -> WarmRequest:
        if self.k is not None and self.template is None:
            raise FieldError("needs a template: without one no shots are computed", param="k")
        if self.shots_attend == "alone" and self.template is None:
            raise FieldError("needs a template: without one no shots are computed", param="shots_attend")
        return self


class ListSetsRequest(ListRequest):
    limit: Annotated[QueryInteger, Field(ge=1, le=1000, description=LIMIT)] = 100
    after: Annotated[str, Field(pattern=ID, description=AFTER)] = ""


class ListVersionsRequest(Schema):
    limit: Annotated[QueryInteger, Field(ge=1, le=1000, description=LIMIT)] = 100
    after: Annotated[QueryInteger, Field(ge=0, le=2**31 - 1, description="The last version of the previous page.")] = 0


class ListExamplesRequest(ListSetsRequest):
    version: QueryVersion | None = Field(None, description=VERSION)


class VersionRequest(Schema):
    version: QueryVersion | None = Field(None, description=VERSION)


class ExpectedRequest(Schema):
    expected_version: QueryVersion | None = Field(None, description=EXPECTED_VERSION)


class RemoveExamplesRequest(ExpectedRequest):
    id: Annotated[
        str, Field(min_length=1, max_length=2**13, description="The ids of the examples, separated by commas.")
    ]

    @property
    def ids(self) -> list[str]:
        return list(dict.fromkeys(re.split(r",\s*", self.id)))


# what is taken away from a setting to see whether the answers depend on it
Control = Literal["text_only", "shuffled_labels", "encoder_features"]


Forms = Annotated[
    Annotated[ShotsAttend, Tag("<form>")]
    | Annotated[list[ShotsAttend], Field(min_length=1, max_length=16), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<form>"),
]


class EvaluateRequest(WeighingFields, ModelRequest):
    """The methods, strategies, numbers of shots, forms and seeds to compare."""

    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the sample of queries.")
    version: int | None = Field(None, ge=1, description=VERSION)
    k: list[Annotated[int, Field(ge=0, le=MAX_SHOTS)]] = Field(
        [], max_length=32, description="Numbers of shots. Default: 0, 1, 2, 4, 8 and 16, as far as the set allows."
    )
    strategies: list[Strategy] = Field(
        [], max_length=16, description="How shots are selected. Default: `random` and `rices_image`."
    )
    methods: list[Method] = Field(
        [], max_length=16, description="Methods of classification. Default: all whose requirements the set meets."
    )
    seeds: list[Annotated[int, Field(ge=0, le=2**63 - 1)]] = Field(
        [0], min_length=1, max_length=32, description="For each seed, shots and their orders are drawn again."
    )
    controls: list[Control] = Field(
        [],
        max_length=16,
        description="Control experiments. With `in_context`, `text_only` removes all media, and `shuffled_labels` shuffles "
        "the labels of the shots. With `nearest_mean`, `encoder_features` compares only features of the vision encoder.",
    )
    shots_attend: Forms = Field(
        "previous", description=f"The form of the prompts, or a list of forms to compare. {ATTEND}"
    )
    order: Order | None = Field(None, description="Order of the shots. The default depends on the strategy.")
    template: TemplateChoice = "classification"
    candidates: list[CandidateField] = Field(
        [], max_length=MAX_CANDIDATES, description="The possible answers. Default: the labels of the set."
    )
    max_queries: int = Field(
        200, ge=1, le=100_000, description="Maximum number of queries. Of a larger set, a sample is used."
    )

    @field_validator("template", "candidates")
    @classmethod
    def _can_be_stored(cls, value: Any) -> Any:
        for text in _strings(to_jsonable_python(value)):
            _no_zero(text)
        return value

    @property
    def forms(self) -> list[ShotsAttend]:
        return self.shots_attend if isinstance(self.shots_attend, list) else [self.shots_attend]


class ListEvaluationsRequest(ListRequest):
    limit: Annotated[QueryInteger, Field(ge=1, le=100, description=LIMIT)] = 20
    after: Annotated[str, Field(pattern=ID, description=AFTER)] = ""
    support_set: Annotated[str, Field(pattern=ID)] | None = Field(None, description="The id or name of a set.")


class DiagnosticsRequest(VersionRequest):
    limit: Annotated[
        QueryInteger,
        Field(ge=1, le=1000, description="Maximum number of entries in each list. Counts include all entries."),
    ] = 100


class PooledMedia(MediaFields):
    """An unlabelled image."""

    @model_validator(mode="after")
    def _shows_something(self) -> PooledMedia:
        if self.image is None and not self.media:
            raise ValueError("give image or media for each image of the pool")
        return self


class SuggestRequest(TimedRequest):
    """A pool of unlabelled images, from which the next images to label are selected."""

    pool: list[PooledMedia] = Field(min_length=1, max_length=MAX_POOL)
    count: int = Field(8, ge=1, le=MAX_POOL, description="Number of images to suggest.")
    version: Version | None = Field(None, description=VERSION)
