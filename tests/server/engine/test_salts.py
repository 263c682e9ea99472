"""Salts: prompts with different ones share no block, no page, no vector and no grammar; those with the same share all."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from server.engine_client.salt import add_salt, salted
from server.wire import Embed, Generate, Grammar, Inspect, Pin, Request, Sampling, Score
from tests.engine_client import FEW_SHOT, GREEDY, IMAGES, Client, Prompt, assert_equals_reference, client, source
from tests.tiny_models import FAMILIES, Family

TEXT = Prompt(((-1, 21),))
RED, BLUE = add_salt(b"", "tenant", "red"), add_salt(b"", "tenant", "blue")


def ask(engine: Client, request_id: str, prompt: Prompt, salt: bytes) -> None:
    """Run a request with a salt, whose media are supplied under their salted sources."""
    engine.images |= {name[:32] + salt: frames for name, frames in IMAGES.items()}
    engine.engine.add(salted(prompt.request(request_id), salt))
    engine.run()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("salts", [(RED, BLUE), (b"", RED), (RED, b"")])
def test_prompts_with_different_salts_share_nothing(family: Family, salts: tuple[bytes, bytes]) -> None:
    engine = client(family)
    for name, salt in zip(("first", "second"), salts, strict=True):
        ask(engine, name, FEW_SHOT, salt)
        assert (engine.admitted[name].cached_tokens, engine.admitted[name].media_cached) == (0, 0)
        assert engine.admitted[name].media_encoded == 4
        assert_equals_reference(family, FEW_SHOT, engine, name)


@pytest.mark.parametrize("salt", [b"", RED])
def test_prompts_with_the_same_salt_share_all(salt: bytes) -> None:
    engine = client("openflamingo")
    ask(engine, "first", FEW_SHOT, salt)
    ask(engine, "second", FEW_SHOT, salt)
    assert engine.admitted["second"].cached_tokens > 0
    assert (engine.admitted["second"].media_encoded, engine.admitted["second"].media_cached) == (0, 4)
    assert len(engine.requested) == 4


def test_two_encodings_of_an_image_share_a_page_within_a_salt() -> None:
    engine = client("openflamingo")
    ask(engine, "first", FEW_SHOT, RED)
    again = salted(FEW_SHOT.request("second", encoding=1), RED)
    engine.engine.add(again)
    engine.run()
    assert (engine.admitted["second"].media_encoded, len(engine.requested)) == (0, 8)


def test_text_alone_is_not_shared() -> None:
    engine = client("openflamingo")
    for name, salt in (("first", RED), ("second", BLUE), ("third", BLUE)):
        ask(engine, name, TEXT, salt)
    cached = [engine.admitted[name].cached_tokens for name in ("first", "second", "third")]
    assert cached == [0, 0, 20]


def test_the_blocks_in_progress_of_another_salt_are_not_awaited() -> None:
    engine = client("openflamingo")
    for name, salt in (("first", RED), ("second", BLUE)):
        engine.engine.add(salted(TEXT.request(name), salt))
    engine.step()
    assert {"first", "second"} <= engine.admitted.keys()
    engine.run()
    assert engine.admitted["second"].cached_tokens == 0


def test_vectors_are_not_shared() -> None:
    engine = client("openflamingo")
    engine.images |= {name[:32] + salt: frames for name, frames in IMAGES.items() for salt in (RED, BLUE)}
    for name, salt in (("first", RED), ("second", BLUE), ("third", RED)):
        engine.engine.add(salted(Embed(request_id=name, media=[source(1)]), salt))
        engine.run()
    assert engine.requested == [source(1) + RED, source(1) + BLUE]
    np.testing.assert_array_equal(engine.embedded["first"], engine.embedded["second"])


def test_grammars_are_not_shared() -> None:
    engine = client("openflamingo")
    sampling = Sampling(max_tokens=4, temperature=0.0, grammar=Grammar(kind="regex", text="a+"))
    for name, salt in (("first", RED), ("second", BLUE), ("third", RED)):
        engine.engine.add(salted(TEXT.request(name, sampling), salt))
        engine.run()
    assert [salt for salt, _ in engine.engine.grammars._compiled] == [BLUE, RED]


def test_a_pin_is_of_one_salt() -> None:
    engine = client("openflamingo")
    ask(engine, "first", FEW_SHOT, RED)
    engine.engine.pin(Pin(digests=[source(0) + BLUE], is_kept=True))
    assert engine.engine.media.slots.num_pinned == 0
    engine.engine.pin(Pin(digests=[source(0) + RED], is_kept=True))
    assert engine.engine.media.slots.num_pinned == 1


@pytest.mark.parametrize("kind", [Generate, Score, Inspect])
def test_a_salt_is_part_of_the_prompt_and_of_its_media(kind: type[Request]) -> None:
    prompt = FEW_SHOT.request("").prompt
    requests: dict[type, Request] = {
        Generate: Generate(request_id="1", prompt=prompt, sampling=GREEDY),
        Score: Score(request_id="1", prompt=prompt, candidates=[[1]]),
        Inspect: Inspect(request_id="1", prompt=prompt, token=0),
    }
    request = requests[kind]
    salted_prompt = replace(prompt, media=[name + RED for name in prompt.media], salt=RED)
    assert salted(request, RED) == msgspec.structs.replace(request, prompt=salted_prompt)
    assert salted(request, b"") == request


def test_shots_that_attend_alone_are_not_shared() -> None:
    engine = client("openflamingo")
    for name, salt in (("first", RED), ("second", BLUE), ("third", BLUE)):
        engine.images |= {name[:32] + salt: frames for name, frames in IMAGES.items()}
        request = FEW_SHOT.request(name)
        alone = replace(request.prompt, shots_attend="alone")
        engine.engine.add(salted(msgspec.structs.replace(request, prompt=alone), salt))
        engine.run()
    cached = [engine.admitted[name].cached_tokens for name in ("first", "second", "third")]
    assert cached[:2] == [0, 0]
    assert cached[2] > 0
