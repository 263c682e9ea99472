"""Responses about the served model, its tokenizer, vectors, gates and attention, and about the state of the server."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from model.config import Resize
from server.schemas.responses.base import Absent, ListSchema, ResponseSchema, Usage


class Vision(ResponseSchema):
    image_size: int
    resize: Resize = Field(
        description="How an image becomes a square: its centre is cropped, or all of it is squashed or padded."
    )
    visual_tokens: int
    max_media_per_request: int


class ModelSource(ResponseSchema):
    part: str = Field(description="`model`, or `checkpoint`, `language model` or `vision model` of an OpenFlamingo.")
    repository: str
    commit: str
    license: str = Field(description="As the model card states it in its metadata.")


class Model(ResponseSchema):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    family: str
    max_model_len: int
    sources: list[ModelSource] = Field(description="The repositories that the model was imported from.")
    vision: Vision


class Models(ListSchema):
    data: list[Model]


class Tokens(ResponseSchema):
    tokens: list[int]
    media_index: list[int] = Field(description="For each token the index of the media that it reads, or -1.")
    count: int
    max_model_len: int
    token_strs: list[str] | Absent = Field(None, description="With `return_token_strs`.")


class TokenizerInfo(ResponseSchema):
    """The special tokens by their spelling; `/tokenize` without special tokens returns the id of each."""

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
    media: int | None = Field(description="The index of the media that it reads.")


class Gate(ResponseSchema):
    """Tanh of the two gates of a gated layer, from 0 (closed); the mean absolute value of a vector gate."""

    layer: int
    attention: float
    feed_forward: float


class Attention(ResponseSchema):
    """Shares that sum to 1, the mean over the layers and their heads."""

    layers: list[int]
    visual_tokens: list[float]
    grid: list[list[list[float]]] = Field(description="By frame, row and column of the patches.")


class Inspection(ResponseSchema):
    id: str
    object: Literal["inspection"]
    created: int
    model: str
    tokens: list[InspectedToken]
    num_prompt_tokens: int
    token: int
    gates: list[Gate]
    attention: list[Attention]
    usage: Usage


class Embedding(ResponseSchema):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or with `base64` little-endian float32 in base64.")


class Embeddings(ListSchema):
    data: list[Embedding]
    model: str
    usage: Usage


EngineInfo = dict[str, Any]


class Live(ResponseSchema):
    status: Literal["live"]


class Ready(ResponseSchema):
    status: str = Field(description="`ready`, or the first reason against it, such as `starting` or `overloaded`.")


class EngineProgress(ResponseSchema):
    status: Literal["ok", "stalled"]
    last_step_age_seconds: float
    requests_waiting: int
    requests_running: int


class Health(Ready):
    model: str
    engine: EngineInfo = Field(description="Versions, device, number formats and kernels.")


class WeightsFile(ResponseSchema):
    file: str
    bytes: int
    sha256: str | None = Field(description="Null until it is computed, which begins when the engine is ready.")


class ServerVersion(ResponseSchema):
    version: str
    engine: EngineInfo
    weights: list[WeightsFile] = Field(description="The files of weights in the model's folder.")
