"""Runs two requests before the worker reports that it is ready, so that clients do not wait for compilation.

Meanwhile kernels are compiled, and libraries choose their algorithms. The requests run like any others: an image is
encoded, a prompt is computed and decoded, and a second prompt that shares its beginning is computed while the first
decodes.
"""

from __future__ import annotations

from model.prompt import EncodedPrompt
from server.engine.engine import Engine
from server.wire import Generate, MediaPixels, MediaWanted, Sampling

DIGEST = b"warm-up" + bytes(25)
NUM_PROMPT_TOKENS = 48
NUM_NEW_TOKENS = 4
MAX_STEPS = 200


def warm_up(engine: Engine, media_token_id: int, image_size: int) -> None:
    """Run the requests. The prefix cache is empty afterwards; the image keeps its slot until another one needs it."""
    length = min(NUM_PROMPT_TOKENS, engine.config.max_model_len - NUM_NEW_TOKENS)
    shape = (1, image_size, image_size, 3)
    pixels = MediaPixels(digest=DIGEST, shape=shape, data=bytes(image_size * image_size * 3))
    engine.add(_request("first", media_token_id, length))
    for step in range(MAX_STEPS):
        if not engine.has_work():
            break
        if step == 2:  # the first request decodes by now
            engine.add(_request("second", media_token_id, length))
        for event in engine.step():
            if isinstance(event, MediaWanted):
                engine.supply(pixels)
    engine.blocks.clear_cache()


def _request(name: str, media_token_id: int, length: int) -> Generate:
    """Return a request that differs from the other only in its last token."""
    token_ids = [media_token_id, *[0] * (length - 2), len(name) % 2]
    sampling = Sampling(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    return Generate(
        request_id=f"warm-up-{name}",
        prompt=EncodedPrompt(token_ids=token_ids, media_index=[0] * length, media=[DIGEST]),
        sampling=sampling,
    )
