"""Scores of a benchmark's answers, in percent as they are published, with 95% intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import fmean
from typing import Any

from sklearn.metrics import roc_auc_score

from evaluation.benchmarks.items import Row
from evaluation.benchmarks.metrics.cider import cider
from evaluation.benchmarks.metrics.lemmas import lemmas
from evaluation.benchmarks.metrics.okvqa_stems import OkvqaStemmer
from evaluation.benchmarks.metrics.ranking import Clip, average_precisions, ndcg
from evaluation.benchmarks.metrics.vqa_accuracy import accuracy
from evaluation.benchmarks.metrics.wups import score as wups
from evaluation.intervals import Share, area_interval, mean_interval

CIDER_MAX = 10.0
NUM_AGREEING = 2  # people whose answer is right in iVQA


@dataclass(frozen=True, slots=True)
class Answer:
    """A row with its answer: a text, or candidates with their probabilities, the most likely first."""

    row: Row
    text: str = ""
    ranked: tuple[tuple[str, float], ...] = ()

    @property
    def best(self) -> str:
        return self.ranked[0][0] if self.ranked else self.text


@dataclass(frozen=True, slots=True)
class Score:
    """A score with its 95% interval; a mean of equal values has none."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        low, high = self.interval or (None, None)
        return f"{self.value:.1f}" + ("" if low is None else f" [{low:.1f}, {high:.1f}]")


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, and how many of the ranked candidates it reads; None: all of them.

    `check` raises ValueError if a package or a file that the metric needs is missing, before there is an answer.
    """

    title: str
    score: Callable[[Sequence[Answer]], Score]
    num_ranked: int | None = 1
    check: Callable[[Sequence[Row]], object] = len


def _scaled(value: float, interval: tuple[float, float] | None) -> Score:
    return Score(100 * value, None if interval is None else (100 * interval[0], 100 * interval[1]))


def _mean(values: Sequence[float], highest: float = 1.0) -> Score:
    """Return the mean of values from 0 to `highest`."""
    return _scaled(fmean(values), mean_interval(values, 0.0, highest))


def _share(values: Sequence[float]) -> Score:
    """Return the mean of values between 0 and 1, most of which are one of both."""
    share = Share(sum(values), len(values))
    return _scaled(share.value, share.interval())


def _accuracy(answers: Sequence[Answer]) -> Score:
    return _share([_plain(a.best) == _plain(a.row.answers[0]) for a in answers])


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").casefold()


def _top_1_and_5(answers: Sequence[Answer]) -> Score:
    names = [([name for name, _ in a.ranked], a.row.answers[0]) for a in answers]
    return _share([((right in ranked[:1]) + (right in ranked[:5])) / 2 for ranked, right in names])


def _vqa_accuracy(answers: Sequence[Answer]) -> Score:
    return _share([accuracy(a.text, a.row.answers) for a in answers])


def _okvqa_accuracy(answers: Sequence[Answer]) -> Score:
    """Score by stems, which are those of the people's answers to these questions."""
    people = ((a.row.facts.get("raw_answers", a.row.answers), a.row.answers) for a in answers)
    stemmer = OkvqaStemmer(pair for raw, stemmed in people for pair in zip(raw, stemmed, strict=True))
    return _share([accuracy(stemmer.stem(a.text), a.row.answers) for a in answers])


def _agreement(answers: Sequence[Answer]) -> Score:
    counts = [[_plain(text) for text in a.row.answers].count(_plain(a.text)) for a in answers]
    return _share([min(1.0, count / NUM_AGREEING) for count in counts])


def _cider(answers: Sequence[Answer]) -> Score:
    return _mean(cider([a.text for a in answers], [a.row.answers for a in answers]), CIDER_MAX)


def _ndcg(answers: Sequence[Answer]) -> Score:
    values = []
    for answer in answers:
        probabilities = dict(answer.ranked)
        scores = [probabilities[candidate] for candidate in answer.row.candidates]
        values.append(ndcg(scores, answer.row.facts["relevance"]))
    return _mean(values)


def _roc_auc(answers: Sequence[Answer]) -> Score:
    """Score the probabilities of yes; raises ValueError if all rows have one label."""
    labels = [a.row.answers[0] == "yes" for a in answers]
    if len(set(labels)) < 2:
        raise ValueError("ROC AUC needs rows of both labels")
    area = float(roc_auc_score(labels, [dict(a.ranked)["yes"] for a in answers]))
    return _scaled(area, area_interval(area, sum(labels), len(labels) - sum(labels)))


def _mwap(answers: Sequence[Answer]) -> Score:
    """Score the probabilities of all actions; the interval is over the actions."""
    # a verb and a noun may have several words each
    actions = {a.row.answers[0]: (a.row.facts["verb"], a.row.facts["noun"]) for a in answers}
    clips = [_clip(answer, actions) for answer in answers]
    if not (precisions := list(average_precisions(clips).values())):
        raise ValueError("mWAP needs a positive clip")
    return _mean(precisions)


def _clip(answer: Answer, actions: Mapping[str, tuple[str, str]]) -> Clip:
    facts = answer.row.facts
    scores = {actions[name]: p for name, p in answer.ranked if name in actions}
    return Clip(facts["video_id"], (facts["verb"], facts["noun"]), facts["annotation"], scores)


def _wordnet(rows: Sequence[Row]) -> Any:
    """Return the module of the lexicon; raises ValueError without nltk, its data or the official stop words."""
    try:
        wordnet = import_module("evaluation.benchmarks.metrics.wordnet")
    except ModuleNotFoundError:
        raise ValueError("WUPS needs nltk: pip install nltk") from None
    wordnet.check_data()
    if not all(row.facts["stop_words"] for row in rows[:1]):
        raise ValueError("WUPS needs the stopwords.txt of NExT-OE in the folder of the data")
    return wordnet


def _wups(answers: Sequence[Answer]) -> Score:
    wordnet, stop_words, values = _wordnet([a.row for a in answers]), answers[0].row.facts["stop_words"], []
    lexicon = wordnet.WordNet()
    for answer in answers:
        text, *references = (lemmas(t, stop_words, lexicon) for t in (answer.text, *answer.row.answers))
        values.append(wups(text, references, answer.row.facts["type"], wordnet.similarity))
    return _mean(values)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", _accuracy),
    "agreement": Metric("iVQA accuracy", _agreement),
    "cider": Metric("CIDEr", _cider),
    "mwap": Metric("mWAP", _mwap, None),
    "ndcg": Metric("NDCG", _ndcg, None),
    "okvqa_accuracy": Metric("VQA accuracy with stemming", _okvqa_accuracy),
    "roc_auc": Metric("ROC AUC", _roc_auc, None),
    "top_1_and_5": Metric("mean of top-1 and top-5 accuracy", _top_1_and_5, 5),
    "vqa_accuracy": Metric("VQA accuracy", _vqa_accuracy),
    "wups": Metric("WUPS", _wups, check=_wordnet),
}


def answer(row: Row, outcome: Mapping[str, Any]) -> Answer:
    """Return the answer that is recorded for a row."""
    return Answer(row, outcome.get("text", ""), tuple((name, p) for name, p in outcome.get("ranked", ())))
