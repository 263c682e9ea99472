"""Metrics equal the official evaluators, whose answers tests/goldens/make_benchmark_metrics.py stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from evaluation.benchmarks.items import MediaNames, Row
from evaluation.benchmarks.metrics import caption_words, cider, ranking, vqa_accuracy, wups
from evaluation.benchmarks.metrics.lemmas import lemmas
from evaluation.benchmarks.metrics.okvqa_stems import OkvqaStemmer
from evaluation.benchmarks.scoring import METRICS, Answer

GOLDENS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "goldens" / "benchmark_metrics.json").read_text(encoding="utf-8")
)
close = pytest.approx


@pytest.mark.parametrize(("caption", "words"), GOLDENS["cider"]["words"].items())
def test_captions_have_the_words_of_the_official_tokenizer(caption: str, words: str) -> None:
    assert caption_words.tokenize(caption) == words.split()


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


def test_accuracy_of_stems_is_that_of_openflamingo() -> None:
    """The annotations are stemmed by OpenFlamingo, which says to have found its rules in OKVQA's annotations."""
    golden = GOLDENS["okvqa"]
    stemmer = OkvqaStemmer(tuple(pair) for people in golden["questions"] for pair in people)
    assert sum(value > 0 for _, _, value in golden["cases"]) > 40
    for number, answer, value in golden["cases"]:
        people = [stemmed for _, stemmed in golden["questions"][number]]
        stem = stemmer.stem(answer)
        assert vqa_accuracy.accuracy(stem, people) == close(value, abs=1e-6), (answer, stem, people)


STEMMER = OkvqaStemmer(
    [
        ("leaves", "leaf"),
        ("Hell's kitchen", "Hell kitchen"),
        ("christmas trees", "christmas tree"),
        ("skiing", "ski"),
        ("running", "run"),
        ("batteries", "battery"),
        ("ride bike", "ride bike"),
        ("two words", "three stems here"),
        ("gas", "gas"),
    ]
)


@pytest.mark.parametrize(
    ("answer", "stem"),
    [
        ("christmas trees", "christmas tree"),  # an answer of the annotations
        (" skiing ", "ski"),
        ("green leaves.", "green leaf."),  # a word of them
        ("Leaves", "Leaf"),
        ("hell's bells", "hell bells"),
        ("skis", "ski"),  # endings of other words
        ("runs", "run"),
        ("battery", "battery"),
        ("biking", "bike"),
        ("bikes, trees", "bike, tree"),
        ("leafs", "leaf"),
        ("gas", "gas"),  # neither "ga", as no one has this stem
        ("dogs", "dogs"),  # nor "dog"
        ("words", "words"),  # not paired with one of three stems
        ("3s", "3s"),
        ("", ""),
    ],
)
def test_a_word_has_the_stem_of_the_annotations_or_loses_its_ending_to_become_one(answer: str, stem: str) -> None:
    assert STEMMER.stem(answer) == stem


def test_the_most_frequent_stem_of_a_word_is_taken() -> None:
    pairs = [("red glasses", "red glasse"), ("blue glasses", "blue glass"), ("old glasses", "old glass")]
    assert OkvqaStemmer(pairs).stem("glasses") == "glass"


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


class RecordedLexicon:
    """The lexicon of the goldens, as nltk has answered."""

    def __init__(self, tagged: list[list[str]]) -> None:
        self._tagged, self._golden = tagged, GOLDENS["lemmas"]

    def tag(self, text: str) -> list[tuple[str, str]]:
        assert text == " ".join(word for word, _ in self._tagged)
        return [(word, tag) for word, tag in self._tagged]

    def tag_alone(self, word: str) -> str:
        return str(self._golden["alone"][word])

    def lemma(self, word: str, part_of_speech: str) -> str:
        return str(self._golden["lemmas"][f"{word}/{part_of_speech}"])

    def stem(self, word: str) -> str:
        return str(self._golden["stems"][word])

    def knows(self, word: str) -> bool:
        return word in self._golden["known"]


def test_lemmas_are_those_of_pywsd() -> None:
    golden = GOLDENS["lemmas"]
    for tagged, expected in zip(golden["texts"], golden["cases"], strict=True):
        text = " ".join(word for word, _ in tagged)
        assert lemmas(text, (), RecordedLexicon(tagged)) == expected


class TinyLexicon:
    """A lexicon with a few words; alone, every word is a verb."""

    def __init__(self, tag: str, known: set[str]) -> None:
        self._tag, self._known = tag, known

    def tag(self, text: str) -> list[tuple[str, str]]:
        return [(word, self._tag) for word in text.split()]

    def tag_alone(self, word: str) -> str:
        return "VBZ"

    def lemma(self, word: str, part_of_speech: str) -> str:
        return f"{word}.{part_of_speech}"

    def stem(self, word: str) -> str:
        return word[:3]

    def knows(self, word: str) -> bool:
        return word in self._known


@pytest.mark.parametrize(
    ("tag", "known", "lemma"),
    [
        ("NNS", {"walks.n", "wal"}, "walks.n"),
        ("NNS", {"wal"}, "wal"),
        ("NNS", set(), "walks"),
        ("IN", {"walks.n", "walks.v"}, "walks.v"),  # as alone
        ("RBR", {"walks.r"}, "walks.r"),
    ],
)
def test_a_word_becomes_what_the_lexicon_knows(tag: str, known: set[str], lemma: str) -> None:
    assert lemmas("Walks", (), TinyLexicon(tag, known)) == [lemma]
    assert lemmas("Walks", {lemma}, TinyLexicon(tag, known)) == []


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


def ndcg_answers(*probabilities: float) -> list[Answer]:
    """Return a round of two candidates per probability of the first one, which alone is relevant."""
    fields = {"candidates": ("a", "b"), "facts": {"relevance": (1.0, 0.0)}}
    return [Answer(row(("a",), **fields), ranked=(("a", p), ("b", 1 - p))) for p in probabilities]


def test_an_interval_of_a_mean_is_students_and_within_the_range_of_the_metric() -> None:
    value, interval = score("ndcg", ndcg_answers(0.9, 0.9, 0.9, 0.1))
    assert value == 75.0
    assert interval == (0.0, 100.0)  # 75 - 3.1824 * 50 / 2 is negative
    _, interval = score("ndcg", ndcg_answers(*[0.9] * 30, *[0.1] * 20))
    assert interval == close((45.936, 74.064), abs=1e-3)  # 2.0096 * 49.487 / 50 ** 0.5
    dogs = [
        Answer(row(("a dog runs on the grass",) if n else ("zzz",)), text="a dog runs on the grass") for n in range(3)
    ]
    _, interval = score("cider", dogs)
    assert interval is not None
    assert interval[0] == 0.0


@pytest.mark.parametrize(("metric", "answers"), [("ndcg", ndcg_answers(0.9)), ("ndcg", ndcg_answers(0.9, 0.9))])
def test_equal_values_have_no_interval(metric: str, answers: list[Answer]) -> None:
    assert score(metric, answers) == (100.0, None)


def test_a_roc_curve_without_an_error_has_no_interval() -> None:
    labels = {"yes": 0.9, "no": 0.1}
    answers = [Answer(row((label,)), ranked=(("yes", yes), ("no", 1 - yes))) for label, yes in [*labels.items()] * 2]
    assert score("roc_auc", answers) == (100.0, None)


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


def test_an_action_may_have_a_verb_of_two_words() -> None:
    verbs = ("blow dry", "wash")
    ranked = {"blow dry hair": 0.9, "wash hair": 0.1}
    answers = []
    for verb in verbs:
        facts = {"video_id": verb, "verb": verb, "noun": "hair", "annotation": 1}
        candidates = ranked if verb == "blow dry" else {"wash hair": 0.9, "blow dry hair": 0.1}
        answers.append(Answer(row((f"{verb} hair",), facts=facts), ranked=tuple(candidates.items())))
    assert score("mwap", answers) == (100.0, None)


class PlainLexicon:
    """Every word is a noun that is its own lemma."""

    def tag(self, text: str) -> list[tuple[str, str]]:
        return [(word, "NN") for word in text.split()]

    def lemma(self, word: str, part_of_speech: str) -> str:
        return word

    def stem(self, word: str) -> str:
        return word

    def knows(self, word: str) -> bool:
        return True


def test_wups_compares_lemmas_without_stop_words(monkeypatch: pytest.MonkeyPatch) -> None:
    wordnet: Any = ModuleType("evaluation.benchmarks.metrics.wordnet")
    wordnet.check_data = lambda: None
    wordnet.WordNet = PlainLexicon
    wordnet.similarity = lambda a, b: 1.0 if a == b else 0.5
    monkeypatch.setitem(sys.modules, wordnet.__name__, wordnet)
    facts = {"type": "CW", "stop_words": ("the",)}
    answers = [Answer(row(("cat", "dog"), facts=facts), text=text) for text in ("the dog", "bird")]
    assert score("wups", answers)[0] == 75.0
    facts["stop_words"] = ()
    with pytest.raises(ValueError, match=r"WUPS needs the stopwords\.txt"):
        score("wups", answers)


def test_okvqa_compares_stems() -> None:
    people = row(("leaf",) * 6 + ("tree",) * 4, facts={"raw_answers": ("leaves",) * 6 + ("tree",) * 4})
    answers = [Answer(people, text=text) for text in ("leaves", "leaf", "trees", "bush")]
    assert score("okvqa_accuracy", answers)[0] == 75.0
    assert score("vqa_accuracy", answers)[0] == 25.0
    without_raw_answers = [Answer(row(("leaf",) * 10), text=text) for text in ("leaves", "trees")]
    assert score("okvqa_accuracy", without_raw_answers)[0] == 50.0
