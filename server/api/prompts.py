"""A request's prompt becomes what the engine reads: token ids, a media index a token, and the encoded media by digest.

Media are checked and named here, not decoded. How segments become token ids is `model.prompt`'s business alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.prompt import EncodedPrompt, EndOfChunk, Media, PromptError, Segment, Text, encode, index_media
from model.tokenizer import PromptTokenizer
from server.api.schemas import EndOfChunkPart, ImageUrlPart, Part, Prompt, TextPart, VideoUrlPart
from server.errors import ContextLengthExceeded, InvalidRequest
from server.media.source import EncodedMedia, read_data_url
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    encoded: EncodedPrompt
    media: dict[bytes, EncodedMedia]

    @property
    def num_tokens(self) -> int:
        return len(self.encoded.token_ids)


def read_prompt(prompt: Prompt, tokenizer: PromptTokenizer, num_token_ids: int, settings: Settings) -> ReadPrompt:
    """Raises `InvalidRequest` that names the part at fault."""
    try:
        if isinstance(prompt, str):
            return ReadPrompt(encode([Text(prompt)], tokenizer), {})
        token_ids = [part for part in prompt if isinstance(part, int)]
        if token_ids:
            return ReadPrompt(index_media(known_ids(token_ids, num_token_ids, "prompt"), [], tokenizer), {})
        return _read_parts([part for part in prompt if not isinstance(part, int)], tokenizer, settings)
    except PromptError as error:
        raise InvalidRequest(str(error), param="prompt") from None


def check_length(prompt: ReadPrompt, max_tokens: int, max_model_len: int) -> None:
    if prompt.num_tokens + max_tokens > max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {prompt.num_tokens} tokens and max_tokens is {max_tokens}: "
            f"together more than the {max_model_len} that this model reads",
            param="max_tokens" if prompt.num_tokens < max_model_len else "prompt",
        )


def known_ids(token_ids: list[int], num_token_ids: int, param: str) -> list[int]:
    for place, token_id in enumerate(token_ids):
        if token_id >= num_token_ids:
            message = f"token id {token_id} is not below the vocabulary's size {num_token_ids}"
            raise InvalidRequest(message, param=f"{param}[{place}]")
    return token_ids


def _read_parts(parts: list[Part], tokenizer: PromptTokenizer, settings: Settings) -> ReadPrompt:
    if not parts:
        raise InvalidRequest("the prompt is empty", param="prompt")
    num_media = sum(isinstance(part, ImageUrlPart | VideoUrlPart) for part in parts)
    if num_media > settings.max_media_per_request:
        message = f"{num_media} images and videos in one prompt, the limit is {settings.max_media_per_request}"
        raise InvalidRequest(message, param="prompt")
    media: dict[bytes, EncodedMedia] = {}
    segments = [_segment(part, f"prompt[{place}]", media, settings.max_media_bytes) for place, part in enumerate(parts)]
    return ReadPrompt(encode(segments, tokenizer), media)


def _segment(part: Part, param: str, media: dict[bytes, EncodedMedia], max_bytes: int) -> Segment:
    match part:
        case TextPart():
            return Text(part.text)
        case EndOfChunkPart():
            return EndOfChunk()
        case ImageUrlPart():
            found = read_data_url(part.image_url.url, "image", max_bytes=max_bytes, param=f"{param}.image_url.url")
        case VideoUrlPart():
            found = read_data_url(part.video_url.url, "video", max_bytes=max_bytes, param=f"{param}.video_url.url")
    media.setdefault(found.digest, found)
    return Media(found.digest)
