"""An attack that is refused leaves a normal client alone, and a session that ends closes every connection of its attack."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from bench.attacks.__main__ import ATTACKS, Range
from bench.attacks.attack import Attack, Session, repeated
from bench.attacks.bystander import Series
from bench.attacks.connections import BOTH_LENGTHS
from bench.attacks.media import bomb
from bench.target import Answer, Target, text_request
from model.media import MediaLimits, load_image


def test_attacks_have_names_of_their_own() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(names) == len(set(names)) > 30
    assert ATTACKS[0].severity == "critical"


def test_a_refused_attack_meets_the_bounds_and_a_served_one_that_must_be_refused_does_not(target: Target) -> None:
    options = argparse.Namespace(count=2, max_seconds=20.0)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        attacks = Range(target, options, pool)
        refused = attacks.run(
            Attack(name="no", severity="low", run=repeated(lambda: text_request(-1)), is_refused=True)
        )
        served = attacks.run(Attack(name="yes", severity="low", run=repeated(lambda: text_request(1)), is_refused=True))
    assert refused.has_survived
    assert {"worker", "refusal", "accepted"}.isdisjoint(refused.missed())
    assert "accepted" in served.missed()
    row = refused.row()
    assert row["survived"] == "yes"
    assert "400" in str(row["its answers"])
    assert len(refused.attacked.series["text", 0].seconds) == len(refused.attacked.series["image", 1].seconds) == 2


def test_a_session_that_ends_closes_what_it_holds(target: Target) -> None:
    session = Session(target, "127.0.0.1")
    holder = threading.Thread(target=session.send, args=(text_request(1000, n=4, temperature=1.0),))
    holder.start()
    time.sleep(0.1)
    connection = session.connect(b"POST ")
    session.end()
    holder.join(10)
    assert not holder.is_alive()
    assert session.answers == []
    assert connection is not None
    assert connection.recv(1) == b""
    connection.close()


def test_a_failed_request_counts_as_the_longest() -> None:
    series = Series()
    series.add(Answer(status=200, seconds=0.5))
    series.add(Answer(status=503, seconds=0.01))
    assert series.percentile(95) == 60.0
    assert series.failures == ["503"]


def test_a_bomb_is_small_and_declares_much() -> None:
    data = bomb(900)
    assert len(data) < 700
    assert data != bomb(900)
    with pytest.raises(ValueError, match="900 x 900"):
        load_image(data, MediaLimits(max_pixels=900 * 900 - 1))


def test_the_bodies_of_an_ambiguous_request_differ_in_length() -> None:
    head, _, body = BOTH_LENGTHS.partition(b"\r\n\r\n")
    size, _, chunk = body.partition(b"\r\n")
    assert b"Content-Length: 4\r\nTransfer-Encoding: chunked" in head
    assert json.loads(chunk[: int(size, 16)]) == {"prompt": "a", "max_tokens": 1}
