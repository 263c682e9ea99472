"""A support set of single-coloured images, the fixtures of an app that has it, and few-shot requests that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from model.config import FlamingoConfig
from model.prompt import EndOfChunk, Media, Segment, Text, encode
from server.app import create_app
from server.media.source import EncodedMedia, encoded
from server.served_model import ServedModel
from server.settings import Settings
from server.store.records import NewExample, SupportSetInfo
from server.store.support_sets import SupportSets
from server.telemetry.metrics import Metrics
from tests.server.conftest import data_url, png
from tests.server.fakes import CONFIG, TOKENIZER, FakeClient

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
IMAGES = [encoded(png(colour), "image", "") for colour in COLOURS]
QUERY = encoded(png("purple"), "image", "")
END, LINE = EndOfChunk(), Text("\n")


def application(client: FakeClient, settings: Settings, config: FlamingoConfig = CONFIG) -> FastAPI:
    """Create an app whose context has room for a few shots of a few words."""
    return create_app(client, ServedModel("tiny", config, TOKENIZER, max_model_len=128), settings, Metrics("tiny"))


def example(index: int, **changes: Any) -> NewExample:
    label = "warm" if index in (0, 5) else "cold"
    fields = {"media": (IMAGES[index],), "text": f"a {COLOURS[index]} one", "label": label, **changes}
    return NewExample(id=f"e{index}", **fields)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_media_per_request=5, keep_alive=0.05)


@pytest.fixture
def app(client: FakeClient, settings: Settings) -> FastAPI:
    return application(client, settings)


@pytest.fixture
def support_sets(app: FastAPI) -> SupportSets:
    support_sets: SupportSets = app.state.services.support_sets
    return support_sets


@pytest.fixture
async def colours(support_sets: SupportSets) -> SupportSetInfo:
    return await support_sets.create("colours", [example(index) for index in range(6)])


def url(media: EncodedMedia) -> str:
    return data_url(media.data)


async def post(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/fewshot/completions", json={"query": {"image": url(QUERY)}, **fields})


async def complete(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await post(http, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def shot_ids(http: httpx.AsyncClient, query: dict[str, Any] | None = None, **examples: Any) -> list[str]:
    fields = {"query": query} if query else {}
    body = await complete(http, examples={"support_set": "colours", **examples}, **fields)
    return [shot["id"] for shot in body["fewshot"]["shots"]]


def token_ids(*segments: Segment) -> list[int]:
    return encode(segments, TOKENIZER).token_ids


def shot(media: EncodedMedia, answer: str) -> tuple[Segment, ...]:
    return (Media(media.digest), Text(f"Output:{answer}"), END, LINE)


def refusal(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]
