"""The requests of a benchmark, as a server receives them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from evaluation.benchmarks.benchmark import SelectionName, Wording, load
from evaluation.benchmarks.data import BenchmarkData
from evaluation.benchmarks.registration import Registration
from evaluation.benchmarks.requests import Asker
from flamboyance_client import AsyncClient, SupportSet, UnexpectedReply
from tests.evaluation.benchmarks.official_files import WRITERS

SUPPORT_SET = SupportSet(id="ss_1", version=7)
Body = dict[str, Any]


class Server:
    """A server that records the bodies of requests, and answers with the first candidate or with a text."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, Body]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        self.bodies.append((f"{request.method} {request.url.path}", body))
        if request.url.path == "/v1/fewshot/completions":
            return httpx.Response(200, json={"choices": [{"index": 0, "text": ' "red", Question:x'}]})
        if request.url.path == "/v1/classify":
            labels = [{"label": label, "probability": 1.0} for label in body["candidates"][: body["top_k"]]]
            answer = {"label": labels[0]["label"], "confidence": 1.0, "candidates": labels}
            return httpx.Response(200, json=answer)
        if request.method == "GET":
            return httpx.Response(404, json={"error": {"message": "no such set", "code": "support_set_not_found"}})
        return httpx.Response(200, json={"id": "ss_1", "version": 7})


def ask(
    name: str,
    folder: Path,
    *,
    num_shots: int,
    wording: Wording = "paper",
    selection: SelectionName = "random",
    orders: int = 1,
) -> tuple[list[Body], list[Any]]:
    """Ask all queries of a benchmark, and return the bodies and the outcomes."""
    WRITERS[name](folder)
    benchmark, server = load(name), Server()
    items = BenchmarkData(benchmark, folder).queries(benchmark.split, None, 0).items

    async def run() -> Sequence[Body]:
        async with AsyncClient(transport=httpx.MockTransport(server)) as client:
            asker = Asker(
                client=client,
                benchmark=benchmark,
                prompt=benchmark.prompt(wording),
                support_set=SUPPORT_SET if benchmark.support_split else None,
                num_shots=num_shots,
                selection=selection,
                seed=0,
                orders=orders,
            )
            return [await asker.ask(item) for item in items]

    outcomes = asyncio.run(run())
    return [body for _, body in server.bodies], list(outcomes)


def test_answers_are_written_by_beam_search_after_shots(tmp_path: Path) -> None:
    bodies, outcomes = ask("vqav2", tmp_path, num_shots=4, wording="openflamingo")
    body = bodies[0]
    assert body["template"] == {"shot": "{media}Question:{question} Short answer:{answer}", "separator": "\n"}
    assert (body["use_beam_search"], body["best_of"], body["length_penalty"], body["max_tokens"]) == (True, 3, 0.0, 5)
    selected = {name: body["examples"][name] for name in ("support_set", "version", "k", "strategy")}
    assert selected == {"support_set": "ss_1", "version": 7, "k": 4, "strategy": "random"}
    assert body["zero_shot"] is False
    assert body["query"]["question"] == "What colour is it?"
    assert len({body["examples"]["seed"] for body in bodies}) == len(bodies)
    assert outcomes[0] == {"id": "1", "text": '"red"'}


def test_without_shots_two_texts_come_before_a_question(tmp_path: Path) -> None:
    (body, *_), _ = ask("coco", tmp_path, num_shots=0)
    assert (body["examples"]["k"], body["zero_shot"]) == (2, True)
    assert body["template"] == {"shot": "{media}Output: {answer}", "separator": ""}


def test_without_shots_nothing_comes_before_ranked_candidates_in_the_papers_words(tmp_path: Path) -> None:
    (body, *_), outcomes = ask("star", tmp_path / "star", num_shots=0)
    assert "examples" not in body
    assert body["candidates"] == ["The red one.", "The blue one.", "The green one.", "The yellow one."]
    assert (body["method"], body["normalisation"], body["top_k"]) == ("in_context", "sum", 1)
    assert body["query"]["media"][0]["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert outcomes[0]["ranked"] == [("The red one.", 1.0)]
    (body, *_), _ = ask("hateful_memes", tmp_path / "memes", num_shots=0, wording="openflamingo")
    assert (body["examples"]["k"], body["zero_shot"], body["normalisation"]) == (2, True, "mean")


def test_rices_selects_the_most_similar_and_orders_are_averaged(tmp_path: Path) -> None:
    (body, *_), _ = ask("hateful_memes", tmp_path, num_shots=8, selection="rices", orders=6)
    assert (body["examples"]["strategy"], body["examples"]["k"], body["permutations"]) == ("rices_image", 8, 6)
    assert body["query"]["question"] == 'so "nice"'


def test_a_dialog_is_the_text_of_the_query(tmp_path: Path) -> None:
    (body,), _ = ask("visdial", tmp_path, num_shots=1)
    assert body["template"]["shot"] == "{media}{text} Question: {question} Answer: {label}"
    assert body["query"]["text"].startswith("a thing Question: what colour is it Answer: yes")
    assert body["top_k"] == 4  # all candidates, for NDCG


@pytest.mark.parametrize(("name", "answer"), [("vqav2", {"answer": "red"}), ("hateful_memes", {"label": "no"})])
def test_examples_are_stored_with_their_first_answer(name: str, answer: Body, tmp_path: Path) -> None:
    server, benchmark = Server(), load(name)
    WRITERS[name](tmp_path)
    items = sorted(BenchmarkData(benchmark, tmp_path).support(None, 0), key=lambda item: item.row.id)
    asyncio.run(_register(server, name, items))
    routes = [route for route, _ in server.bodies]
    path = "/v1/support_sets"
    assert [routes[0].partition("/benchmark")[0], *routes[1:]] == [
        *(f"GET {path}", f"POST {path}", f"POST {path}/ss_1/examples", f"PATCH {path}/ss_1")
    ]
    assert {**server.bodies[2][1]["examples"][0], **answer} == server.bodies[2][1]["examples"][0]
    assert server.bodies[3][1]["name"].startswith(f"benchmark-{name}-")


async def _register(server: Server, name: str, items: Sequence[Any]) -> None:
    async with AsyncClient(transport=httpx.MockTransport(server)) as client:
        counts: list[int] = []
        await Registration(client, load(name), counts.append, print).register(lambda unusable: items)
    assert sum(counts) == len(items)


@pytest.mark.parametrize(
    "candidates", [[], [{"label": "a", "probability": float("nan")}], [{"label": "a", "probability": None}]]
)
def test_a_ranking_that_cannot_be_scored_is_no_answer(candidates: list[Body], tmp_path: Path) -> None:
    WRITERS["imagenet"](tmp_path)
    benchmark = load("imagenet")
    item, *_ = BenchmarkData(benchmark, tmp_path).queries(benchmark.split, None, 0).items
    reply = json.dumps({"label": "a", "confidence": 1.0, "candidates": candidates})

    async def run() -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, content=reply))
        async with AsyncClient(transport=transport) as client:
            asker = Asker(
                client=client,
                benchmark=benchmark,
                prompt=benchmark.prompt("paper"),
                support_set=None,
                num_shots=0,
                selection="random",
                seed=0,
                orders=1,
            )
            await asker.ask(item)

    with pytest.raises(UnexpectedReply, match="expected candidates with probabilities"):
        asyncio.run(run())
