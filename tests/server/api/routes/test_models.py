"""The routes of models and of the tokenizer."""

from __future__ import annotations

import threading
from dataclasses import replace

import httpx
import pytest

import server.prompt
from model.prompt import PromptTokenizer
from server.api.answer_text import token_text
from server.api.routes import models
from server.app import create_app
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.conftest import image_part
from tests.server.documented import CHECKED
from tests.server.fakes import EOS, TOKENIZER, FakeClient, served_model

pytestmark = pytest.mark.anyio


async def test_the_card_has_the_limits_of_the_model(http: httpx.AsyncClient, settings: Settings) -> None:
    (card,) = (await http.get("/v1/models")).json()["data"]
    assert card["id"] == "tiny"
    assert card["max_model_len"] == 64
    assert card["max_set_examples"] == settings.max_set_examples
    assert card["end_of_chunk"] == "<|endofchunk|>"
    assert card["vision"] == {
        "image_size": 8,
        "resize": "squash",
        "visual_tokens": 4,
        "max_media_per_request": 3,
    }
    assert (await http.get("/v1/models/tiny")).json() == card


async def test_the_models_of_an_address_are_listed_and_shown(client: FakeClient, settings: Settings) -> None:
    model = served_model()
    catalog = {"tiny": model, "other": replace(model, name="other")}
    app = create_app(client, model, settings, Metrics("tiny"), catalog=catalog)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", event_hooks=CHECKED) as http:
        cards = (await http.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["tiny", "other"]
        assert (await http.get("/v1/models/other")).json() == cards[1]
        prompt = replace(model.config.prompt, end_of_chunk="")
        catalog["new"] = replace(model, name="new", config=replace(model.config, prompt=prompt))
        assert (await http.get("/v1/models/new")).json()["end_of_chunk"] is None
        refusal = (await http.get("/v1/models/nix")).json()["error"]["message"]
        assert refusal == "the model 'nix' does not exist: this server has 'tiny', 'other', 'new'"
    await app.state.services.decoder.stop()
    app.state.services.database.close()


async def test_another_model_is_not_found(http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/models/org/other")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_tokenize_returns_the_token_ids_of_a_prompt(http: httpx.AsyncClient) -> None:
    body = (await http.post("/tokenize", json={"prompt": [image_part(), {"type": "text", "text": "ab"}]})).json()
    assert body["tokens"] == [TOKENIZER.media_token_id, *TOKENIZER.encode_plain("ab")]
    assert body["media_index"] == [0, 0, 0]
    assert (body["count"], body["max_model_len"]) == (3, 64)


async def test_tokenize_returns_the_token_ids_of_a_chat(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": [image_part(), {"type": "text", "text": "ab"}]}]
    fields = {"messages": messages, "template": "plain", "return_token_strs": True}
    body = (await http.post("/tokenize", json=fields)).json()
    assert body["tokens"] == [TOKENIZER.media_token_id, *TOKENIZER.encode_plain("ab")]
    assert body["token_strs"] == ["<image>", "a", "b"]


async def test_the_texts_of_tokens_are_found_outside_the_event_loop(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set[str]()

    def text_of(tokenizer: PromptTokenizer, token_id: int) -> str:
        names.add(threading.current_thread().name.partition("_")[0])
        return token_text(tokenizer, token_id)

    monkeypatch.setattr(models, "token_text", text_of)
    await http.post("/tokenize", json={"prompt": "ab", "return_token_strs": True})
    assert names == {"tokenizer"}


@pytest.mark.parametrize("form", [{}, {"add_special_tokens": False}])
async def test_a_text_of_any_form_has_one_limit(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, form: dict[str, bool]
) -> None:
    monkeypatch.setattr(server.prompt, "CHARACTERS_PER_TOKEN", 4)
    limit = 4 * served_model().max_model_len
    assert (await http.post("/tokenize", json={"prompt": "a" * limit, **form})).json()["count"] == limit
    error = (await http.post("/tokenize", json={"prompt": "a" * (limit + 1), **form})).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


async def test_a_text_may_be_tokenized_without_special_tokens(http: httpx.AsyncClient) -> None:
    for text, ids in {
        "ab": TOKENIZER.encode_plain("ab"),
        "</s>": [EOS],
        "a</s>": TOKENIZER.encode_plain("a</s>"),
    }.items():
        body = (await http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()
        assert body["tokens"] == ids
    response = await http.post("/tokenize", json={"prompt": "a", "template": "caption"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "template")
    response = await http.post("/tokenize", json={"prompt": [1, 2], "add_special_tokens": False})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "add_special_tokens")


async def test_a_chat_is_tokenized_with_the_fields_that_clients_of_vllm_send(http: httpx.AsyncClient) -> None:
    fields = {
        "messages": [{"role": "user", "content": "ab"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "add_generation_prompt": True,
        "continue_final_message": False,
        "add_special_tokens": False,
        "chat_template_kwargs": {},
    }
    assert (await http.post("/tokenize", json=fields)).json()["tokens"] == TOKENIZER.encode_plain("ab")


async def test_the_tokenizer_names_its_special_tokens(http: httpx.AsyncClient) -> None:
    info = (await http.get("/tokenizer_info")).json()
    assert (info["eos_token"], info["bos_token"], info["vocab_size"]) == ("</s>", None, len(TOKENIZER))
    body = (await http.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False})).json()
    assert body["tokens"] == [EOS]


@pytest.mark.parametrize("fields", [{}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}])
async def test_tokenize_needs_either_a_prompt_or_messages(http: httpx.AsyncClient, fields: dict[str, object]) -> None:
    response = await http.post("/tokenize", json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


async def test_detokenize_includes_markers(http: httpx.AsyncClient) -> None:
    ids = [TOKENIZER.media_token_id, *TOKENIZER.encode_plain("é")]
    assert (await http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "<image>é"}


async def test_detokenize_refuses_ids_beyond_the_vocabulary(http: httpx.AsyncClient) -> None:
    error = (await http.post("/detokenize", json={"tokens": [1, 10**6]})).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "tokens[1]")
