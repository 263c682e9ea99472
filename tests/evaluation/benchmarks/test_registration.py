"""Support sets of examples: those that cannot be used are replaced, and a complete set is used again."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from evaluation.benchmarks import attempts
from evaluation.benchmarks.benchmark import load
from evaluation.benchmarks.data import BenchmarkData
from evaluation.benchmarks.registration import Registered, Registration
from flamboyance_client import AsyncClient, BadRequest, Conflict, ServerFault
from tests.evaluation.benchmarks.official_files import WRITERS, write_image, write_json
from tests.evaluation.benchmarks.scripted_server import EXAMPLES, Body, ScriptedServer, error


def register(
    server: ScriptedServer, name: str, folder: Path, num_examples: int | None = None
) -> tuple[Registered, list[str]]:
    """Register the examples of a benchmark, and return the set and the messages about unusable examples."""
    messages: list[str] = []
    counts: list[int] = []

    async def run() -> Registered:
        data = BenchmarkData(load(name), folder)
        async with AsyncClient(transport=httpx.MockTransport(server)) as client:
            registration = Registration(client, load(name), counts.append, messages.append)
            return await registration.register(partial(data.support, num_examples, 0))

    registered = asyncio.run(run())
    assert sum(counts) in (0, len(stored(server, registered)))
    return registered, messages


def stored(server: ScriptedServer, registered: Registered) -> dict[str, Body]:
    examples: dict[str, Body] = server.sets[registered.support_set.id]["examples"]
    return examples


def refuses_second_example(route: str, number: int, body: Body) -> httpx.Response | None:
    """Refuse the second example of the first batch."""
    if route == EXAMPLES and number == 1:
        return error(400, "it is no image", param="examples[1].image", code="invalid_media")
    return None


def written_memes(folder: Path) -> Path:
    WRITERS["hateful_memes"](folder)
    return folder


def test_the_next_row_replaces_an_example_that_the_server_refuses(tmp_path: Path) -> None:
    server = ScriptedServer(refuses_second_example)
    items = BenchmarkData(load("hateful_memes"), written_memes(tmp_path)).support(3, 0)
    registered, messages = register(server, "hateful_memes", tmp_path, num_examples=3)
    assert registered.num_left_out == 1
    assert len(stored(server, registered)) == 3
    (message,) = messages
    assert message.startswith(f"{items[1].row.where}, an example that is left out: ")
    assert f"{items[1].media}: it is no image" in message
    again, messages = register(server, "hateful_memes", tmp_path, num_examples=3)
    assert (again.support_set.id, again.digest, again.num_left_out) == ("ss_1", registered.digest, 1)
    assert messages == []


def test_examples_are_fewer_if_no_row_is_left(tmp_path: Path) -> None:
    server = ScriptedServer(refuses_second_example)
    registered, _ = register(server, "hateful_memes", written_memes(tmp_path))
    assert (registered.num_left_out, len(stored(server, registered))) == (1, 3)
    complete, _ = register(ScriptedServer(), "hateful_memes", tmp_path)
    assert complete.digest != registered.digest


def test_a_replacement_has_the_same_label_if_examples_are_counted_per_label(tmp_path: Path) -> None:
    WRITERS["imagenet"](tmp_path)
    for number in range(9):
        write_image(tmp_path / "train" / "n01440764" / f"more{number}.JPEG", number)
    server = ScriptedServer(refuses_second_example)
    registered, _ = register(server, "imagenet", tmp_path)
    labels = [example["label"] for example in stored(server, registered).values()]
    assert sorted(labels) in (["goldfish", *["tench"] * 5], ["tench"] * 5)


def test_a_segment_after_the_end_of_its_video_is_left_out(tmp_path: Path) -> None:
    WRITERS["youcook2"](tmp_path)
    path = tmp_path / "youcookii_annotations_trainval.json"
    values = json.loads(path.read_text())
    values["database"]["cook0"]["annotations"][1]["segment"] = [90, 99]
    write_json(path, values)
    server = ScriptedServer()
    registered, (message,) = register(server, "youcook2", tmp_path)
    assert (registered.num_left_out, len(stored(server, registered))) == (1, 1)
    assert "video cook0, row 2, an example that is left out: " in message
    assert "has no frame from 90 to 99 s" in message


def test_a_video_that_cannot_be_decoded_is_left_out(tmp_path: Path) -> None:
    WRITERS["msvdqa"](tmp_path)
    (tmp_path / "video" / "vid1.avi").write_bytes(b"RIFF")
    _, (message,) = register(ScriptedServer(), "msvdqa", tmp_path)
    assert "vid1.avi" in message


def test_text_that_is_not_unicode_is_left_out(tmp_path: Path) -> None:
    path = written_memes(tmp_path) / "train.jsonl"
    path.write_text(path.read_text().replace("nice", "\\ud83d", 1))
    _, (message,) = register(ScriptedServer(), "hateful_memes", tmp_path)
    assert "train.jsonl, row 1, an example that is left out: the text is not Unicode" in message


def test_an_example_that_is_larger_than_a_request_may_be_is_left_out(tmp_path: Path) -> None:
    def script(route: str, number: int, body: Body) -> httpx.Response | None:
        is_large = route == EXAMPLES and number == 1
        return error(413, "the body is larger than 1 MiB", code="body_too_large") if is_large else None

    registered, (message,) = register(ScriptedServer(script), "hateful_memes", written_memes(tmp_path), 1)
    assert registered.num_left_out == 1
    assert "the body is larger" in message


def test_another_error_of_a_batch_ends_the_run(tmp_path: Path) -> None:
    server = ScriptedServer(lambda route, *_: error(400, "no more examples") if route == EXAMPLES else None)
    with pytest.raises(BadRequest, match="no more examples"):
        register(server, "hateful_memes", written_memes(tmp_path))


def test_examples_that_are_all_refused_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.benchmarks.registration.MAX_FIRST_UNUSABLE", 2)
    refusal: dict[str, Any] = {"param": "examples[0].image", "code": "invalid_media"}
    server = ScriptedServer(lambda route, *_: error(400, "it is no image", **refusal) if route == EXAMPLES else None)
    with pytest.raises(BadRequest, match="it is no image"):
        register(server, "hateful_memes", written_memes(tmp_path))
    assert server.counts[EXAMPLES] == 2


def test_a_set_that_was_changed_is_registered_again(tmp_path: Path) -> None:
    server = ScriptedServer()
    first, _ = register(server, "hateful_memes", written_memes(tmp_path))
    changed = server.sets[first.support_set.id]
    changed["examples"].popitem()
    changed["version"] += 1
    second, _ = register(server, "hateful_memes", tmp_path)
    assert second.support_set.id != first.support_set.id
    assert len(stored(server, second)) == 4
    assert changed["name"] is None
    assert register(server, "hateful_memes", tmp_path)[0].support_set.id == second.support_set.id


def test_two_runs_at_the_same_time_use_the_set_of_the_first(tmp_path: Path) -> None:
    """The first run names its set while the second one stores its examples."""
    written_memes(tmp_path)
    server = ScriptedServer()
    firsts: list[Registered] = []

    def script(route: str, number: int, body: Body) -> httpx.Response | None:
        if route == EXAMPLES and not firsts:
            server.script = lambda *_: None
            firsts.append(_register_in_thread(server, tmp_path))
        return None

    server.script = script
    second, _ = register(server, "hateful_memes", tmp_path)
    assert second.support_set.id == firsts[0].support_set.id
    assert list(server.sets) == [second.support_set.id]


def _register_in_thread(server: ScriptedServer, folder: Path) -> Registered:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: register(server, "hateful_memes", folder)[0]).result()


def test_a_name_that_a_changed_set_takes_meanwhile_is_an_error(tmp_path: Path) -> None:
    conflict: dict[str, Any] = {"code": "name_taken"}
    server = ScriptedServer(lambda route, *_: error(409, "taken", **conflict) if route.startswith("PATCH") else None)
    with pytest.raises(Conflict):
        register(server, "hateful_memes", written_memes(tmp_path))


def test_examples_are_stored_after_a_lost_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "DELAYS", (0.0, 0.0))

    def script(route: str, number: int, body: Body) -> httpx.Response | None:
        if route == EXAMPLES and number == 1:
            raise httpx.ReadError("reset")
        return error(502, "bad gateway") if route == EXAMPLES and number == 2 else None

    server = ScriptedServer(script)
    registered, _ = register(server, "hateful_memes", written_memes(tmp_path))
    assert len(stored(server, registered)) == 4


def test_a_set_that_cannot_be_finished_is_deleted(tmp_path: Path) -> None:
    server = ScriptedServer(lambda route, number, body: error(500, "no") if route == EXAMPLES else None)
    with pytest.raises(ServerFault):
        register(server, "hateful_memes", written_memes(tmp_path))
    assert server.sets == {}
