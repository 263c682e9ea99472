"""The wire between the API process and the worker: typed messages (msgspec over ZeroMQ `ipc://` sockets), never pickle.

The worker receives token ids, media digests and sampling parameters. It sends token events, and `MediaWanted` for media
that it does not hold: only then are bytes decoded and pixels sent. A hit needs no pixels; a miss is never an error.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import zmq

from model.prompt import EncodedPrompt

WORKER_MODULE = "server.engine.worker"
ENGINE_FACTORY = "server.engine.build:build"
MAX_MESSAGE_BYTES = 256 * 2**20
# of the sockets at both ends: admission bounds the number of messages, and a process that ends does not wait until its last
# message is read
SOCKET_OPTIONS = {zmq.MAXMSGSIZE: MAX_MESSAGE_BYTES, zmq.SNDHWM: 0, zmq.RCVHWM: 0, zmq.LINGER: 0}

# priority of work that no client waits for: after every priority that a client may request
BACKGROUND_PRIORITY = 2**31

FinishReason = Literal["stop", "length", "abort", "error"]


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of the worker's input: settings to build the engine from, and the address of the socket."""

    address: str
    settings: str


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """The form of an answer: one of `choices`, or `text` as a regular expression or a JSON schema."""

    kind: Literal["choice", "regex", "json"]
    choices: tuple[str, ...] = ()
    text: str = ""
    # the field of the request, for errors
    field: str = "structured_outputs"


# below this, differences of float32 logits are too coarse for a distribution: the most likely token is chosen
MIN_TEMPERATURE = 1e-5


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters that choose the next token and end an answer. `temperature` 0 is greedy. The API handles stop strings."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    # number of most likely tokens to report with each sampled (or prompt) token; None: no log-probabilities
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    # independent answers to one prompt, or the best of a beam search
    n: int = 1
    # 0: no beam search
    beam_width: int = 0
    length_penalty: float = 1.0
    early_stopping: bool = False
    grammar: Grammar | None = None

    @property
    def is_random(self) -> bool:
        """True if tokens are sampled; otherwise the most likely one is chosen."""
        return self.temperature >= MIN_TEMPERATURE


class Queued(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt that takes its turn in the engine's steps.

    Its media are sources: 32-byte digests, followed by the salt if there is one.
    """

    request_id: str
    prompt: EncodedPrompt
    priority: int = 0
    arrived: float = 0.0
    # the sender: clients have equal shares of the engine, and all requests without a client count as those of one
    client: str = ""


class Generate(Queued, frozen=True, kw_only=True, tag=True):
    """A prompt to prefill and `sampling.n` answers to decode."""

    sampling: Sampling


class Score(Queued, frozen=True, kw_only=True, tag=True):
    """A prompt and token ids that may follow it, whose log-probabilities are requested. No candidate is empty."""

    candidates: list[list[int]]


class Embed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Media, by source, whose pooled features are requested."""

    request_id: str
    client: str = ""
    media: list[bytes]


class EmbedText(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Texts, as token ids, whose pooled hidden states are requested. None is empty."""

    request_id: str
    client: str = ""
    texts: list[list[int]]


class Inspect(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A prompt with its answer, and the position of a `token` whose attention to its media is requested.

    `layers` are gated layers, each by the index of the language-model layer that follows it; empty: the mean over all of
    them.
    """

    request_id: str
    prompt: EncodedPrompt
    token: int
    layers: list[int] = []
    client: str = ""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Ends a request or, with `index`, one of its answers.

    With `index` it has no effect in a beam search, and while the answers wait for their prompt.
    """

    request_id: str
    index: int | None = None


class MediaPixels(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The frames of one media item, resized, not yet normalised: uint8 RGB of shape [F, h, w, 3]."""

    digest: bytes
    shape: tuple[int, int, int, int]
    data: bytes


class MediaFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The API could not decode a media item: the requests that show it fail, and no others."""

    digest: bytes
    message: str


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class PromptScored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Log-probabilities of the prompt's tokens, each given all tokens before it; the first token has none."""

    request_id: str
    logprobs: list[TokenLogprob | None]


class Token(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One sampled token. An end-of-sequence or stop token has the `finish_reason` "stop" and is not part of the text.

    The last token of a step has the number of proposed tokens that were rejected.
    """

    request_id: str
    token_id: int
    index: int = 0  # which of the n answers
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    is_proposed: bool = False
    num_rejected: int = 0


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The end of an answer that has no last token: max_tokens was 0, or it was aborted or failed with `error`.

    `param` is the request's field that caused the error, empty if none did. `is_temporary`: a repeated request may succeed.
    """

    request_id: str
    finish_reason: FinishReason
    index: int = 0
    error: str = ""
    param: str = ""
    is_temporary: bool = False


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent after the prompt's first step, for `usage` and the queue-time histogram."""

    request_id: str
    queue_seconds: float
    cached_tokens: int = 0
    media_encoded: int = 0
    media_cached: int = 0


class Encoded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent after a step that encoded frames for a request, with the seconds of the whole step, if requests are traced."""

    request_id: str
    num_frames: int
    seconds: float


class Scored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The log-probabilities of candidates; the other fields are those of `Admitted`.

    `logprobs[c][t]` is for token t of candidate c, given the prompt and the candidate's tokens before it.
    """

    request_id: str
    logprobs: list[list[float]]
    queue_seconds: float = 0.0
    cached_tokens: int = 0
    media_encoded: int = 0
    media_cached: int = 0


class Embedded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Vectors, float32 [N, D], one per media item or text of the request, in order; those of texts have length one.

    Each media item of the request is counted once: as encoded for it, or as cached.
    """

    request_id: str
    shape: tuple[int, int]
    data: bytes
    media_encoded: int = 0
    media_cached: int = 0


class Gates(msgspec.Struct, frozen=True, kw_only=True):
    """The openness of a gated layer: tanh of its gates, or the mean absolute value of a vector gate."""

    layer: int
    attention: float
    feed_forward: float


class AttentionMap(msgspec.Struct, frozen=True, kw_only=True):
    """A token's attention in `layers`, mean over them and their heads.

    `visual_tokens` [R] is the attention to each visual token, and `data`, float32 [F, h, w], the same mapped to the
    patches of each frame. Both sum to one.
    """

    layers: list[int]
    visual_tokens: list[float]
    shape: tuple[int, int, int]
    data: bytes


class Inspected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`maps` has one entry per requested layer, or one for all layers; none if the token reads no media."""

    request_id: str
    gates: list[Gates]
    maps: list[AttentionMap]


class MediaWanted(msgspec.Struct, frozen=True, tag=True):
    """Requests the pixels of a media item, once; `MediaPixels` or `MediaFailed` answers."""

    digest: bytes


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent once, when weights are loaded and everything is compiled. `/version` shows `info`."""

    info: dict[str, Any]


class StartRefused(msgspec.Struct, frozen=True, tag=True):
    """Sent instead of `Ready` if the settings or the model cannot work; the message names the setting."""

    message: str


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The counts of the engine by metric name, sent about twice a second; `Measures` describes the histograms."""

    gauges: dict[str, float]
    histograms: dict[str, dict[str, list[float]]] = {}
    last_step_age: float


class Pin(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A hint, without a reply, to keep media on the device, within the quota of pins, or to release them.

    The same goes for the prefix and the shots of prompts whose shots attend alone.
    """

    digests: list[bytes]
    is_kept: bool
    prompts: list[EncodedPrompt] = []


Request = Generate | Score | Embed | EmbedText | Inspect
# events of a `Generate`; `Finished` with "error" may answer any request
Event = Admitted | PromptScored | Token | Finished
# the single replies to other requests
Reply = Scored | Embedded | Inspected
Inbound = Request | Abort | MediaPixels | MediaFailed | Pin
Outbound = Event | Reply | MediaWanted | Encoded | Ready | StartRefused | Beat

encode = msgspec.msgpack.Encoder().encode
decode_inbound: msgspec.msgpack.Decoder[Inbound] = msgspec.msgpack.Decoder(Inbound)
decode_outbound: msgspec.msgpack.Decoder[Outbound] = msgspec.msgpack.Decoder(Outbound)
