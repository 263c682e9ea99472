"""A request's prompt becomes what the engine reads: token ids, a media index a token, and the encoded media by digest.

Media are checked and named here, not decoded. How segments become token ids is `model.prompt`'s business alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from model.prompt import EndOfChunk, Media, PromptError, Segment, Text, encode, index_media
from server.errors import ContextLengthExceeded, InvalidRequest
from server.media.intake import Intake
from server.media.source import EncodedMedia
from server.read_prompt import PreparedPrompt
from server.schemas.completions import Part, Prompt, TextPart
from server.schemas.media import MediaPart
from server.served_model import ServedModel


async def read_prompt(prompt: Prompt, model: ServedModel, intake: Intake, param: str = "prompt") -> PreparedPrompt:
    """Raises `InvalidRequest` or `MediaNotFound` that names the part at fault; `param` is the prompt's own name."""
    try:
        if isinstance(prompt, str):
            return PreparedPrompt(encode([Text(prompt)], model.tokenizer), {})
        token_ids = [part for part in prompt if isinstance(part, int)]
        if token_ids:
            return PreparedPrompt(
                index_media(known_ids(token_ids, model.num_token_ids, param), [], model.tokenizer), {}
            )
        parts = [part for part in prompt if not isinstance(part, int)]
        segments, media = await read_parts(parts, intake, param)
        return PreparedPrompt(encode(segments, model.tokenizer), media)
    except PromptError as error:
        raise InvalidRequest(str(error), param=param) from None


def check_length(prompt: PreparedPrompt, max_tokens: int, max_model_len: int) -> None:
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


async def read_parts(
    parts: Sequence[Part], intake: Intake, param: str
) -> tuple[list[Segment], dict[bytes, EncodedMedia]]:
    """Segments in their order, and each media that they show once."""
    if not parts:
        raise InvalidRequest("the prompt is empty", param=param)
    places = {f"{param}[{place}]": part for place, part in enumerate(parts)}
    found = await intake.read_all({place: part for place, part in places.items() if isinstance(part, MediaPart)}, param)
    segments = [_segment(part, found.get(place)) for place, part in places.items()]
    return segments, {media.digest: media for media in reversed(found.values())}


def _segment(part: Part, media: EncodedMedia | None) -> Segment:
    if media is not None:
        return Media(media.digest)
    return Text(part.text) if isinstance(part, TextPart) else EndOfChunk()
