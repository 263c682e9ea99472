"""Runs against a server that fails for a moment or for good, and runs without a score."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from evaluation.benchmarks import attempts
from evaluation.benchmarks.attempts import ServerLost
from evaluation.benchmarks.benchmark import load
from evaluation.benchmarks.report import Report
from evaluation.benchmarks.runner import RETRIES, Options, Patience, Run
from flamboyance_client import AsyncClient, BadRequest, NotAuthorised, Unavailable
from flamboyance_client.errors import Refusal
from tests.evaluation.benchmarks.official_files import WRITERS, write_image, write_json
from tests.evaluation.benchmarks.scripted_server import EXAMPLES, QUERIES, Body, Script, ScriptedServer, error


@pytest.fixture(autouse=True)
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the delays of retries, for which the tests do not wait."""
    waited: list[float] = []
    original, thread = asyncio.sleep, threading.get_ident()

    async def sleep(seconds: float) -> None:
        if threading.get_ident() != thread:  # of a server that other tests of this process have started
            await original(seconds)
            return
        waited.append(seconds)

    monkeypatch.setattr("evaluation.benchmarks.attempts.asyncio.sleep", sleep)
    return waited


def run(server: ScriptedServer, folder: Path, name: str = "coco", **options: Any) -> Report:
    if not (folder / "data").exists():
        WRITERS[name](folder / "data")
    benchmark = load(name)
    values: dict[str, Any] = {
        "data": folder / "data",
        "server": "http://test",
        "api_key": None,
        "out": folder / "out",
        "shots": (0,),
        "selection": "random",
        "wording": "paper",
        "split": benchmark.split,
        "support": None,
        "limit": None,
        "ensemble": False,
        "seed": 0,
        "concurrency": 1,
    }

    async def answered() -> Report:
        transport = httpx.MockTransport(server)
        async with AsyncClient(transport=transport, retries=RETRIES) as client:
            return await Run(benchmark, Options(**values | options), client).run()

    try:
        return asyncio.run(answered())
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def first(response: Script) -> Script:
    """Return a script whose response is to the first query alone."""
    return lambda route, number, body: response(route, number, body) if (route, number) == (QUERIES, 1) else None


def drop(route: str, number: int, body: Body) -> httpx.Response:
    raise httpx.RemoteProtocolError("the server disconnected")


def time_out(route: str, number: int, body: Body) -> httpx.Response:
    raise httpx.ReadTimeout("no reply")


@pytest.mark.parametrize(
    "fault",
    [
        drop,
        time_out,
        lambda *_: httpx.Response(200, content=b'{"choices":'),
        lambda *_: httpx.Response(200, json={"object": "list"}),
        lambda *_: httpx.Response(502, content=b"<html>bad gateway</html>"),
        lambda *_: error(429, "slow down", {"Retry-After": "60"}),
        lambda *_: error(503, "the engine starts"),
    ],
)
def test_a_query_is_sent_again_after_a_fault_that_may_pass(fault: Script, tmp_path: Path, delays: list[float]) -> None:
    server = ScriptedServer(first(fault))
    (result,) = run(server, tmp_path).results
    assert (result.num_answers, result.num_failed) == (2, 0)
    assert server.counts[QUERIES] == 3
    assert len(delays) == 1


def test_the_delay_that_the_server_states_is_waited_for(tmp_path: Path, delays: list[float]) -> None:
    run(ScriptedServer(first(lambda *_: error(429, "slow down", {"Retry-After": "600"}))), tmp_path)
    (delay,) = delays
    assert 600.0 <= delay <= 600.1


def test_a_long_delay_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    error = Unavailable(Refusal(message="busy", status=429, retry_after=3600.0))
    assert 3600.0 <= (Patience().delay(1, error) or 0) <= 3600.1
    assert "the next try is in 3600 s, as the server asks: 429: busy" in capsys.readouterr().err
    delays = [
        Patience().delay(tries, Unavailable(Refusal(message="busy", status=429, retry_after=9))) for tries in (9, 99)
    ]
    assert capsys.readouterr().err == ""
    assert all(delay is not None and 9 <= delay <= 14 for delay in delays)
    Patience().delay(100, Unavailable(Refusal(message="busy", status=429, retry_after=9)))
    assert "the next try is in 9 s" in capsys.readouterr().err


def test_a_query_is_sent_until_the_server_states_no_more_delays(tmp_path: Path, delays: list[float]) -> None:
    def script(route: str, number: int, body: Body) -> httpx.Response | None:
        return error(429, "slow down", {"Retry-After": "1"}) if route == QUERIES and number <= 20 else None

    (result,) = run(ScriptedServer(script), tmp_path).results
    assert (result.num_answers, result.num_failed, len(delays)) == (2, 0, 20)
    assert len({*delays}) == 20  # rejected together, not sent together


def test_a_rejection_without_a_delay_is_not_waited_for_without_end(tmp_path: Path, delays: list[float]) -> None:
    (result,) = run(ScriptedServer(lambda route, *_: error(429, "no") if route == QUERIES else None), tmp_path).results
    assert (result.num_failed, len(delays)) == (2, 2 * RETRIES.limit)


def test_a_reply_without_an_answer_is_no_answer(tmp_path: Path) -> None:
    (result,) = run(
        ScriptedServer(lambda route, *_: httpx.Response(200, json={"choices": []}) if route == QUERIES else None),
        tmp_path,
    ).results
    assert (result.num_answers, result.num_failed) == (0, 2)


def test_an_error_whose_param_is_no_text_is_one_line(tmp_path: Path) -> None:
    server = ScriptedServer(lambda route, *_: error(400, "no", param=[3]) if route == EXAMPLES else None)
    with pytest.raises(BadRequest, match="400: no"):
        run(server, tmp_path, shots=(1,))


def test_a_model_name_does_not_break_the_table(tmp_path: Path) -> None:
    report = run(ScriptedServer(models=[{"id": "a|b\nc", "object": "model"}]), tmp_path)
    assert r"| **a\|b c** | test |" in report.markdown()


@pytest.mark.parametrize("status", [404, 409, 500])
def test_a_query_with_another_error_is_counted_as_failed(status: int, tmp_path: Path) -> None:
    server = ScriptedServer(first(lambda *_: error(status, "made up")))
    (result,) = run(server, tmp_path).results
    assert (result.num_answers, result.num_failed) == (1, 1)


def test_a_query_whose_connection_is_always_lost_is_counted_as_failed(tmp_path: Path) -> None:
    server = ScriptedServer(
        lambda route, number, body: drop(route, number, body) if number <= 3 and route == QUERIES else None
    )
    (result,) = run(server, tmp_path).results
    assert (result.num_answers, result.num_failed) == (1, 1)


def test_a_text_that_is_not_unicode_is_one_failed_query(tmp_path: Path) -> None:
    WRITERS["textvqa"](tmp_path / "data")
    path = tmp_path / "data" / "TextVQA_0.5.1_val.json"
    values = json.loads(path.read_text())
    values["data"][0]["question"] = "half \ud83d of a pair"
    write_json(path, values)
    (result,) = run(ScriptedServer(), tmp_path, "textvqa").results
    assert (result.num_answers, result.num_failed) == (1, 1)


def many(folder: Path, count: int = 12) -> Path:
    """Write the files of COCO with more queries."""
    WRITERS["coco"](folder / "data")
    path = folder / "data" / "dataset_coco.json"
    values = json.loads(path.read_text())
    for number in range(100, 100 + count):
        name = f"COCO_val2014_{number:012d}.jpg"
        write_image(folder / "data" / "val2014" / name, number)
        sentences = [{"raw": f"thing {number}"}]
        values["images"].append({"filename": name, "split": "test", "cocoid": number, "sentences": sentences})
    write_json(path, values)
    return folder


@pytest.mark.parametrize("response", [drop, lambda *_: error(500, "the engine died")])
def test_a_run_ends_if_the_server_does_not_come_back(
    response: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "MAX_LOST", 4)
    many(tmp_path)
    is_lost = True

    def script(route: str, number: int, body: Body) -> httpx.Response | None:
        return response(route, number, body) if route == QUERIES and is_lost and number > 3 else None

    server = ScriptedServer(script)
    with pytest.raises(ServerLost, match=r"4 queries in a row failed, the last one: .*The same command continues\."):
        run(server, tmp_path)
    is_lost = False
    sent = server.counts[QUERIES]
    (result,) = run(server, tmp_path).results
    assert (result.num_answers, result.num_failed) == (14, 0)
    assert server.counts[QUERIES] == sent + 11


def test_failures_with_answers_between_them_do_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "MAX_LOST", 2)
    server = ScriptedServer(lambda route, number, _: error(500, "x") if route == QUERIES and number % 2 else None)
    (result,) = run(server, many(tmp_path)).results
    assert (result.num_answers, result.num_failed) == (7, 7)


def test_a_key_that_is_refused_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NotAuthorised):
        run(ScriptedServer(first(lambda *_: error(401, "no such key"))), tmp_path)


def test_a_server_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="http://test serves no model"):
        run(ScriptedServer(models=[]), tmp_path)


def test_the_split_of_the_examples_has_no_queries(tmp_path: Path) -> None:
    message = "--split train: examples are selected from this split, .* another split of COCO: val, test"
    with pytest.raises(ValueError, match=message):
        run(ScriptedServer(), tmp_path, split="train", shots=(1,))
    with pytest.raises(ValueError, match="--split train"):  # the examples without media show answers, too
        run(ScriptedServer(), tmp_path, split="train", shots=(0,))


def test_the_number_of_examples_that_are_left_out_is_in_the_report(tmp_path: Path) -> None:
    def script(route: str, number: int, body: Body) -> httpx.Response | None:
        is_first = route == "POST examples" and number == 1
        return error(400, "it is no image", param="examples[0].image") if is_first else None

    report = run(ScriptedServer(script), tmp_path, "flickr30k", shots=(1,))
    assert (report.values()["support"], report.values()["left_out"]) == (1, 1)
    assert "- 1 examples cannot be used and are left out." in report.markdown()


def test_too_few_usable_examples_are_refused(tmp_path: Path) -> None:
    def script(route: str, number: int, body: Body) -> httpx.Response | None:
        is_first = route == "POST examples" and number == 1
        return error(400, "it is no image", param="examples[0].image") if is_first else None

    with pytest.raises(ValueError, match="2 shots need as many examples, and there are 1"):
        run(ScriptedServer(script), tmp_path, "flickr30k", shots=(2,))
    with pytest.raises(
        ValueError, match=r"^0 shots with 2 examples without media need as many examples, and there are"
    ):
        run(ScriptedServer(script), tmp_path, "flickr30k", shots=(0,))


def test_what_a_metric_needs_is_checked_before_the_queries(tmp_path: Path) -> None:
    server = ScriptedServer()
    WRITERS["nextqa"](tmp_path / "data")
    (tmp_path / "data" / "stopwords.txt").unlink()
    with pytest.raises(ValueError, match="WUPS needs"):
        run(server, tmp_path, "nextqa")
    assert not server.counts


def test_a_score_that_cannot_be_computed_is_a_note(tmp_path: Path) -> None:
    """A sample of one meme has one label."""

    def script(route: str, number: int, body: Body) -> httpx.Response | None:
        if route != "POST /v1/classify":
            return None
        candidates = [{"label": label, "probability": 0.5} for label in body["candidates"]]
        return httpx.Response(200, json={"label": "yes", "confidence": 0.5, "candidates": candidates})

    report = run(ScriptedServer(script), tmp_path, "hateful_memes", limit=1)
    assert report.values()["results"][0]["problem"] == "ROC AUC needs rows of both labels"
    assert "| no score |" in report.markdown()
    assert "0 shots: 1 answers, no score: ROC AUC needs rows of both labels" in report.markdown()
