"""Tests from files to an answer with the client and the whole server: uploads, support sets, shots and labels."""

from __future__ import annotations

import asyncio
import io
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from flamboyance_client import (
    ApiError,
    AsyncClient,
    Classification,
    Client,
    Completion,
    Conflict,
    Example,
    NotFound,
    Retries,
    Selection,
    SupportSet,
    example,
    image,
    query,
)
from tests.clients.serving import KEY

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "clients" / "python" / "README.md"

COLOURS = ("red", "green", "blue", "yellow")


def png(colour: str, width: int = 9) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 7), colour).save(stream, "PNG")
    return stream.getvalue()


EXAMPLES: list[Example] = [example(png(colour), f"It is {colour}.", label=colour, id=colour) for colour in COLOURS]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url, api_key=KEY, retries=Retries(limit=0)) as client:
        yield client


@pytest.fixture(scope="module")
def colours(client: Client) -> SupportSet:
    return client.support_sets.create(name="colours", examples=EXAMPLES, metadata={"of": "tests"})


def test_the_id_of_an_upload_depends_on_its_content(client: Client) -> None:
    stored = client.images.upload(png("red", 11))
    assert (stored.object, stored.width, stored.height) == ("image", 11, 7)
    assert client.images.upload(png("red", 11)) == stored == client.images.get(stored.id)
    assert client.images.content(stored.id) == png("red", 11)
    assert stored.id in [item.id for item in client.images.list()]
    by_content = client.complete([image(png("red", 11)), "a"], max_tokens=4, temperature=0)
    by_id = client.complete([{"type": "image_id", "image_id": stored.id}, "a"], max_tokens=4, temperature=0)
    assert by_id.choices == by_content.choices
    assert client.images.delete(stored.id)
    with pytest.raises(NotFound) as caught:
        client.images.get(stored.id)
    assert caught.value.code == "image_not_found"


def test_a_support_set_has_versions(client: Client) -> None:
    first = client.support_sets.create(examples=EXAMPLES[:2])
    assert (first.version, first.num_examples) == (1, 2)
    second = client.support_sets.put(first.id, EXAMPLES[2:], expected_version=1)
    assert (second.version, second.num_examples) == (2, 4)
    assert [*first.example_ids, *second.example_ids] == [
        example.id for example in client.support_sets.examples(first.id)
    ]
    with pytest.raises(Conflict) as caught:
        client.support_sets.put(first.id, EXAMPLES[:1], expected_version=1)
    assert (caught.value.status, caught.value.code) == (409, "version_conflict")
    third = client.support_sets.remove(first.id, ["red", "blue"])
    assert [example.id for example in client.support_sets.examples(first.id)] == ["green", "yellow"]
    assert [example.id for example in client.support_sets.examples(first.id, version=1)] == ["red", "green"]
    assert client.support_sets.get(first.id).version == third.version == 3
    renamed = client.support_sets.update(first.id, name="renamed", metadata={"a": 1})
    assert client.support_sets.update("renamed", metadata=None).raw["metadata"] == {}
    assert renamed.id in [item.id for item in client.support_sets.list()]
    assert client.support_sets.delete("renamed")
    with pytest.raises(NotFound):
        client.support_sets.get("renamed")


def test_the_reply_lists_the_shots_that_were_selected_from_the_set(client: Client, colours: SupportSet) -> None:
    options: dict[str, Any] = {
        "examples": {"support_set": "colours", "k": 2, "strategy": "rices_image"},
        "max_tokens": 4,
        "temperature": 0,
    }
    reply = client.fewshot.complete(query(png("blue")), **options)
    assert "blue" in [shot["id"] for shot in reply.fewshot["shots"]]
    assert len(reply.fewshot["shots"]) == 2
    with client.fewshot.stream(query(png("blue")), **options) as events:
        assert "".join(event.text for event in events) == reply.text
    (nearest, _) = client.support_sets.search("colours", query(png("blue")), k=2)
    assert nearest.id == "blue"
    assert nearest.score == pytest.approx(1, abs=1e-3)


def test_faults_of_a_set_are_named_and_uncertain_media_are_suggested(client: Client) -> None:
    """Pictures of one colour are alike to any encoder, whatever their size."""
    examples = [
        example(png(colour, width), label=colour, id=f"{colour}-{width}") for colour in COLOURS for width in (9, 31)
    ]
    wrong = example(png("red", 21), label="blue", id="wrong")
    colours = client.support_sets.create(examples=[*examples, example(png("red", 12), label="red"), wrong])
    diagnostics = client.support_sets.diagnostics(colours.id)
    assert [(entry.id, entry.looks_like) for entry in diagnostics.mislabelled] == [("wrong", "red")]
    assert "wrong" in {example_id for pair in diagnostics.conflicting for example_id in pair.ids}
    assert client.support_sets.diagnostics(colours.id, limit=1).redundant.count == diagnostics.redundant.count

    async def both() -> tuple[object, object]:
        async with AsyncClient(str(client._http.get().base_url), api_key=KEY) as asynchronous:
            pool = [png("green", 9), png("navy", 14)]
            return (
                await asynchronous.support_sets.diagnostics(colours.id),
                await asynchronous.support_sets.suggest(colours.id, pool, count=5),
            )

    pool = [png("green", 9), png("navy", 14)]
    suggestions = client.support_sets.suggest(colours.id, pool, count=5)
    assert [suggestion.media for suggestion in suggestions] == [pool[1]]
    assert suggestions.known == {0: "green-9"}
    assert asyncio.run(both()) == (diagnostics, suggestions)
    client.support_sets.delete(colours.id)


def test_a_classification_has_probabilities(client: Client, colours: SupportSet) -> None:
    result = client.classify(query(png("red")), examples={"support_set": "colours", "k": 2}, calibration="contextual")
    assert result.probabilities.keys() == set(COLOURS)
    assert sum(result.probabilities.values()) == pytest.approx(1)
    assert result.label is not None
    assert result.confidence == max(result.probabilities.values()) == result.probabilities[result.label]
    assert (result.temperature, result.threshold) == (1.0, None)


def test_an_answer_that_is_not_sure_enough_has_no_label(client: Client) -> None:
    shots = [example(png(colour, size), label=colour) for colour in COLOURS[:2] for size in (9, 10)]
    sure = client.classify(png(COLOURS[0], 9), shots=shots, method="knn", target_accuracy=0.5)
    assert (sure.label, sure.threshold) == (COLOURS[0], 0.0)
    mixed = [example(png(COLOURS[number // 2], 9 + number), label=COLOURS[number % 2]) for number in range(4)]
    answer = client.classify(png(COLOURS[0], 9), shots=mixed, method="knn", target_accuracy=0.99)
    assert (answer.label, answer.threshold, len(answer.candidates)) == (None, 1.0, 2)
    assert answer._repr_html_().count("no label (") == 1


def test_scores_embeddings_and_inspections(client: Client) -> None:
    cat, dog = client.score([image(png("red")), "a"], [" cat", " dog"])
    assert cat.logprob == pytest.approx(sum(cat.token_logprobs))
    assert len(cat.tokens) == len(dog.tokens) == 4
    (first, second) = client.embed([image(png("red")), image(png("red"))])
    assert first == second
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-3)
    assert client.inspect([image(png("red")), "a"])["object"] == "inspection"


def test_an_evaluation_completes_with_a_recommendation(client: Client) -> None:
    pairs = [example(png(colour, width), label=colour) for colour in COLOURS[:2] for width in (30, 31)]
    colours = client.support_sets.create(name="pairs", examples=pairs)
    methods = ["in_context", "knn"]
    evaluation = client.support_sets.evaluate("pairs", wait=True, k=[0, 1], strategies=["random"], methods=methods)
    assert evaluation.status == "completed", evaluation.raw
    assert evaluation.num_queries_done == evaluation.num_queries == 12
    assert len(evaluation.cells) == 3
    assert evaluation.recommendation is not None
    rows = {(row.method, row.strategy, row.k) for row in evaluation.summary}
    assert rows == {("in_context", "first", 0), ("in_context", "random", 1), ("knn", None, None)}
    low, high = evaluation.summary[0].accuracy_interval
    assert low <= evaluation.summary[0].accuracy <= high
    answer = client.classify(png("red"), examples=evaluation.recommendation)
    assert answer.raw["fewshot"]["support_set"] == colours.id
    assert evaluation.id in [item.id for item in client.evaluations.list(support_set=colours.id)]
    assert client.evaluations.delete(evaluation.id)


def test_a_set_that_exists_is_returned_if_that_is_permitted(client: Client, colours: SupportSet) -> None:
    assert client.support_sets.create(name="colours", exist_ok=True) == client.support_sets.get("colours")
    with pytest.raises(Conflict):
        client.support_sets.create(name="colours")


def test_warm_media_are_not_encoded_again(client: Client, colours: SupportSet) -> None:
    assert client.support_sets.warm("colours", wait=True).status == "ready"
    reply = client.fewshot.complete(query(png("red")), examples={"support_set": "colours"}, max_tokens=1)
    assert reply.usage is not None
    assert reply.usage.fewshot_details["media_encoded"] == 0


def test_a_warm_set_is_compared_without_decoding_its_media(url: str, client: Client) -> None:
    def num_decoded() -> float:
        lines = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text.splitlines()
        (line,) = [line for line in lines if line.startswith("flamboyance:media_decode_seconds_count")]
        return float(line.rpartition(" ")[2])

    new_examples = [example(png(colour, 13), colour) for colour in COLOURS]
    support_set, before = client.support_sets.create(examples=new_examples), num_decoded()
    warm = client.support_sets.warm(support_set.id, strategy="mixed", wait=True).raw["warm"]
    assert (warm["media_embedded"], warm["texts_embedded"]) == (4, 4)
    assert num_decoded() == before + 4
    nearest: Selection = {"support_set": support_set.id, "k": 2, "strategy": "mixed"}
    client.fewshot.complete(query(png("white", 13), text="which?"), examples=nearest, max_tokens=1)
    assert num_decoded() == before + 5


def test_the_async_client_gives_the_same_answers(url: str, client: Client, colours: SupportSet) -> None:
    options: dict[str, Any] = {"shots": EXAMPLES[:2], "max_tokens": 4, "temperature": 0}

    async def run() -> tuple[Completion, str, Classification, tuple[str, ...]]:
        async with AsyncClient(url, api_key=KEY) as async_client:
            whole = await async_client.fewshot.complete(query(png("blue")), **options)
            async with async_client.fewshot.stream(query(png("blue")), **options) as events:
                text = "".join([event.text async for event in events])
            label = await async_client.classify(query(png("blue")), candidates=["red", "blue"], shots=EXAMPLES[:2])
            return whole, text, label, tuple(item.id for item in await async_client.support_sets.examples("colours"))

    whole, text, label, ids = asyncio.run(run())
    assert client.fewshot.complete(query(png("blue")), **options).text == whole.text == text
    assert label.probabilities.keys() == {"red", "blue"}
    assert ids == COLOURS


def test_an_error_names_the_field(client: Client) -> None:
    with pytest.raises(ApiError) as caught:
        client.fewshot.complete(query(png("red")), shots=[example(b"not an image", "a")])
    assert (caught.value.code, caught.value.param) == ("invalid_media", "shots[0].image")


def test_the_folder_snippets_of_the_readme_run_twice(
    url: str, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = [block.partition("```")[0] for block in README.read_text().split("```python\n") if "textures" in block]
    monkeypatch.chdir(ROOT)
    labels = ("brick", "grass", "gravel")
    queries = [f"docs/examples/textures/queries/{label}/3.jpg" for label in labels]
    versions = []
    for _ in range(2):
        printed = []
        for block in blocks:
            code = block.replace('"http://127.0.0.1:8000"', f'"{url}", api_key="{KEY}"')
            exec(compile(code, str(README), "exec"), {})
            printed.append(capsys.readouterr().out.splitlines())
        evaluated, many, sure, measured, curated = printed
        assert evaluated[0].split()[0] in labels
        assert [line.split()[0] for line in many[:3]] == queries
        assert literal_eval(sure[-1])[0] in (*labels, None)
        assert measured[1].startswith("Comparison(only_first=")
        assert 0 <= float(measured[0].split()[0]) <= 1
        assert [line.split()[0] in queries for line in curated[-2:]] == [True, True]
        versions.append(client.support_sets.get("textures").version)
    assert versions == [1, 1]
