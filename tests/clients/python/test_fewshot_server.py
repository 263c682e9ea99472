"""From files to an answer through the client and the whole server: uploads, a support set, shots chosen, a label."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from flamboyance_client import (
    ApiError,
    AsyncClient,
    BadRequest,
    Classification,
    Client,
    Completion,
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


def picture(colour: str, width: int = 9) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 7), colour).save(stream, "PNG")
    return stream.getvalue()


EXAMPLES: list[Example] = [example(picture(colour), f"It is {colour}.", label=colour, id=colour) for colour in COLOURS]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url, api_key=KEY, retries=Retries(limit=0)) as client:
        yield client


@pytest.fixture(scope="module")
def colours(client: Client) -> SupportSet:
    return client.support_sets.create(name="colours", examples=EXAMPLES, metadata={"of": "tests"})


def test_an_upload_is_known_by_its_content(client: Client) -> None:
    stored = client.images.upload(picture("red", 11))
    assert (stored.object, stored.width, stored.height) == ("image", 11, 7)
    assert client.images.upload(picture("red", 11)) == stored == client.images.get(stored.id)
    assert client.images.content(stored.id) == picture("red", 11)
    assert stored.id in [one.id for one in client.images.list()]
    sent = client.complete([image(picture("red", 11)), "a"], max_tokens=4, temperature=0)
    named = client.complete([{"type": "image_id", "image_id": stored.id}, "a"], max_tokens=4, temperature=0)
    assert named.choices == sent.choices
    assert client.images.delete(stored.id)
    with pytest.raises(NotFound) as caught:
        client.images.get(stored.id)
    assert caught.value.code == "image_not_found"


def test_a_support_set_has_versions(client: Client) -> None:
    made = client.support_sets.create(examples=EXAMPLES[:2])
    assert (made.version, made.num_examples) == (1, 2)
    more = client.support_sets.put(made.id, EXAMPLES[2:], expected_version=1)
    assert (more.version, more.num_examples) == (2, 4)
    assert [*made.example_ids, *more.example_ids] == [one.id for one in client.support_sets.examples(made.id)]
    with pytest.raises(BadRequest) as caught:
        client.support_sets.put(made.id, EXAMPLES[:1], expected_version=1)
    assert (caught.value.status, caught.value.code) == (409, "version_conflict")
    less = client.support_sets.remove(made.id, ["red", "blue"])
    assert [one.id for one in client.support_sets.examples(made.id)] == ["green", "yellow"]
    assert [one.id for one in client.support_sets.examples(made.id, version=1)] == ["red", "green"]
    assert client.support_sets.get(made.id).version == less.version == 3
    named = client.support_sets.update(made.id, name="some", metadata={"a": 1})
    assert client.support_sets.update("some", metadata=None).raw["metadata"] == {}
    assert named.id in [one.id for one in client.support_sets.list()]
    assert client.support_sets.delete("some")
    with pytest.raises(NotFound):
        client.support_sets.get("some")


def test_shots_are_chosen_out_of_the_set_and_told(client: Client, colours: SupportSet) -> None:
    options: dict[str, Any] = {
        "examples": {"support_set": "colours", "k": 2, "strategy": "rices_image"},
        "max_tokens": 4,
        "temperature": 0,
    }
    reply = client.fewshot.complete(query(picture("blue")), **options)
    assert "blue" in [shot["id"] for shot in reply.fewshot["shots"]]
    assert len(reply.fewshot["shots"]) == 2
    with client.fewshot.stream(query(picture("blue")), **options) as events:
        assert "".join(event.text for event in events) == reply.text
    (nearest, _) = client.support_sets.search("colours", query(picture("blue")), k=2)
    assert nearest.id == "blue"
    assert nearest.score == pytest.approx(1, abs=1e-3)


def test_a_label_with_its_probability(client: Client, colours: SupportSet) -> None:
    found = client.classify(
        query(picture("red")), examples={"support_set": "colours", "k": 2}, calibration="contextual"
    )
    assert found.probabilities.keys() == set(COLOURS)
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert found.confidence == max(found.probabilities.values()) == found.probabilities[found.label]


def test_scores_vectors_and_what_a_token_reads(client: Client) -> None:
    one, two = client.score([image(picture("red")), "a"], [" cat", " dog"])
    assert one.logprob == pytest.approx(sum(one.token_logprobs))
    assert len(one.tokens) == len(two.tokens) == 4
    (first, again) = client.embed([image(picture("red")), image(picture("red"))])
    assert first == again
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-3)
    assert client.inspect([image(picture("red")), "a"])["object"] == "inspection"


def test_an_evaluation_runs_to_its_recommendation(client: Client, colours: SupportSet) -> None:
    begun = client.support_sets.evaluate("colours", k=[0, 1], strategies=["random"])
    deadline = time.monotonic() + 120
    while not (evaluation := client.evaluations.get(begun.id)).is_over:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert evaluation.status == "completed", evaluation.raw
    assert len(evaluation.cells) == 2
    assert evaluation.recommendation is not None
    assert begun.id in [one.id for one in client.evaluations.list(support_set=colours.id)]
    assert client.evaluations.delete(begun.id)


def test_warm_media_are_not_encoded_again(client: Client, colours: SupportSet) -> None:
    assert client.support_sets.warm("colours", wait=True).status == "ready"
    reply = client.fewshot.complete(query(picture("red")), examples={"support_set": "colours"}, max_tokens=1)
    assert reply.usage is not None
    assert reply.usage.fewshot_details["media_encoded"] == 0


def test_a_warm_set_is_compared_without_a_look_at_its_media(url: str, client: Client) -> None:
    def num_decoded() -> float:
        lines = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text.splitlines()
        (line,) = [line for line in lines if line.startswith("flamboyance:media_decode_seconds_count")]
        return float(line.rpartition(" ")[2])

    fresh = [example(picture(colour, 13), colour) for colour in COLOURS]
    made, before = client.support_sets.create(examples=fresh), num_decoded()
    warm = client.support_sets.warm(made.id, strategy="mixed", wait=True).raw["warm"]
    assert (warm["media_embedded"], warm["texts_embedded"]) == (4, 4)
    assert num_decoded() == before + 4
    nearest: Selection = {"support_set": made.id, "k": 2, "strategy": "mixed"}
    client.fewshot.complete(query(picture("white", 13), text="which?"), examples=nearest, max_tokens=1)
    assert num_decoded() == before + 5


def test_awaited_is_the_same(url: str, client: Client, colours: SupportSet) -> None:
    options: dict[str, Any] = {"shots": EXAMPLES[:2], "max_tokens": 4, "temperature": 0}

    async def ask() -> tuple[Completion, str, Classification, tuple[str, ...]]:
        async with AsyncClient(url, api_key=KEY) as other:
            whole = await other.fewshot.complete(query(picture("blue")), **options)
            async with other.fewshot.stream(query(picture("blue")), **options) as events:
                text = "".join([event.text async for event in events])
            label = await other.classify(query(picture("blue")), candidates=["red", "blue"], shots=EXAMPLES[:2])
            return whole, text, label, tuple(one.id for one in await other.support_sets.examples("colours"))

    whole, text, label, ids = asyncio.run(ask())
    assert client.fewshot.complete(query(picture("blue")), **options).text == whole.text == text
    assert label.probabilities.keys() == {"red", "blue"}
    assert ids == COLOURS


def test_what_is_at_fault_is_named(client: Client) -> None:
    with pytest.raises(ApiError) as caught:
        client.fewshot.complete(query(picture("red")), shots=[example(b"no picture at all", "a")])
    assert (caught.value.code, caught.value.param) == ("invalid_media", "shots[0].image")


def test_the_readmes_support_set_is_one(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (source,) = [block for block in README.read_text().split("```python\n") if block.count("support_sets.create")]
    code = source.partition("```")[0].replace('"http://127.0.0.1:8000"', f'"{url}", api_key="{KEY}"')
    monkeypatch.chdir(ROOT / "docs" / "examples")
    exec(compile(code, str(README), "exec"), {})
    label, *reply = capsys.readouterr().out.splitlines()  # random weights may answer with line breaks
    assert label.split()[0] in ("dax", "wug", "blicket")
    assert reply[-1].count(".png") == 2
