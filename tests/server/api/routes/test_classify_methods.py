"""`/v1/classify` by likeness: which examples are compared, what `auto` chooses, and what is refused by name."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest

from server.fewshot import candidates as candidates_module
from server.fewshot import comparison, retrieval
from server.fewshot.comparison import ComparedExamples
from server.fewshot.methods import METHODS
from server.fewshot.methods.linear import Linear
from server.media.source import EncodedMedia, encoded
from server.settings import Settings
from tests.server.conftest import data_url, png
from tests.server.fakes import CONFIG, TOKENIZER, FakeClient

pytestmark = pytest.mark.anyio
CATS, DOGS, QUERY = [png("red"), png("darkred")], [png("green"), png("darkgreen")], png("orange")
SHOTS = [
    {"image": data_url(image), "label": label} for label, images in (("cat", CATS), ("dog", DOGS)) for image in images
]


def direction(*values: float) -> np.ndarray:
    vector = np.zeros(CONFIG.vision.feature_dim, np.float32)
    vector[: len(values)] = values
    return vector / np.linalg.norm(vector)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_media_per_request=8)


@pytest.fixture(autouse=True)
def vectors(client: FakeClient) -> None:
    """The query is like a cat, and the language model says "dog"."""
    images = {CATS[0]: (1, 0.2), CATS[1]: (1, 0.1), DOGS[0]: (0.1, 1), DOGS[1]: (0.2, 1), QUERY: (1, 0.3)}
    client.vectors |= {encoded(image, "image", "").digest: direction(*vector) for image, vector in images.items()}
    cat = TOKENIZER.encode_plain("cat")
    client.logprobs = lambda request, candidate: [-2.0 if candidate == cat else -1.0] * len(candidate)


async def post(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/classify", json={"shots": SHOTS, "query": {"image": data_url(QUERY)}, **fields})


async def classify(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await post(http, **fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.parametrize("method", ["nearest_mean", "knn", "linear"])
async def test_a_method_by_likeness_computes_no_prompt(
    http: httpx.AsyncClient, client: FakeClient, method: str
) -> None:
    body = await classify(http, method=method)
    assert (body["method"], body["label"]) == (method, "cat")
    assert client.scores == []
    first = body["candidates"][0]
    assert (first["logprob"], first["num_tokens"], list(first["scores"])) == (None, None, [method])
    scores = np.array([candidate["scores"][method] for candidate in body["candidates"]])
    assert np.exp(scores).sum() == pytest.approx(1)
    shares = np.exp(scores / body["temperature"])
    assert first["probability"] == pytest.approx(shares[0] / shares.sum())
    assert body["usage"]["prompt_tokens"] == 0
    assert body["usage"]["fewshot_details"]["media"] == 1
    assert body["fewshot"]["shots"] == []


async def test_a_blend_adds_both_parts(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await classify(http, method="blend")
    assert len(client.scores) == 1
    logs = [sum(candidate["scores"].values()) / body["temperature"] for candidate in body["candidates"]]
    assert set(body["candidates"][0]["scores"]) == {"in_context", "nearest_mean"}
    shares = np.exp(logs) / np.exp(logs).sum()
    assert [candidate["probability"] for candidate in body["candidates"]] == pytest.approx(shares.tolist())
    assert [shot["label"] for shot in body["fewshot"]["shots"]] == ["cat", "cat", "dog", "dog"]


async def test_few_examples_do_not_wait_for_methods_that_are_fitted_to_many(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave-one-out of ten thousand takes many seconds."""
    may_end, choose = threading.Event(), ComparedExamples.choose_method

    def choose_slowly(self: ComparedExamples) -> str:
        if len(self.labelled.vectors) > len(SHOTS):
            may_end.wait(60)
        return choose(self)

    monkeypatch.setattr(comparison, "MANY", len(SHOTS))
    monkeypatch.setattr(ComparedExamples, "choose_method", choose_slowly)
    many = [
        *SHOTS,
        {"image": data_url(png("tomato")), "label": "cat"},
        {"image": data_url(png("lime")), "label": "dog"},
    ]
    waiting = asyncio.create_task(classify(http, shots=many))
    await asyncio.sleep(0.1)  # it has begun
    try:
        assert (await asyncio.wait_for(classify(http), 10))["label"] == "cat"
        assert not waiting.done()
    finally:
        may_end.set()
    assert (await waiting)["label"] == "cat"


@pytest.mark.parametrize(("module", "name"), [(comparison, "_labelled"), (retrieval, "VectorIndex")])
async def test_all_vectors_of_a_set_are_read_outside_the_event_loop(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    """Copying and dividing ten thousand takes a tenth of a second."""
    function, threads = getattr(module, name), list[int]()

    def call(*arguments: object) -> object:
        threads.append(threading.get_ident())
        return function(*arguments)

    monkeypatch.setattr(module, name, call)
    await http.post("/v1/support_sets", json={"name": "pets", "examples": SHOTS})
    await classify(http, method="nearest_mean", shots=[], examples={"support_set": "pets"})
    search = {"query": {"image": data_url(QUERY)}, "strategy": "rices_image"}
    assert (await http.post("/v1/support_sets/pets/search", json=search)).status_code == 200
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


async def test_the_query_of_a_blend_is_embedded_once_for_its_shots_and_its_likeness(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    await http.post("/v1/support_sets", json={"name": "pets", "examples": SHOTS})
    body = await classify(
        http, method="blend", shots=[], examples={"support_set": "pets", "strategy": "rices_image", "k": 2}
    )
    assert set(body["candidates"][0]["scores"]) == {"in_context", "nearest_mean"}
    num_embedded = Counter(media.digest for media in client.embedded)
    assert set(num_embedded.values()) == {1}
    assert len(num_embedded) == len({shot["image"] for shot in SHOTS}) + 1


async def test_a_blend_compares_its_query_while_the_language_model_scores(
    http: httpx.AsyncClient, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, embed, has_begun = client.score, client.embed, asyncio.Event()

    async def begin_to_score(*arguments: Any) -> Any:
        has_begun.set()
        return await score(*arguments)

    async def embed_then(media: Sequence[EncodedMedia]) -> Any:
        if media[0].digest == encoded(QUERY, "image", "").digest:
            await asyncio.wait_for(has_begun.wait(), 10)
        return await embed(media)

    monkeypatch.setattr(client, "score", begin_to_score)
    monkeypatch.setattr(client, "embed", embed_then)
    assert set((await classify(http, method="blend"))["candidates"][0]["scores"]) == {"in_context", "nearest_mean"}


async def test_auto_is_the_default_and_uses_likeness_where_it_can_be_compared(http: httpx.AsyncClient) -> None:
    body = await classify(http)
    assert body["method"] in ("nearest_mean", "knn", "linear")
    assert body["label"] == "cat"


async def test_the_choice_for_a_warm_set_is_made_before_its_first_query(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await http.post("/v1/support_sets", json={"name": "pets", "examples": SHOTS})
    warm = (await http.post("/v1/support_sets/pets/warm", json={"wait": True})).json()
    assert (warm["status"], warm["warm"]["error"]) == ("ready", None)
    monkeypatch.setattr(comparison, "best_method", None)
    monkeypatch.setattr(comparison, "load_method", None)
    body = await classify(http, shots=[], examples={"support_set": "pets"})
    assert (body["method"] in METHODS, body["label"]) == (True, "cat")


@pytest.mark.parametrize("examples", [[], SHOTS[:2], [*SHOTS, {"text": "neither media nor a label"}]])
async def test_a_set_without_a_choice_is_warmed(http: httpx.AsyncClient, examples: list[dict[str, Any]]) -> None:
    created = await http.post("/v1/support_sets", json={"name": "pets", "examples": examples})
    assert created.status_code == 200, created.text
    warm = (await http.post("/v1/support_sets/pets/warm", json={"wait": True})).json()
    assert (warm["status"], warm["warm"]["error"]) == ("ready", None)


async def test_auto_is_the_nearest_mean_where_a_label_has_a_single_example(http: httpx.AsyncClient) -> None:
    assert (await classify(http, shots=SHOTS[1:]))["method"] == "nearest_mean"


@pytest.mark.parametrize(
    "fields",
    [
        {"candidates": ["cat", "dog", "cow"]},
        {"zero_shot": True, "candidates": ["cat", "dog"]},
        {
            "shots": [{"question": "a", "text": "x"}, {"question": "b", "text": "y"}],
            "query": {"question": "c"},
            "template": {"shot": "{question} {text}"},
        },
        {"shots": [], "candidates": ["cat", "dog"]},
    ],
)
async def test_auto_asks_the_language_model_where_likeness_cannot_answer(
    http: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    assert (await classify(http, **fields))["method"] == "in_context"


@pytest.mark.parametrize("method", ["nearest_mean", "knn", "linear", "blend"])
async def test_a_method_that_cannot_answer_is_refused(http: httpx.AsyncClient, method: str) -> None:
    answer = await post(http, method=method, candidates=["cat", "dog", "cow"])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "candidates[2]"
    lack = "needs an example of each candidate, but 'cow' has none: the examples have 'cat', 'dog'"
    assert error["message"] == f"candidates[2]: {method} {lack}"


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/decisions"])
async def test_an_unknown_method_is_refused_with_the_known_ones(http: httpx.AsyncClient, path: str) -> None:
    fields = {"shots": SHOTS, "query": {"image": data_url(QUERY)}} if path == "/v1/classify" else {"input": "cat?"}
    questions = {} if path == "/v1/classify" else {"questions": [{"type": "predicate", "instructions": "Is it a cat?"}]}
    answer = await http.post(path, json={**fields, **questions, "method": "svm"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "method")
    known = '"in_context", "nearest_mean", "knn", "linear", "blend" or "auto"'
    assert answer.json()["error"]["message"] == f"method: only {known} is supported"


async def refusal(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await post(http, **fields)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


async def store(http: httpx.AsyncClient, *examples: dict[str, Any]) -> dict[str, Any]:
    """Store a set, and return the fields of a request that takes its examples from it."""
    answer = await http.post("/v1/support_sets", json={"name": "pets", "examples": list(examples)})
    assert answer.status_code == 200, answer.text
    return {"shots": [], "examples": {"support_set": "pets"}}


@pytest.mark.parametrize("method", ["nearest_mean", "knn", "linear", "auto"])
async def test_an_example_is_of_one_candidate(http: httpx.AsyncClient, method: str) -> None:
    """The label of one candidate is the text of another one, which has no example of its own."""
    candidates = [{"label": "cat", "text": "feline"}, {"label": "tiger", "text": "cat"}]
    answer = await post(http, method=method, candidates=candidates)
    if method == "auto":
        assert answer.json()["method"] == "in_context"
    else:
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "candidates[1]")
        assert "'tiger' has none" in answer.json()["error"]["message"]


@pytest.mark.parametrize("method", ["nearest_mean", "in_context"])
@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [("MAX_CANDIDATES", 1, "2 different answers"), ("MAX_CANDIDATE_LENGTH", 2, "has 3 characters, the limit is 2")],
)
async def test_examples_with_too_many_or_too_long_answers_need_candidates(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, method: str, limit: str, value: int, message: str
) -> None:
    monkeypatch.setattr(candidates_module, limit, value)
    answer = await post(http, method=method)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "candidates")
    assert message in answer.json()["error"]["message"]
    await http.post("/v1/support_sets", json={"name": "pets", "examples": SHOTS})
    warm = (await http.post("/v1/support_sets/pets/warm", json={"wait": True})).json()
    assert (warm["status"], warm["warm"]["error"]) == ("ready", None)


@pytest.mark.parametrize("method", ["auto", "nearest_mean", "knn", "linear", "blend"])
async def test_an_example_without_an_answer_is_refused_by_name(http: httpx.AsyncClient, method: str) -> None:
    unlabelled = {"image": data_url(DOGS[0]), "label": "", "id": "last"}
    error = await refusal(http, shots=[*SHOTS[:2], unlabelled], method=method)
    assert error["param"] == "shots[2]"
    assert error["message"].startswith("shots[2] has neither a label nor a text")
    stored = await store(http, *SHOTS[:2], unlabelled)
    for fields in (stored, stored | {"candidates": ["cat"]}):
        error = await refusal(http, **fields, method=method)
        assert error["param"] == "examples.support_set"
        assert error["message"].startswith("the example 'last' has neither a label nor a text")


async def test_a_set_without_an_answer_is_no_lack_of_a_set(http: httpx.AsyncClient) -> None:
    for examples in ((), ({"image": data_url(DOGS[0])},)):
        error = await refusal(http, **await store(http, *examples))
        assert error["param"] == "examples.support_set"
        assert error["message"] == "no example of the support set has a label or a text: add some, or give candidates"
        assert (await http.delete("/v1/support_sets/pets")).status_code == 200
    error = await refusal(http, shots=[{"image": data_url(DOGS[0])}])
    assert error["message"] == "no shot has a label or a text: add some, or give candidates"
    assert error["param"] == "shots"
    error = await refusal(http, shots=[])
    assert error["param"] == "candidates"


@pytest.mark.parametrize("method", ["nearest_mean", "knn", "linear"])
async def test_an_example_without_media_is_refused_by_a_method_by_likeness_as_its_own(
    http: httpx.AsyncClient, method: str
) -> None:
    message = f"{method} compares media, but shots[4] has none: the method in_context supports examples without media"
    error = await refusal(http, shots=[*SHOTS, {"label": "dog"}], method=method)
    assert error["message"].startswith(message)
    assert "template" not in error["message"]
    error = await refusal(http, query={}, method=method)
    assert error["message"].startswith(f"{method} compares media, but the query has none")
    assert error["param"] == "query"
    error = await refusal(http, query={}, method=method, zero_shot=True)
    assert error["param"] == "query"
    error = await refusal(http, **await store(http, *SHOTS, {"label": "dog", "id": "last"}), method=method)
    assert "the example 'last' has none" in error["message"]


async def test_options_of_the_language_model_choose_it_or_are_refused(http: httpx.AsyncClient) -> None:
    assert (await classify(http, permutations=2))["method"] == "in_context"
    assert (await classify(http, permutations=2, method="blend"))["method"] == "blend"
    error = await refusal(http, permutations=2, method="knn")
    assert error["param"] == "permutations"
    assert "permutations: " in error["message"]


async def test_a_selection_of_shots_is_refused_with_a_method_by_likeness(http: httpx.AsyncClient) -> None:
    await store(http, *SHOTS)
    selection = {"k": 2, "strategy": "random", "order": "stored", "seed": 1}
    for method in ("nearest_mean", "knn", "linear"):
        for name, value in selection.items():
            examples = {"support_set": "pets", name: value}
            error = await refusal(http, shots=[], examples=examples, method=method)
            assert error["param"] == f"examples.{name}"
            assert f"examples.{name}: " in error["message"]
            assert f"the method {method} compares the query with all examples" in error["message"]
            for other in ("auto", "in_context", "blend"):
                await classify(http, shots=[], examples=examples, method=other)
        # as an evaluation recommends it, and with fields that are not set
        examples = {"support_set": "pets", "version": 1, "k": None, "order": None}
        assert (await classify(http, shots=[], examples=examples, method=method))["method"] == method


@pytest.mark.parametrize("method", ["auto", "blend", "in_context"])
async def test_a_requested_number_must_be_available(http: httpx.AsyncClient, method: str) -> None:
    await store(http, *SHOTS)
    error = await refusal(http, shots=[], examples={"support_set": "pets", "k": 5}, method=method)
    assert error["param"] == "examples.k"
    assert error["message"] == "k is 5, only 4 examples can be selected"


async def test_a_support_set_is_compared_whole_and_its_vectors_are_computed_once(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    examples = [{"image": shot["image"], "label": shot["label"]} for shot in SHOTS]
    assert (await http.post("/v1/support_sets", json={"name": "pets", "examples": examples})).status_code == 200
    for _ in range(2):
        body = await classify(http, shots=[], examples={"support_set": "pets"}, method="knn")
        assert body["label"] == "cat"
        assert body["fewshot"]["version"] == 1
    digests = [media.digest for media in client.embedded]
    assert sorted(digests.count(encoded(image, "image", "").digest) for image in (*CATS, *DOGS)) == [1, 1, 1, 1]


async def test_the_label_of_an_example_is_its_answer_whatever_its_text(http: httpx.AsyncClient) -> None:
    body = await classify(http, shots=[{**shot, "text": "a pet"} for shot in SHOTS], method="knn")
    assert [candidate["label"] for candidate in body["candidates"]] == ["cat", "dog"]


async def test_candidates_may_be_a_part_of_the_labels(http: httpx.AsyncClient, client: FakeClient) -> None:
    """Examples of other labels count for none, even if they are the most similar."""
    cows = [png("blue"), png("navy")]
    client.vectors |= {encoded(image, "image", "").digest: direction(1, 0.3) for image in cows}
    shots = [*SHOTS, *({"image": data_url(image), "label": "cow"} for image in cows)]
    assert (await classify(http, shots=shots, method="knn"))["label"] == "cow"
    body = await classify(http, shots=shots, candidates=["dog", {"label": "kitty", "text": "cat"}], method="knn")
    assert [candidate["label"] for candidate in body["candidates"]] == ["kitty", "dog"]


async def test_a_linear_head_has_a_limit_and_auto_leaves_it_out_of_large_sets(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = replace(METHODS["linear"], max_examples=3, max_left_out=3)
    monkeypatch.setattr(comparison, "METHODS", {**METHODS, "linear": entry})
    answer = await post(http, method="linear")
    assert answer.json()["error"]["message"] == "linear supports up to 3 examples, but there are 4"
    monkeypatch.setattr(Linear, "fit", None)
    assert (await classify(http))["method"] in ("nearest_mean", "knn")
