"""Metrics equal the official evaluators, whose answers tests/goldens/make_benchmark_metrics.py stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from evaluation.benchmarks.items import MediaNames, Row
from evaluation.benchmarks.metrics import cider, ranking, vqa_accuracy, wups
from evaluation.benchmarks.scoring import METRICS, Answer

GOLDENS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "goldens" / "benchmark_metrics.json").read_text(encoding="utf-8")
)
close = pytest.approx


@pytest.mark.parametrize(("caption", "words"), GOLDENS["cider"]["words"].items())
def test_captions_have_the_words_of_the_official_tokenizer(caption: str, words: str) -> None:
    assert cider.tokenize(caption) == words.split()


def test_cider_is_that_of_coco_caption() -> None:
    golden = GOLDENS["cider"]
    scores = cider.cider(golden["captions"], golden["references"])
    assert scores == close(golden["scores"], abs=1e-6)
    assert sum(scores) / len(scores) == close(golden["mean"], abs=1e-6)


def test_vqa_accuracy_is_that_of_the_official_evaluator() -> None:
    cases = GOLDENS["vqa_accuracy"]["cases"]
    assert sum(value > 0 for _, _, value in cases) > 30
    for people, answer, value in cases:
        assert vqa_accuracy.accuracy(answer, people) == close(value, abs=1e-6), (people, answer)


def test_contractions_are_those_of_the_official_evaluator() -> None:
    """The official table has some with a capital I as well, which no text in lower case has."""
    assert GOLDENS["vqa_accuracy"]["contractions"] == vqa_accuracy.CONTRACTIONS


@pytest.mark.parametrize(("answer", "value"), [("Yes", 1.0), ("yes", 0.0), (" Yes\n", 1.0)])
def test_an_answer_is_not_normalised_if_all_people_agree(answer: str, value: float) -> None:
    assert vqa_accuracy.accuracy(answer, ["Yes"] * 10) == value


def test_ndcg_is_that_of_the_challenge() -> None:
    for scores, relevance, value in GOLDENS["ndcg"]:
        assert ranking.ndcg(scores, relevance) == close(value, abs=1e-6)


def test_mwap_is_that_of_rareact() -> None:
    golden = GOLDENS["mwap"]
    actions = [tuple(action) for action in golden["actions"]]
    clips = [
        ranking.Clip(row[1], (row[5], row[6]), row[7], dict(zip(actions, scores, strict=True)))
        for row, scores in zip(golden["rows"], golden["scores"], strict=True)
    ]
    precisions = ranking.average_precisions(clips)
    assert len(precisions) == 4  # one action has no positive clip
    assert sum(precisions.values()) / 4 == close(golden["mwap"], abs=1e-6)


def test_wups_is_that_of_nextqa() -> None:
    similarities = {(a, b): value for a, b, value in GOLDENS["wups"]["similarities"]}
    for answer, references, value in GOLDENS["wups"]["cases"]:
        lemmas = [reference.split() for reference in references]
        score = wups.score(answer.split(), lemmas, "CW", lambda a, b: similarities[a, b])
        assert score == close(value, abs=1e-6), (answer, references)


def test_counts_must_be_equal_in_wups() -> None:
    assert wups.score(["two"], [["three"], ["two"]], "DC", lambda a, b: 0.9) == 1.0
    assert wups.score(["two"], [["three"]], "DC", lambda a, b: 0.9) == 0.0
    assert wups.score(["two"], [["three"]], "CW", lambda a, b: 0.9) == 0.9


def score(metric: str, answers: list[Answer]) -> tuple[float, tuple[float, float] | None]:
    result = METRICS[metric].score(answers)
    return result.value, result.interval


def row(answers: tuple[str, ...], **fields: Any) -> Row:
    return Row(id="1", where="", media=MediaNames([]), answers=answers, **fields)


def test_accuracies_are_in_percent_with_an_interval() -> None:
    right, wrong = Answer(row(("cat",)), text="Cat."), Answer(row(("dog",)), text="cat")
    value, interval = score("accuracy", [right, wrong])
    assert value == 50.0
    assert interval == close((9.4531, 90.5469), abs=1e-3)
    ranked = Answer(row(("b",)), ranked=(("a", 0.5), ("b", 0.3), ("c", 0.2)))
    assert score("accuracy", [ranked])[0] == 0.0
    assert score("top_1_and_5", [ranked])[0] == 50.0


@pytest.mark.parametrize(("answer", "value"), [("pan", 100.0), ("pot", 50.0), ("lid", 0.0)])
def test_two_of_five_people_agree_in_ivqa(answer: str, value: float) -> None:
    assert score("agreement", [Answer(row(("pan", "pan", "pot", "bowl", "mug")), text=answer)])[0] == value


def test_roc_auc_is_of_the_probability_of_yes() -> None:
    answers = [
        Answer(row((label,)), ranked=(("yes", yes), ("no", 1 - yes)))
        for label, yes in [("yes", 0.9), ("yes", 0.4), ("no", 0.5), ("no", 0.1)]
    ]
    value, interval = score("roc_auc", answers)
    assert value == 75.0
    assert interval is not None
    assert interval[0] < 75.0 < interval[1] <= 100.0
    with pytest.raises(ValueError, match="rows of both labels"):
        score("roc_auc", answers[:2])


def test_ndcg_reads_the_candidates_in_their_own_order() -> None:
    fields = {"candidates": ("a", "b", "c"), "facts": {"relevance": (0.0, 1.0, 0.0)}}
    first = Answer(row(("b",), **fields), ranked=(("b", 0.9), ("a", 0.1), ("c", 0.0)))
    second = Answer(row(("b",), **fields), ranked=(("c", 0.9), ("b", 0.1), ("a", 0.0)))
    assert score("ndcg", [first])[0] == 100.0
    assert score("ndcg", [second])[0] == 0.0


def test_wups_compares_lemmas_without_stop_words(monkeypatch: pytest.MonkeyPatch) -> None:
    lexicon: Any = ModuleType("evaluation.benchmarks.metrics.wordnet")
    lexicon.check_data = lambda: None
    lexicon.lemmas = lambda text, stop_words: [word for word in text.split() if word not in stop_words]
    lexicon.similarity = lambda a, b: 1.0 if a == b else 0.5
    monkeypatch.setitem(sys.modules, lexicon.__name__, lexicon)
    facts = {"type": "CW", "stop_words": ("the",)}
    answers = [Answer(row(("cat", "dog"), facts=facts), text=text) for text in ("the dog", "bird")]
    assert score("wups", answers)[0] == 75.0
    facts["stop_words"] = ()
    with pytest.raises(ValueError, match=r"WUPS needs the stopwords\.txt"):
        score("wups", answers)
