"""A prompt in a request: text, token ids, or a list of parts; media are named by URL or by the id of a stored one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from model.prompt import ShotsAttend
from server.media.source import kind_of
from server.schemas.base import NO_SUPPORT, Schema, form_of, tag_of

# short enough for an error message to repeat it; the media store checks whether it exists
MediaId = Annotated[str, Field(min_length=1, max_length=128)]
# clients use URLs as names, too
MediaName = Annotated[str, Field(min_length=1, max_length=512)]
MAX_PROMPTS = 1024


ATTEND = (
    "What each shot attends to in addition to itself: `previous` (all text before it) or `alone` (only the text before the "
    "first media item). A shot is the text from one media item to the next. Shots that attend alone are cached and reused "
    "in any prompt and any order."
)


class AttentionFields(Schema):
    """The form of a prompt with shots."""

    shots_attend: ShotsAttend = Field("previous", description=ATTEND)


class CacheBreakpoint(Schema):
    """A hint for the prompt cache. It has no effect, because the cache needs no hints."""

    mode: Literal["explicit"]


BREAKPOINT = "Accepted without effect: the prompt cache needs no hints."
DETAIL = "Accepted without effect: the encoder reads every image at the same size."


class MediaUrl(Schema):
    such_as = 'such as {"url": "data:image/…"}'

    url: str = Field(description="A data URL, or an `https` URL of a host that the setting `media_url_hosts` allows.")
    detail: Literal["auto", "low", "high", "original"] = Field("auto", description=DETAIL)


UUID = "A name for the media item. A later part with only this name refers to the same item."


class ImageUrlPart(Schema):
    """An image by its URL, or by a name that was sent with the image before."""

    type: Literal["image_url"]
    image_url: MediaUrl | None = None
    uuid: MediaName | None = Field(None, description=UUID)
    prompt_cache_breakpoint: CacheBreakpoint | None = Field(None, description=BREAKPOINT)

    @model_validator(mode="after")
    def _data_or_name(self) -> ImageUrlPart:
        if self.image_url is None and self.uuid is None:
            raise ValueError("give image_url, uuid, or both")
        return self


class VideoUrlPart(Schema):
    """A video by its URL, or by a name that was sent with the video before."""

    type: Literal["video_url"]
    video_url: MediaUrl | None = None
    uuid: MediaName | None = Field(None, description=UUID)

    @model_validator(mode="after")
    def _data_or_name(self) -> VideoUrlPart:
        if self.video_url is None and self.uuid is None:
            raise ValueError("give video_url, uuid, or both")
        return self


class ImageIdPart(Schema):
    type: Literal["image_id"]
    image_id: MediaId


class VideoIdPart(Schema):
    type: Literal["video_id"]
    video_id: MediaId


MediaPart = ImageUrlPart | VideoUrlPart | ImageIdPart | VideoIdPart
# a part or, in short, the URL of an image or the id of a stored image or video
MediaPartOrUrl = MediaPart | str
# for unions that `tag_of("type")` tells apart
TaggedMediaPart = (
    Annotated[ImageUrlPart, Tag("<image_url>")]
    | Annotated[VideoUrlPart, Tag("<video_url>")]
    | Annotated[ImageIdPart, Tag("<image_id>")]
    | Annotated[VideoIdPart, Tag("<video_id>")]
)


def stored_media_part(media_id: str) -> ImageIdPart | VideoIdPart:
    """Return the part that shows a stored image or video."""
    fields = stored_media_fields(media_id)
    return (VideoIdPart if fields["type"] == "video_id" else ImageIdPart).model_validate(fields)


def stored_media_fields(media_id: str) -> dict[str, str]:
    """Return the fields of that part in JSON. A page shows a thousand examples, whose parts would take milliseconds."""
    name = f"{kind_of(media_id)}_id"
    return {"type": name, name: media_id}


class TextPart(Schema):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: CacheBreakpoint | None = Field(None, description=BREAKPOINT)


MEDIA_TYPES = ("image_url", "video_url", "image_id", "video_id", "input_image")


def _without_media(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in MEDIA_TYPES:
        raise PydanticCustomError(NO_SUPPORT, "this message has only text; images and videos belong to user messages")
    return part


# the content of a message without media
Written = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[Annotated[TextPart, BeforeValidator(_without_media)]], Tag("<list>")],
    Discriminator(form_of),
]


class EndOfChunkPart(Schema):
    type: Literal["end_of_chunk"]


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | TaggedMediaPart | Annotated[EndOfChunkPart, Tag("<end_of_chunk>")],
    Discriminator(tag_of("type")),
]


def prompt_form(value: Any) -> str:
    """Return the form of a prompt, or of several, as the tag of its type."""
    if not isinstance(value, list):
        return form_of(value)
    first = value[0] if value else None
    if isinstance(first, str | list):
        return "<list of parts>" if any(isinstance(item, dict) for item in value) else "<list of prompts>"
    return "<list of token ids>" if isinstance(first, int) else "<list of parts>"


OnePrompt = (
    Annotated[str, Tag("<string>")]
    | Annotated[list[Annotated[int, Field(ge=0)]], Tag("<list of token ids>")]
    | Annotated[list[Part], Tag("<list of parts>")]
)
Prompt = Annotated[OnePrompt, Discriminator(prompt_form)]
# one prompt, or a list of them
Prompts = Annotated[
    OnePrompt | Annotated[list[Prompt], Field(max_length=MAX_PROMPTS), Tag("<list of prompts>")],
    Discriminator(prompt_form),
]
