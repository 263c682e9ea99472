"""Short forms of the fuzzers: few inputs of fixed seeds, none of which ends a process."""

from __future__ import annotations

from bench.fuzz import bodies, checkpoints, grammars, media, wire
from bench.fuzz.isolated import rng_of
from bench.fuzz.mutation import mutate, mutate_json
from bench.target import Answer, Target

SAMPLE = b"0123456789" * 20


def test_an_input_is_determined_by_its_seed_and_number() -> None:
    inputs = [mutate(SAMPLE, rng_of(1, number)) for number in range(50)]
    assert inputs == [mutate(SAMPLE, rng_of(1, number)) for number in range(50)]
    assert len(set(inputs)) > 40
    assert inputs != [mutate(SAMPLE, rng_of(2, number)) for number in range(50)]


def test_a_mutated_value_leaves_the_original() -> None:
    value = {"a": [1, {"b": "c"}]}
    mutated = {mutate_json(value, rng_of(0, number)) for number in range(200)}
    assert len(mutated) > 100
    assert value == {"a": [1, {"b": "c"}]}


def test_mutated_messages_fail_only_with_errors_of_the_codec() -> None:
    attempt = wire.make()
    assert [failure for number in range(3000) if (failure := attempt(rng_of(0, number)))] == []


def test_mutated_model_folders_load_or_are_refused_by_name() -> None:
    attempt = checkpoints.make()
    assert [failure for number in range(300) if (failure := attempt(rng_of(0, number)))] == []


def test_mutated_grammars_compile_or_are_refused() -> None:
    attempt = grammars.make()
    assert [failure for number in range(300) if (failure := attempt(rng_of(0, number)))] == []


def test_mutated_media_are_decoded_or_refused_by_the_same_process() -> None:
    tally = media.run(600, 0)
    assert tally.num_inputs == 600
    assert (tally.num_ends, tally.counts) == (0, {})


def test_mutated_bodies_are_served_or_refused_clearly(target: Target) -> None:
    tally = bodies.run(target, 150, 0)
    assert tally.num_inputs == 150
    assert (tally.num_ends, tally.counts) == (0, {})


def test_an_answer_that_names_no_error_or_shows_an_address_is_a_fault() -> None:
    def answer(status: int, body: bytes) -> Answer:
        return Answer(status=status, seconds=0.0, body=body)

    assert bodies.fault(answer(200, b"")) is None
    assert bodies.fault(answer(400, b'{"error":{"message":"no","code":"no"}}')) is None
    assert bodies.fault(answer(500, b'{"error":{"message":"no","code":"no"}}')) is not None
    assert bodies.fault(answer(400, b"no")) is not None
    assert bodies.fault(answer(400, b'{"error":{"message":"<X at 0x7fc9a4901300>","code":"no"}}')) is not None
    assert bodies.fault(answer(503, b'{"error":{"message":"no","code":"no"}}')) is not None
