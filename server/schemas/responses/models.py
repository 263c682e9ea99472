"""Responses about the served model, its tokenizer, vectors, gates and attention, and about the state of the server."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from model.config import Resize
from server.schemas.responses.base import Absent, AnswerHead, ListSchema, ResponseSchema, Usage


class Vision(ResponseSchema):
    image_size: int
    resize: Resize = Field(
        description="How an image becomes a square: by cropping its centre, by squashing, or by padding."
    )
    visual_tokens: int
    max_media_per_request: int


class ModelSource(ResponseSchema):
    part: str = Field(
        description="`model`, or a part of an OpenFlamingo model: `checkpoint`, `language model` or `vision model`."
    )
    repository: str
    commit: str
    license: str = Field(description="The licence in the metadata of the model card.")


class Model(ResponseSchema):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    family: str
    max_model_len: int
    max_set_examples: int = Field(description="The number of examples that a support set may have.")
    end_of_chunk: str | None = Field(
        description="The token after each shot, null if the model has none: a line break then ends a shot."
    )
    sources: list[ModelSource] = Field(description="The repositories that the model was imported from.")
    vision: Vision


class Models(ListSchema):
    data: list[Model]


class Tokens(ResponseSchema):
    tokens: list[int]
    media_index: list[int] = Field(description="For each token, the index of the media item that it reads, or -1.")
    count: int
    max_model_len: int
    token_strs: list[str] | Absent = Field(None, description="Present with `return_token_strs`.")


class TokenizerInfo(ResponseSchema):
    """The special tokens as text. `/tokenize` with `add_special_tokens` `false` returns their ids."""

    bos_token: str | None
    eos_token: str | None
    pad_token: None
    chat_template: None
    vocab_size: int
    model_max_length: int


class Text(ResponseSchema):
    prompt: str


class InspectedToken(ResponseSchema):
    id: int
    text: str
    media: int | None = Field(description="The index of the media item that it reads. Null if it reads none.")


class Gate(ResponseSchema):
    """The tanh of the gates of a gated layer; 0 is closed. For gates with a value per channel, the mean absolute value."""

    layer: int
    attention: float
    feed_forward: float


class Attention(ResponseSchema):
    """An attention map, the mean over layers and heads. Weights of visual tokens sum to 1, and so do those of patches."""

    layers: list[int]
    visual_tokens: list[float]
    grid: list[list[list[float]]] = Field(description="The weights of the patches, by frame, row and column.")


class Inspection(AnswerHead):
    object: Literal["inspection"]
    tokens: list[InspectedToken]
    num_prompt_tokens: int
    token: int
    gates: list[Gate]
    attention: list[Attention]
    usage: Usage


class Embedding(ResponseSchema):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(
        description="A list of numbers, or with `base64` their float32 bytes, little-endian."
    )


class Embeddings(ListSchema):
    data: list[Embedding]
    model: str
    usage: Usage


EngineInfo = dict[str, Any]


class Live(ResponseSchema):
    status: Literal["live"]


class Ready(ResponseSchema):
    status: str = Field(
        description="`ready`, or the reason why the server is not ready, such as `starting` or `overloaded`."
    )


class EngineProgress(ResponseSchema):
    status: Literal["ok", "stalled"]
    last_step_age_seconds: float = Field(description="Seconds since the last step, while the engine has work.")
    requests_waiting: int
    requests_running: int


class Health(Ready):
    model: str
    engine: EngineInfo = Field(description="Versions, device, number formats and kernels.")


class WeightsFile(ResponseSchema):
    file: str
    bytes: int
    sha256: str | None = Field(description="Null until it is computed, after the engine is ready.")


class ServerVersion(ResponseSchema):
    version: str
    engine: EngineInfo
    weights: list[WeightsFile] = Field(description="The weight files in the model's folder.")
