"""Prepares a prompt for the engine: token ids, a media index per token, and the encoded media by digest.

Media are checked and identified here, but not decoded. Only `model.prompt` knows how segments become token ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import cast

from model.prompt import (
    EncodedPrompt,
    EndOfChunk,
    Media,
    PromptError,
    PromptTokenizer,
    Segment,
    ShotsAttend,
    Text,
    encode,
    index_media,
)
from server.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from server.media.intake import Intake
from server.media.source import EncodedMedia
from server.schemas.prompt import EndOfChunkPart, MediaPart, Prompt, Prompts, TextPart, prompt_form
from server.served_model import ServedModel

# more characters than almost any text has per token
CHARACTERS_PER_TOKEN = 16
DATA_URL = re.compile(r"data:(image|video)/[\w.+-]{1,64};base64,")


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt as the engine reads it, with its media by digest; `segments` is None for a prompt of token ids.

    `param` is its path in the request.
    """

    encoded: EncodedPrompt
    media: Mapping[bytes, EncodedMedia]
    segments: Sequence[Segment] | None
    param: str = "prompt"

    @property
    def num_tokens(self) -> int:
        return len(self.encoded.token_ids)

    def check_room(self, num_new_tokens: int, new: str, param: str, model: ServedModel) -> None:
        """Check that the prompt and the new tokens of the field `param` fit the model's context.

        `new` names the new tokens in the message. Raises `ContextLengthExceeded`.
        """
        num_tokens, limit = self.num_tokens, model.max_model_len
        if num_tokens + num_new_tokens > limit:
            also = f" and {new} {num_new_tokens}, together" if num_new_tokens else ","
            raise ContextLengthExceeded(
                f"the prompt has {num_tokens} tokens{also} more than the model's limit of {limit}",
                param=param if num_tokens < limit else self.param,
            )

    def alone(self, model: ServedModel) -> PreparedPrompt:
        """Return the prompt with shots that attend alone. Raises `UnsupportedParameter` if the model has no such form."""
        check_may_attend_alone(model)
        return replace(self, encoded=replace(self.encoded, shots_attend="alone"))


def check_may_attend_alone(model: ServedModel) -> None:
    """Check that the shots of the model's prompts may attend alone. Raises `UnsupportedParameter`."""
    if model.config.gated.attends != "last":
        message = "shots cannot attend alone: the text of this model reads the media of all shots before it"
        raise UnsupportedParameter(message, param="shots_attend")


def order_matters(attend: ShotsAttend, model: ServedModel) -> bool:
    """Return whether the result of a prompt depends on the order of its shots."""
    return attend == "previous" or model.config.language_model.alone_positions == "in_a_row"


async def prepare_prompt(
    prompt: Prompt, model: ServedModel, intake: Intake, attend: ShotsAttend = "previous"
) -> PreparedPrompt:
    """Prepare the prompt of a request. Raises `InvalidRequest` or `MediaNotFound`, which name the invalid part."""
    (prepared,) = await prepare_prompts(prompt, model, intake, attend)
    return prepared


async def prepare_prompts(
    value: Prompts, model: ServedModel, intake: Intake, attend: ShotsAttend = "previous"
) -> list[PreparedPrompt]:
    """Prepare the field `prompt` of a request; the limits of media apply to all its prompts together."""
    if prompt_form(value) == "<list of prompts>":
        prompts = {f"prompt[{index}]": prompt for index, prompt in enumerate(cast(list[Prompt], value))}
    else:
        prompts = {"prompt": cast(Prompt, value)}
    parts = {
        f"{param}[{index}]": part
        for param, prompt in prompts.items()
        if prompt_form(prompt) == "<list of parts>"
        for index, part in enumerate(prompt)
        if isinstance(part, MediaPart)
    }
    media = await intake.read_all(parts, next(iter(prompts)))
    prepared = [await _prepare(prompt, media, model, param) for param, prompt in prompts.items()]
    return [prompt.alone(model) for prompt in prepared] if attend == "alone" else prepared


async def _prepare(prompt: Prompt, media: Mapping[str, EncodedMedia], model: ServedModel, param: str) -> PreparedPrompt:
    if isinstance(prompt, str):
        return await model.tokenize(encode_segments, [Text(prompt)], {}, model, param)
    if not prompt:  # some families would begin it with a marker
        raise InvalidRequest("the prompt is empty", param=param)
    if isinstance(prompt[0], int):
        if len(prompt) > (limit := model.max_model_len):
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt)} tokens, the model's limit is {limit}", param=param
            )
        return _index_token_ids(check_token_ids(prompt, model, param), model.tokenizer, param)
    segments: list[Segment] = []
    by_digest: dict[bytes, EncodedMedia] = {}
    for index, part in enumerate(prompt):
        match part:
            case TextPart():
                segments.append(Text(part.text))
            case EndOfChunkPart():
                segments.append(EndOfChunk())
            case _:
                item = media[f"{param}[{index}]"]
                by_digest[item.digest] = item
                segments.append(Media(item.digest))
    return await model.tokenize(encode_segments, segments, by_digest, model, param)


def encode_segments(
    segments: Sequence[Segment],
    media: Mapping[bytes, EncodedMedia],
    model: ServedModel,
    param: str,
    *,
    joins_texts: bool = False,
) -> PreparedPrompt:
    """Encode segments; `media` may hold more than the segments use. `joins_texts`: adjacent texts are encoded as one.

    Raises `InvalidRequest` that names `param`, and `ContextLengthExceeded` for texts that cannot fit the model.
    """
    # before texts are joined: they may be long and share memory
    texts = [segment.text for segment in segments if isinstance(segment, Text)]
    check_texts(texts, model, param)
    if joins_texts:
        segments = join_texts(segments)
    try:
        encoded = encode(segments, model.tokenizer)
    except PromptError as error:
        raise InvalidRequest(str(error), param=param) from None
    return PreparedPrompt(encoded, {digest: media[digest] for digest in encoded.media}, segments, param)


def check_texts(texts: Sequence[str], model: ServedModel, param: str) -> None:
    """Check texts before tokenization, which takes a second for long ones: none is a data URL, and together they may fit.

    The number of bytes is limited and, in the beginnings of long texts, the number of tokens. The limit is twice that of
    the model: a beginning may end within a word, and texts may be joined, so beginnings may have tokens that the prompt
    does not have. Raises `ContextLengthExceeded` or `InvalidRequest`.
    """
    num_bytes, max_bytes = 0, model.max_model_len * model.tokenizer.max_token_bytes
    for text in texts:
        if DATA_URL.match(text):
            raise InvalidRequest("this text is a data URL: send an image or a video as a part of its own", param=param)
        num_bytes += len(text.encode(errors="replace"))
        if num_bytes > max_bytes:
            message = (
                f"the text has at least {num_bytes} bytes, more than the model's {model.max_model_len} tokens can hold"
            )
            raise ContextLengthExceeded(message, param=param)
    most, num_tokens, max_tokens = CHARACTERS_PER_TOKEN * model.max_model_len, 0, 2 * model.max_model_len
    if sum(map(len, texts)) <= most:
        return
    for text in texts:
        num_tokens += len(model.tokenizer.encode_plain(text[:most]))
        if num_tokens > max_tokens:
            message = f"the text has more than {max_tokens} tokens, the model's limit is {model.max_model_len}"
            raise ContextLengthExceeded(message, param=param)


def encode_text(text: str, model: ServedModel, param: str) -> list[int]:
    """Return the ids of a text without markers. Raises `ContextLengthExceeded` for one that is too long for the model."""
    check_texts([text], model, param)
    ids = model.tokenizer.encode_plain(text)
    if len(ids) > (limit := model.max_model_len):
        raise ContextLengthExceeded(f"the text has {len(ids)} tokens, the model's limit is {limit}", param=param)
    return ids


def check_token_ids(token_ids: list[int], model: ServedModel, param: str) -> list[int]:
    """Return the ids unchanged. Raises `InvalidRequest` for an id that is not in the vocabulary."""
    for index, token_id in enumerate(token_ids):
        if token_id >= (size := model.config.language_model.num_token_ids):
            message = f"token id {token_id} is not below the vocabulary's size {size}"
            raise InvalidRequest(message, param=f"{param}[{index}]")
    return token_ids


class PromptEnd:
    """The end of a prompt of these segments, after which texts are encoded; None: a prompt of token ids."""

    def __init__(self, segments: Sequence[Segment] | None, tokenizer: PromptTokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_text = segments is not None
        # a marker is one id, so segments before the last one do not affect later ids
        markers = [index for index, segment in enumerate(segments or ()) if not isinstance(segment, Text)]
        self._tail = list((segments or ())[markers[-1] if markers else 0 :])

    def ids_after(self, text: str) -> list[int]:
        """Return the ids of a text after the prompt, as if both were encoded as one text.

        The text is encoded separately after a prompt of token ids, and if the tokenizer would merge characters of both and
        so change the prompt's ids.
        """
        if not self._is_text:
            return self._tokenizer.encode_plain(text)
        # earlier texts stay apart, as they are in the prompt
        last, prefix = self._tail[-1] if self._tail else None, self._token_ids
        continued = [*self._tail[:-1], Text(last.text + text)] if isinstance(last, Text) else [*self._tail, Text(text)]
        joined = encode(continued, self._tokenizer).token_ids
        return joined[len(prefix) :] if joined[: len(prefix)] == prefix else self._tokenizer.encode_plain(text)

    @cached_property
    def _token_ids(self) -> list[int]:
        return encode(self._tail, self._tokenizer).token_ids if self._tail else []


def join_texts(segments: Iterable[Segment]) -> list[Segment]:
    """Join adjacent texts and drop empty ones: some families trim each text, or insert a token between two texts."""
    joined: list[Segment] = []
    for is_text, run in groupby(segments, key=lambda segment: isinstance(segment, Text)):
        if not is_text:
            joined += run
        elif text := "".join(segment.text for segment in run if isinstance(segment, Text)):
            joined.append(Text(text))
    return joined


def _index_token_ids(token_ids: list[int], tokenizer: PromptTokenizer, param: str) -> PreparedPrompt:
    try:
        return PreparedPrompt(index_media(token_ids, [], tokenizer), {}, None, param)
    except PromptError as error:
        raise InvalidRequest(str(error), param=param) from None
