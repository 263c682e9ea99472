"""The memory of sequences: a prompt begins with the blocks that are cached, up to the first that is missing."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from model.prompt import EncodedPrompt
from server.engine.caches.blocks import BlockPool
from server.engine.caches.media import MediaCache
from server.engine.caches.memory import Cached, Memory
from server.engine.sequence import QueueOrder, Sequence
from server.engine.shares import Account, ClientAccount
from tests.engine_client import CONFIG, GREEDY, Prompt, client
from tests.engine_simulation import Simulation
from tests.tiny_models import CONFIGS


def test_a_cached_prefix_ends_before_the_first_block_that_is_missing() -> None:
    blocks = BlockPool(4)
    memory = Memory(CONFIG, blocks, MediaCache(1, 0, b""), CONFIGS["flamingo"])
    sequence = Sequence("a", Prompt(((-1, 4 * CONFIG.block_size),)).request("a").prompt, GREEDY, QueueOrder())
    taken = blocks.allocate(3)
    assert taken is not None
    for number in (0, 2):
        blocks.publish(taken[number], sequence.block_hash(number, CONFIG.block_size))
    assert memory.find_cached(sequence).blocks == taken[:1]
    blocks.publish(taken[1], sequence.block_hash(1, CONFIG.block_size))
    assert memory.find_cached(sequence).blocks == taken


def test_a_prompt_that_waits_looks_only_for_blocks_that_were_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each step, many long prompts may wait for blocks that another one computes."""
    blocks, size = BlockPool(8), CONFIG.block_size
    memory = Memory(CONFIG, blocks, MediaCache(1, 0, b""), CONFIGS["flamingo"])
    sequence = Sequence("a", Prompt(((-1, 8 * size),)).request("a").prompt, GREEDY, QueueOrder())
    hashes = [sequence.block_hash(number, size) for number in range(7)]
    taken = blocks.allocate(7)
    assert taken is not None
    sought, find = list[bytes](), blocks.find

    def note(digest: bytes) -> int | None:
        sought.append(digest)
        return find(digest)

    monkeypatch.setattr(blocks, "find", note)
    for number, (block, digest) in enumerate(zip(taken, hashes, strict=True)):
        assert memory.look_for_cached(sequence) == [digest]
        assert sequence.num_missing == len(sequence.token_ids) - number * size
        blocks.publish(block, digest)
    assert memory.look_for_cached(sequence) == []
    assert len(sought) <= 3 * len(hashes) + 1
    assert sequence.num_missing == len(sequence.token_ids) - memory.find_cached(sequence).num_tokens


def test_shots_that_attend_alone_are_looked_for_again_once_another_prompt_computes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Memory(CONFIG, BlockPool(4), MediaCache(1, 0, b""), CONFIGS["flamingo"])
    sequence = Sequence("a", Prompt(((-1, 9),)).request("a").prompt, GREEDY, QueueOrder())
    sequence.account = Account(ClientAccount())
    monkeypatch.setattr(sequence, "layout", object())
    monkeypatch.setattr(memory, "find_cached", lambda sequence: Cached([], 4, [b"shot"]))
    assert not memory.awaits(sequence, {})
    assert sequence.num_missing == len(sequence.token_ids) - 4
    assert memory.awaits(sequence, {b"shot": 0})
    assert sequence.num_missing is None


def test_blocks_that_are_evicted_while_a_prompt_waits_are_missing() -> None:
    blocks, size = BlockPool(4), CONFIG.block_size
    memory = Memory(CONFIG, blocks, MediaCache(1, 0, b""), CONFIGS["flamingo"])
    sequence = Sequence("a", Prompt(((-1, 4 * size),)).request("a").prompt, GREEDY, QueueOrder())
    taken = blocks.allocate(3)
    assert taken is not None
    for number, block in enumerate(taken):
        blocks.publish(block, sequence.block_hash(number, size))
    assert memory.look_for_cached(sequence) == []
    blocks.release(taken)
    assert blocks.allocate(3) is not None  # one of them was free
    assert memory.look_for_cached(sequence) == [sequence.block_hash(1, size)]
    assert sequence.num_missing == len(sequence.token_ids) - size


@pytest.mark.parametrize("max_tokens_per_step", [5, 6, 24])
def test_blocks_that_are_computed_in_several_steps_are_cached(max_tokens_per_step: int) -> None:
    answer = client("flamingo", replace(CONFIG, max_tokens_per_step=max_tokens_per_step))
    prompt = Prompt(((0, 9), (1, 10)))
    for name in ("first", "again"):
        answer.engine.add(prompt.request(name))
        answer.run()
    num_tokens = len(prompt.request("first").prompt.token_ids)
    assert answer.admitted["again"].cached_tokens == (num_tokens - 1) // CONFIG.block_size * CONFIG.block_size


def test_the_blocks_of_an_answer_are_cached_for_a_prompt_that_continues_it() -> None:
    answer, prompt = client("flamingo"), Prompt(((0, 9),)).request("first")
    answer.engine.add(prompt)
    answer.run()
    ids = answer.ids("first")
    token_ids, media_index = prompt.prompt.token_ids + ids, prompt.prompt.media_index + [0] * len(ids)
    longer = EncodedPrompt(token_ids=token_ids, media_index=media_index, media=prompt.prompt.media)
    answer.engine.add(msgspec.structs.replace(prompt, request_id="again", prompt=longer))
    answer.run()
    assert answer.admitted["again"].cached_tokens == (len(token_ids) - 1) // CONFIG.block_size * CONFIG.block_size


def test_a_block_that_is_taken_again_before_the_next_step_is_copied_to_once() -> None:
    """A beam forks, its request is aborted, and a candidate takes the beam's block: on a GPU two copies would race."""
    simulation = Simulation(replace(CONFIG, max_tokens_per_step=64))
    beams, scored = simulation.generate(18, max_tokens=9, beam_width=2), simulation.score(18, [3, 3])
    residents = simulation.engine.residents
    while not residents.copies:
        simulation.step()
    ((target, last_block),) = residents.copies.items()
    simulation.abort(beams)
    while residents.copies:
        simulation.step()
    sources = [source for source, to in simulation.runner.plans[-1].copies if to == target]
    assert len(sources) == 1
    assert sources != [last_block]
    simulation.run(scored)
