"""The base of every response schema, and what several responses share: lists, deletions, usage, errors.

Responses are documented and tested with these schemas, and are not validated against them while the server runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from model.prompt import ShotsAttend

# the type of a field that some responses leave out, and that is never null: `int | Absent = None`
Absent = SkipJsonSchema[None]


class ResponseSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


@dataclass(frozen=True, slots=True)
class ResponseRecord:
    """A part of a response that the server also computes with: it is small, and is not validated."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


class AnswerHead(ResponseSchema):
    """The first fields of an answer of the engine, as `response_head` writes them."""

    id: str
    object: str
    created: int
    model: str


class ListSchema(ResponseSchema):
    object: Literal["list"]


class PageSchema(ListSchema):
    """A page of a list; the next page is `after=last_id`."""

    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(ResponseSchema):
    """The deleted object."""

    id: str
    object: Literal["image", "video", "support_set", "evaluation", "api_key"]
    deleted: Literal[True]


class PromptTokensDetails(ResponseSchema):
    cached_tokens: int = Field(description="Prompt tokens that were in the prefix cache.")


class CompletionTokensDetails(ResponseSchema):
    """Tokens that speculation proposed, from the prompt and the completion so far."""

    accepted_prediction_tokens: int = Field(description="Proposed tokens that are part of the completion.")
    rejected_prediction_tokens: int = Field(description="Proposed tokens that are not part of the completion.")


class FewShotDetails(ResponseSchema):
    """The media of a request and, for few-shot requests, its shots."""

    media: int = Field(description="Images and videos in the prompt.")
    media_encoded: int | Absent = Field(None, description="Media that were encoded for the prompt.")
    media_cached: int | Absent = Field(
        None, description="Media that were in the cache, also if a search of this request had encoded them."
    )
    media_deduplicated: int = Field(description="Media that repeat an earlier media item of the prompt.")
    shots_attend: ShotsAttend | Absent = Field(None, description="Present if it is `alone`.")
    shots_used: int | Absent = Field(None, description="Shots in the prompt.")
    support_set: str | None = Field(None, description="The id of the support set of the shots.")
    version: int | None = Field(None, description="The version of the support set.")
    prompts: int | Absent = Field(None, description="Prompts that were computed.")
    candidate_tokens: int | Absent = Field(None, description="Tokens of the scored candidates.")


class Usage(ResponseSchema):
    prompt_tokens: int = Field(description="Tokens of the prompts. A media item is one token.")
    completion_tokens: int = Field(description="Generated tokens.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | Absent = Field(
        None, description="Present if any tokens were proposed."
    )
    fewshot_details: FewShotDetails


class ErrorDetails(ResponseSchema):
    message: str
    type: str
    param: str | None = Field(description="The path of the invalid field, such as `prompt[2].image_url.url`.")
    code: str


class Error(ResponseSchema):
    error: ErrorDetails
