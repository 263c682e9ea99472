"""Decodes mutated messages of the two internal protocols: worker and API process, decode process and API process.

A message must decode to a message of its type, or fail with an error of the codec.
"""

from __future__ import annotations

import random

import msgspec

from bench.fuzz.isolated import Try
from bench.fuzz.mutation import mutate
from model.prompt import EncodedPrompt
from server import wire
from server.media import decoder

DIGEST = bytes(range(32))
PROMPT = EncodedPrompt(token_ids=[1, 2, 3], media_index=[-1, 0, 0], media=[DIGEST])
LOGPROB = wire.TokenLogprob(3, -0.5, [(1, -0.5), (2, -1.5)])
INBOUND: tuple[wire.Inbound, ...] = (
    wire.Generate(
        request_id="a",
        prompt=PROMPT,
        sampling=wire.Sampling(max_tokens=3, logit_bias={3: 0.5}, grammar=wire.Grammar(kind="regex", text="a+")),
    ),
    wire.Score(request_id="b", prompt=PROMPT, candidates=[[1], [2, 3]]),
    wire.Embed(request_id="c", media=[DIGEST]),
    wire.EmbedText(request_id="d", texts=[[1, 2]]),
    wire.Inspect(request_id="e", prompt=PROMPT, token=1),
    wire.Abort("f", 1),
    wire.MediaPixels(digest=DIGEST, shape=(1, 2, 2, 3), data=bytes(12)),
    wire.MediaFailed(digest=DIGEST, message="no"),
    wire.Pin(digests=[DIGEST], is_kept=True),
)
OUTBOUND: tuple[wire.Outbound, ...] = (
    wire.Token(request_id="a", token_id=3, logprob=LOGPROB, finish_reason="stop"),
    wire.Finished(request_id="a", finish_reason="error", error="no"),
    wire.Admitted(request_id="a", queue_seconds=0.5),
    wire.PromptScored(request_id="a", logprobs=[None, LOGPROB]),
    wire.Scored(request_id="a", logprobs=[[-0.5]]),
    wire.Embedded(request_id="a", shape=(1, 2), data=bytes(8)),
    wire.Inspected(request_id="a", gates=[wire.Gates(layer=1, attention=0.5, feed_forward=0.5)], maps=[]),
    wire.MediaWanted(DIGEST),
    wire.Ready(info={"pid": 1}),
    wire.Beat(gauges={"a": 1.0}, last_step_age=0.0),
)
DECODING: tuple[msgspec.Struct, ...] = (
    decoder.Setup(vision={"a": 1}, limits={"b": 2.0}, max_memory_bytes=1, max_seconds=1.0),
    decoder.Decode(kind="image", data=b"abc"),
    decoder.Frames(shape=(1, 1, 1, 3), data=b"abc", size=(1, 1)),
    decoder.Refused(message="no"),
)


def make() -> Try:
    samples = [wire.encode(message) for message in (*INBOUND, *OUTBOUND, *DECODING)]
    codecs = (
        *(wire.decode_inbound, wire.decode_outbound),
        *(decoder.decode_setup, decoder.decode_request, decoder.decode_reply),
    )

    def attempt(rng: random.Random) -> str | None:
        data = mutate(rng.choice(samples), rng, samples)
        for codec in codecs:
            try:
                codec.decode(data)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
            except Exception as error:
                return f"{type(error).__name__} instead of an error of the codec: {str(error)[:80]}"
        return None

    return attempt
