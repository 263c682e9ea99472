"""`/v1/classify` and `/v1/score` with a real engine return the probabilities of the reference."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from model.media import MediaLimits
from model.prompt import EndOfChunk, Media, Segment, Text, encode
from model.reference import encode as encode_media
from model.reference import log_probs
from model.vision import normalise
from server.app import create_app
from server.engine.engine import Engine
from server.fewshot.classification import GREY_MEDIA
from server.media.decoder import Decode, Frames, frames_of
from server.media.source import EncodedMedia, encoded
from server.served_model import ServedModel
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.wire import Score, Scored
from tests.engine_client import CONFIG, MODELS, SERVED, Client
from tests.server.conftest import data_url, png
from tests.server.documented import CHECKED
from tests.server.fakes import FakeClient
from tests.tiny_models import CONFIGS, FAMILIES, Family, prompt_tokenizer

pytestmark = pytest.mark.anyio

# of different lengths, and one is the beginning of another
LABELS = ("cat", "dog", "ca")
COLOURS = ("red", "blue", "lime")
IMAGES = {label: encoded(png(colour), "image", "") for label, colour in zip(LABELS, COLOURS, strict=True)}
QUERY_IMAGE = encoded(png("orange", (9, 30)), "image", "")
ALL = {media.digest: media for media in (*IMAGES.values(), QUERY_IMAGE, GREY_MEDIA)}


class InProcessClient(FakeClient):
    """Scores with an engine in this process."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family: Family = family
        self._engine_client = Client(Engine(SERVED[family], tokenizer_of(family), CONFIG, salt=b"here"), {})

    async def score(self, request: Score, media: Mapping[bytes, EncodedMedia]) -> Scored:
        for digest, item in media.items():
            self._engine_client.images[digest] = frames(item, self.family)
        self._engine_client.engine.add(request)
        self._engine_client.run()
        return self._engine_client.scored[request.request_id]


def tokenizer_of(family: Family) -> Any:
    return prompt_tokenizer(CONFIGS[family].prompt)


def frames(media: EncodedMedia, family: Family) -> np.ndarray:
    decoded = frames_of(Decode(kind="image", data=media.data), CONFIGS[family].vision, MediaLimits())
    assert isinstance(decoded, Frames)
    return np.frombuffer(decoded.data, np.uint8).reshape(decoded.shape).copy()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    family: Family = request.param
    return family


@pytest.fixture
async def http(family: Family, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    model = ServedModel("tiny", CONFIGS[family], tokenizer_of(family), max_model_len=CONFIG.max_model_len)
    app = create_app(InProcessClient(family), model, Settings(data_dir=tmp_path), Metrics("tiny"))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost", event_hooks=CHECKED
    ) as client:
        yield client
    await app.state.services.decoder.stop()


def reference_logprob(family: Family, prompt: Sequence[Segment], candidate: str) -> float:
    """Return the log-probability of the candidate after the prompt, in one forward without a cache."""
    model, tokenizer = MODELS[family], tokenizer_of(family)
    before = encode(prompt, tokenizer)
    *rest, last = prompt
    assert isinstance(last, Text)
    whole = encode([*rest, Text(last.text + candidate)], tokenizer)
    length = len(before.token_ids)
    assert whole.token_ids[:length] == before.token_ids
    pixels = [normalise(torch.from_numpy(frames(ALL[d], family)), model.config.vision) for d in whole.media]
    logs = log_probs(model, whole.token_ids, whole.media_index, encode_media(model, pixels))
    return sum(float(logs[index - 1, whole.token_ids[index]]) for index in range(length, len(whole.token_ids)))


def prompt_of(shots: Sequence[str], query: EncodedMedia, lead: str) -> list[Segment]:
    segments: list[Segment] = []
    for label in shots:
        segments += [Media(IMAGES[label].digest), Text(f"Output:{lead}{label}"), EndOfChunk()]
    return [*segments, Media(query.digest), Text("Output:")]


def softmax(values: np.ndarray) -> np.ndarray:
    return np.exp(values) / np.exp(values).sum(-1, keepdims=True)


async def classify(http: httpx.AsyncClient, **fields: Any) -> tuple[list[float], list[float]]:
    shots = [{"image": data_url(IMAGES[label].data), "label": label} for label in LABELS]
    body = {"shots": shots, "query": {"image": data_url(QUERY_IMAGE.data)}, "method": "in_context", **fields}
    answer = await http.post("/v1/classify", json=body)
    assert answer.status_code == 200, answer.text
    by_label = {candidate["label"]: candidate for candidate in answer.json()["candidates"]}
    return [by_label[label]["logprob"] for label in LABELS], [by_label[label]["probability"] for label in LABELS]


def lead_of(family: Family) -> str:
    return "" if family == "openflamingo" else " "


async def test_probabilities_equal_the_references(http: httpx.AsyncClient, family: Family) -> None:
    lead = lead_of(family)
    expected = np.array(
        [reference_logprob(family, prompt_of(LABELS, QUERY_IMAGE, lead), lead + label) for label in LABELS]
    )
    logprobs, probabilities = await classify(http)
    assert logprobs == pytest.approx(expected, abs=1e-3)
    assert probabilities == pytest.approx(softmax(expected), abs=1e-4)
    lengths = [len(lead + label) for label in LABELS]
    _, by_mean = await classify(http, normalisation="mean")
    assert by_mean == pytest.approx(softmax(expected / lengths), abs=1e-4)


async def test_calibrated_probabilities_equal_the_references(http: httpx.AsyncClient, family: Family) -> None:
    lead = lead_of(family)
    query_shares, grey = (
        softmax(np.array([reference_logprob(family, prompt_of(LABELS, query, lead), lead + label) for label in LABELS]))
        for query in (QUERY_IMAGE, GREY_MEDIA)
    )
    _, probabilities = await classify(http, calibration="contextual")
    assert probabilities == pytest.approx(query_shares / grey / (query_shares / grey).sum(), abs=1e-4)


async def test_permutations_average_the_log_probabilities_of_all_orders(
    http: httpx.AsyncClient, family: Family
) -> None:
    lead = lead_of(family)
    expected = np.mean(
        [
            [reference_logprob(family, prompt_of(order, QUERY_IMAGE, lead), lead + label) for label in LABELS]
            for order in permutations(LABELS)
        ],
        axis=0,
    )
    logprobs, probabilities = await classify(http, permutations=24)
    assert logprobs == pytest.approx(expected, abs=1e-3)
    logs = [np.log(probability) for probability in probabilities]
    assert logs - np.mean(logs) == pytest.approx(expected - expected.mean(), abs=1e-3)


async def test_scores_of_a_raw_prompt_equal_the_references(http: httpx.AsyncClient, family: Family) -> None:
    prompt = [
        {"type": "image_url", "image_url": {"url": data_url(QUERY_IMAGE.data)}},
        {"type": "text", "text": "It is"},
    ]
    answer = await http.post("/v1/score", json={"prompt": prompt, "candidates": [" a", " cat"]})
    segments: list[Segment] = [Media(QUERY_IMAGE.digest), Text("It is")]
    expected = [reference_logprob(family, segments, candidate) for candidate in (" a", " cat")]
    assert [item["logprob"] for item in answer.json()["data"]] == pytest.approx(expected, abs=1e-3)
