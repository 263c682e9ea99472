"""The wire between the API process and the worker: typed messages (msgspec over ZeroMQ `ipc://` sockets), never pickle.

To the worker go token ids, media digests and sampling parameters; back come token events, and `MediaWanted` for what
the worker does not hold: only then are bytes decoded and pixels sent. A hit needs no pixels; a miss is never an error.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from model.prompt import EncodedPrompt

WORKER_MODULE = "server.engine.worker"
ENGINE_FACTORY = "server.engine.build:build"
MAX_MESSAGE_BYTES = 256 * 2**20

FinishReason = Literal["stop", "length", "abort", "error"]


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of the worker's input. `factory`, as `module:function`, builds the engine and its `Ready.info` from
    settings; the worker connects to the socket at `address`."""

    factory: str
    address: str
    settings: str


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """The form an answer must have: one of `choices`, or `text` as a regular expression or a JSON schema."""

    kind: Literal["choice", "regex", "json"]
    choices: tuple[str, ...] = ()
    text: str = ""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when to stop; `temperature` 0 is greedy. Stop strings live in the API."""

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
    # number of most likely tokens to report beside each sampled (or prompt) token; None: no log-probabilities
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    # independent answers to one prompt, or the best of a beam search
    n: int = 1
    # 0: no beam search
    beam_width: int = 0
    length_penalty: float = 1.0
    early_stopping: bool = False
    grammar: Grammar | None = None


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One prompt to prefill and `sampling.n` answers to decode. The prompt's media are 32-byte digests."""

    request_id: str
    prompt: EncodedPrompt
    sampling: Sampling
    priority: int = 0
    arrived: float = 0.0


class Score(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One prompt, as in `Generate`, and token ids that may follow it: what is the log-probability of each? No candidate
    is empty."""

    request_id: str
    prompt: EncodedPrompt
    candidates: list[list[int]]
    priority: int = 0
    arrived: float = 0.0


class Embed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Media whose pooled features are wanted, by 32-byte digest."""

    request_id: str
    media: list[bytes]


class EmbedText(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Texts, as token ids, whose pooled hidden states are wanted. None is empty."""

    request_id: str
    texts: list[list[int]]


class Inspect(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A prompt with its answer, as in `Generate`: what does the token at position `token` read of its media? `layers`
    are gated layers by the language-model layer behind them; empty: the mean over all of them."""

    request_id: str
    prompt: EncodedPrompt
    token: int
    layers: list[int] = []


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request, or, with `index`, one of its answers."""

    request_id: str
    index: int | None = None


class MediaPixels(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Frames of one media, resized, not yet normalised: uint8 RGB of shape [F, h, w, 3]."""

    digest: bytes
    shape: tuple[int, int, int, int]
    data: bytes


class MediaFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The API could not produce a wanted media: the requests that wait for it fail, and no other."""

    digest: bytes
    message: str


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class PromptScored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Log-probabilities of the prompt's tokens given all before them; the first token has none."""

    request_id: str
    logprobs: list[TokenLogprob | None]


class Token(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One sampled token. An end-of-sequence or stop token arrives with `finish_reason` "stop" set, not to be shown."""

    request_id: str
    token_id: int
    index: int = 0  # which of the n answers
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A sequence that ended without a last token: max_tokens 0, aborted, or failed with `error`."""

    request_id: str
    finish_reason: FinishReason
    index: int = 0
    error: str = ""


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent when the prompt's first step begins: what was cached, for `usage` and the queue-time histogram."""

    request_id: str
    queue_seconds: float
    cached_tokens: int = 0
    media_encoded: int = 0
    media_cached: int = 0


class Scored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`logprobs[c][t]` is that of token t of candidate c, given the prompt and the candidate's tokens before it; the
    rest is as in `Admitted`."""

    request_id: str
    logprobs: list[list[float]]
    queue_seconds: float = 0.0
    cached_tokens: int = 0
    media_encoded: int = 0
    media_cached: int = 0


class Embedded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Vectors of length one: float32 [N, D], one for each media or text asked for, in order."""

    request_id: str
    shape: tuple[int, int]
    data: bytes


class Gates(msgspec.Struct, frozen=True, kw_only=True):
    """How far a gated layer is open: tanh of its gates, of a vector gate the mean absolute value."""

    layer: int
    attention: float
    feed_forward: float


class AttentionMap(msgspec.Struct, frozen=True, kw_only=True):
    """What a token reads in `layers` (mean over them and their heads): `visual_tokens` [R], and `data`, the same carried
    back to the patches of each frame, float32 [F, h, w]. Both sum to one."""

    layers: list[int]
    visual_tokens: list[float]
    shape: tuple[int, int, int]
    data: bytes


class Inspected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`maps` has one for each layer asked for, or one for all; none where the token reads no media."""

    request_id: str
    gates: list[Gates]
    maps: list[AttentionMap]


class MediaWanted(msgspec.Struct, frozen=True, tag=True):
    digest: bytes


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent once, when weights are loaded and everything is compiled. `info` is what `/version` shows."""

    info: dict[str, Any]


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent about once a second and after a step that changed them: gauges and counters, by metric name."""

    gauges: dict[str, float]
    last_step_age: float


class Pin(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Keep these media on the device, as far as the quota of pins goes, or let them go again. A hint: nothing answers."""

    digests: list[bytes]
    is_kept: bool


Request = Generate | Score | Embed | EmbedText | Inspect
# what a `Generate` brings about; `Finished` with "error" may answer any request
Event = Admitted | PromptScored | Token | Finished
# what answers the others, whole
Reply = Scored | Embedded | Inspected
Inbound = Request | Abort | MediaPixels | MediaFailed | Pin
Outbound = Event | Reply | MediaWanted | Ready | Beat

encode = msgspec.msgpack.Encoder().encode
decode_inbound: msgspec.msgpack.Decoder[Inbound] = msgspec.msgpack.Decoder(Inbound)
decode_outbound: msgspec.msgpack.Decoder[Outbound] = msgspec.msgpack.Decoder(Outbound)
