"""Store what the official evaluators say of fabricated answers: `make_benchmark_metrics.py SOURCES WORDNET`.

SOURCES has the evaluators that are in no package, with the names of their repositories: `compute_score.py` of
antoine77340/RareAct, `metrics.py` of doc-doc/NExT-OE, and `visdialch/metrics.py` of batra-mlp-lab's starter code as
`visdial_metrics.py`; the folder `open_flamingo` of the wheel of open-flamingo 2.0.1; and `pywsd/utils.py` of pywsd 1.2.4,
which NExT-OE uses, as `pywsd_utils.py`, without its import of `pywsd.tokenize`. benchmark-metrics-requirements.txt has the
packages. CIDEr's tokenizer needs Java. WORDNET has the files of WordNet 3.0, as in Debian's wordnet-base, and its
`lexnames`; nltk reads them if NLTK_DATA is the folder around it.

What nltk's tokenizer and tagger have learned is in no package. The tokenizer of NExT-OE's metric receives lemmas, which it
does not split further: it is replaced by a split at spaces. Tags are given in this file, and OKVQA's stemmer has nltk's
tokenizer of one sentence.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import nltk
import numpy as np
import pandas as pd
import torch
from nltk import NLTKWordTokenizer
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.stem import PorterStemmer, WordNetLemmatizer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

OUT = Path(__file__).with_name("benchmark_metrics.json")

CAPTIONS = [
    "A man riding a wave on top of a surfboard.",
    "Two dogs play, and a cat isn't amused!",
    "a woman's hand holding 2 t-shirts",
    "There are 1,000 people in front of St. Mary's church (at night).",
    'A sign that says "stop" on the street corner',
    "The kids can't wait; they're eating ice-cream & cake",
    "a red/white bus: number 42 at 3:30 pm",
    "A cat",
    "",
]
REFERENCES = [
    ["A surfer rides a large wave.", "A man on a surfboard riding a wave.", "man riding a wave on top of a surfboard"],
    ["Two dogs are playing while a cat watches.", "The cat isn't amused by two dogs.", "dogs and a cat, playing"],
    ["A woman holds two t-shirts.", "A woman's hand holding up 2 shirts", "hand with t-shirts"],
    ["A crowd of 1,000 people at St. Mary's church.", "People in front of a church at night."],
    ["A stop sign on a street corner.", "A sign says \"stop\".", "the corner of a street, with a sign"],
    ["Kids who're eating ice-cream.", "They can't wait for cake & ice cream.", "children eating cake"],
    ["A red/white bus, number 42.", "A bus at 3:30 pm", "the red and white bus"],
    ["A cat sleeps.", "A cat on a sofa", "There's a cat."],
    ["A photo of nothing.", "An empty room"],
]  # fmt: skip

# captions whose words alone are stored
WORDY = [
    "The U.S. flag at 5 p.m. on a pole",
    "A man w/ a dog and 2 1/2 cakes",
    "rock 'n' roll",
    "The dogs' bowls and James' cup",
    "Sign #1 costs $5, or 100% more",
    "A 20-year-old skier in mid-air - nearly falling",
    "You cannot know what they're gonna do",
    "It is 5 o'clock... maybe",
    "A 'quoted' word and a \"double\" one",
    "cats--and dogs",
    "Mr. Smith and Dr. Jones [blurred] look at J. K.",
    "bus no.1 and/or tram no. 2",
    "I'd say she'll go, he's here, we've won, I'm glad",
    "A man , woman and child are walking .",
    "it's a dog; its bowl is full!?",
    "wine & cheese, black+white",
    "two men shouldn't've come",
    "a {red} <blue> ball",
    "a man in a t-shirt's pocket",
    "An S.U.V. drives",
    "a girl of 3yrs",
    "they walk,then run",
    "a sign:stop",
    "a dog(brown)runs",
    "A man rides a wave.he is on a board",
    "A street.There are cars.",
    "a cat.dog.bird on www.site.com",
    "a dark.half-eaten cake in the U.S.-made oven",
    "plates, cups, forks, etc.",
    "a cup, etc. and more (etc.)",
    "Jan. 5th at Sunset Blvd. on a Mon. in Calif.",
    "Prof. Lee, Lt. Col. Jones and Gen. Day of Acme Corp.",
    "a 5 ft. fish and 3 lb. of rice in a dept. store",
    "the no. of dogs, No. 5, nos. 7 and fig. 2",
    "a Ph.D. student at 7 a.m",
    "a car from the '90s, or '85",
    "y'all watch 'em, 'tis late and 'twas cold 'til dawn",
    "gimme a hot dog, d'you see",
    "hors d'oeuvres, s'mores, ma'am, c'mon, ol' man",
    "fish 'n chips and rock n' roll",
    "the child don`t play",
    "50¢, £5, €20, ¥100 and $3.50",
    "½ cup, 1½ cups and ¾ of a pie",
    "a sign: 90° turn ©2010 ★ brand™",
    "a < b > c ~ d ^ e | f",
    "<b>bold</b> &amp; &quot;fine&quot;",
    "at&t AT&T Q&A mac&cheese B&W",
    "#hashtag @user me@site.com http://site.com/x",
    "c++ and c# at -5 degrees, +5 and .5 m",
    "so\u00adft",
]  # fmt: skip

PEOPLE = [
    ["red"] * 4 + ["dark red"] * 3 + ["maroon"] * 2 + ["Red."],
    ["2"] * 5 + ["two"] * 3 + ["a couple", "none"],
    ["it's a dog"] * 2 + ["its a dog"] * 3 + ["dog"] * 5,
    ["1,000"] * 3 + ["1000"] * 4 + ["1.000", "1 000", "a thousand"],
    ["don't know"] * 3 + ["dont know"] * 4 + ["can't tell", "cant tell", "unknown"],
    ["t-shirt"] * 3 + ["t shirt"] * 3 + ["tshirt"] * 2 + ["shirt", "the shirt"],
    ["yes, sir"] * 3 + ["yes"] * 6 + ["no"],
    ["red/white"] * 4 + ["red and white"] * 3 + ["(red)", "red ,white", "red?"],
    ["3.5"] * 3 + ["3.5 m."] * 2 + ["U.S.A."] * 3 + ["usa", "USA"],
    ["someone'd"] * 5 + ["y'allll"] * 3 + ["Im", "wouldnt've"],
    ["line\nbreak"] * 4 + ["line break"] * 2 + [" tab\tbed "] * 4,
]  # fmt: skip
ANSWERS = ["red", "Red.", "dark red", "2", "two", "A couple", "it's a dog", "dog", "the dog", "1000", "1,000", "1.000"]
ANSWERS += ["don't know", "dont know", "can't tell", "t shirt", "t-shirt", "tshirt", "yes", "yes, sir", "red white"]
ANSWERS += [
    "red/white",
    "red",
    "3.5",
    "3.5 m",
    "USA",
    "U.S.A",
    "somebodyd",
    "y'all'll",
    "i'm",
    "line break",
    "tab bed",
    "",
]

WUPS = [
    ("dog play", ["cat play", "animal run"]),
    ("sit table", ["chair"]),
    ("red", ["blue", "colour"]),
    ("man walk street", ["woman walk road", "person"]),
    ("qwerty", ["dog"]),
    ("qwerty dog", ["qwerty"]),
    ("", ["dog"]),
    ("two", ["two"]),
    ("eat cake", ["drink water", "eat cake happily"]),
]

# for each question, what five people have answered, each twice as in OKVQA; they never agree
OKVQA_PEOPLE = [
    ["surfboards", "surfboard", "surf boards", "board", "surfing"],
    ["leaves", "leaf", "green leaves", "trees", "leaves"],
    ["skiing", "ski", "snow skiing", "skis", "skiing"],
    ["hot dogs", "hot dog", "frankfurters", "sausage", "hot dogs"],
    ["christmas", "christmas", "christmas", "christmas", "holiday"],
    ["riding", "riding horses", "horse riding", "rodeo", "ride"],
    ["men's clothing", "clothes", "suits", "clothing", "wedding dress"],
    ["firefighters", "fireman", "firefighters", "police", "firefighting"],
    ["glasses", "glass", "wine glasses", "glasses", "2 glasses"],
    ["1990s", "90's", "1990s", "ninety", "1990s"],
    ["running", "run", "jogging", "exercise", "marathon"],
    ["batteries", "battery", "double a batteries", "electricity", "power"],
    ["tennis", "tennis", "tennis", "tennis", "sport"],
    ["knives", "knife", "butter knife", "fork and knife", "sharp knives"],
]
OKVQA_ANSWERS = ["surfboards", "Surfboards", "surf board.", "surfing", "leaves", "a leaf", "Leaf", "tree", "green leaf"]
OKVQA_ANSWERS += ["skiing", "the skis", "skiing!", "hot dogs", "hot dog", "sausages", "frankfurter", "the hot dogs"]
OKVQA_ANSWERS += ["christmas", "Christmas", "riding", "rides", "horses riding", "horse", "rodeos", "clothing", "a suit"]
OKVQA_ANSWERS += ["wedding dresses", "firefighters", "firefighting", "police", "glasses", "wine glass", "two glasses"]
OKVQA_ANSWERS += ["1990s", "1990", "running", "joggings", "exercises", "marathons", "batteries", "battery", "powers"]
OKVQA_ANSWERS += ["tennis", "Tennis", "knives", "a knife", "forks and knives", "butter knives", "exercising", "bus", ""]
# plural nouns of these answers, to which nltk's tagger gives this tag
PLURALS = """
    surfboards boards leaves trees skis dogs frankfurters horses clothes suits firefighters glasses 1990s batteries knives
    sausages rides rodeos dresses joggings exercises marathons powers forks
"""
TOKENIZER = NLTKWordTokenizer()

# texts of words with their tags of the Penn Treebank, and the tags that other words have alone
TAGGED = """
    The/DT two/CD dogs/NNS were/VBD happily/RB running/VBG after/IN a/DT bigger/JJR cat/NN ./.
    She/PRP is/VBZ wearing/VBG sunglasses/NNS and/CC her/PRP$ best/JJS shoes/NNS
    to/TO hold/VB the/DT baby/NN 's/POS hands/NNS
    it/PRP ca/MD n't/RB walk/VB yet/RB
    leaves/VBZ the/DT leaves/NNS behind/IN
    women/NNS playing/VBG ukuleles/NNS on/IN Christmas/NNP
    skateboarding/VBG with/IN qwertys/NNS and/CC selfie-sticks/NNS
    Better/RBR than/IN those/DT geese/NNS
    falls/VBZ over/RP because/IN of/IN us/PRP
"""
ALONE = {"two": "CD", "after": "RB", "she": "PRP", "her": "PRP$", "to": "TO", "'s": "POS", "ca": "NN", "behind": "IN"}
ALONE |= {"over": "IN", "those": "DT", "than": "IN", "us": "PRP", "on": "IN", "of": "IN", "because": "IN", "it": "PRP"}
ALONE |= {"the": "DT", "a": "DT", "and": "CC", "with": "IN", ".": "."}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cider() -> dict[str, Any]:
    tokenizer = PTBTokenizer()
    captions = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(CAPTIONS)})
    references = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(REFERENCES)})
    mean, scores = Cider().compute_score(references, captions)
    words = {
        text: words for i, texts in enumerate(REFERENCES) for text, words in zip(texts, references[i], strict=True)
    }
    words |= {text: captions[i][0] for i, text in enumerate(CAPTIONS)}
    wordy = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(WORDY)})
    words |= {text: wordy[i][0] for i, text in enumerate(WORDY)}
    return {
        "captions": CAPTIONS,
        "references": REFERENCES,
        "words": words,
        "scores": list(map(float, scores)),
        "mean": float(mean),
    }


def vqa_accuracy(sources: Path) -> dict[str, Any]:
    """Store the accuracy of each answer for each list of people, who all disagree."""
    evaluator, pairs = evaluate_vqa(sources, list(product(PEOPLE, ANSWERS)))
    contractions = {key: value for key, value in evaluator.contractions.items() if key == key.lower() and key != value}
    return {"cases": pairs, "contractions": contractions}


def evaluate_vqa(sources: Path, pairs: list[Any]) -> tuple[Any, list[Any]]:
    """Return the evaluator of pairs of people's answers and an answer, and the pairs with their accuracy."""
    module = load(sources / "open_flamingo" / "eval" / "vqa_metric.py")
    rows, predictions = [], []
    for number, (people, answer) in enumerate(pairs):
        identity = {"question_id": number, "image_id": number, "question_type": "what", "answer_type": "other"}
        answers = [{"answer": text, "answer_id": i} for i, text in enumerate(people)]
        rows.append({**identity, "answers": answers})
        predictions.append({**identity, "answer": answer})
    truth, results = module.VQA(), module.VQA()
    for vqa, entries in ((truth, rows), (results, predictions)):
        vqa.dataset, vqa.questions = {"annotations": entries}, {"questions": entries}
        vqa.createIndex()
    evaluator = module.VQAEval(truth, results, n=10)
    evaluator.evaluate()
    return evaluator, [(*pair, evaluator.evalQA[number] / 100) for number, pair in enumerate(pairs)]


def okvqa(sources: Path) -> dict[str, Any]:
    """Store the people's stemmed answers, and the accuracy of each answer for each question."""
    module: Any = load(sources / "open_flamingo" / "eval" / "ok_vqa_utils.py")
    module.nltk = SimpleNamespace(pos_tag=tag_plurals, tokenize=SimpleNamespace(word_tokenize=TOKENIZER.tokenize))
    questions = []
    for raw in OKVQA_PEOPLE:
        texts = [text for text in raw for _ in range(2)]
        questions.append([(text, module.stemmer.stem(text)) for text in texts])
    pairs = list(product(range(len(questions)), OKVQA_ANSWERS))
    stemmed = [
        ([stem for _, stem in questions[number]], module.postprocess_ok_vqa_generation(answer))
        for number, answer in pairs
    ]
    _, scored = evaluate_vqa(sources, stemmed)
    cases = [(*pair, value) for pair, (_, _, value) in zip(pairs, scored, strict=True)]
    return {"questions": questions, "cases": cases}


def tag_plurals(words: list[str]) -> list[tuple[str, str]]:
    return [(word, "NNS" if word.lower() in PLURALS.split() else "NN") for word in words]


def ndcg(sources: Path) -> list[Any]:
    module, rng, cases = load(sources / "visdial_metrics.py"), Random(0), []
    for _ in range(20):
        scores = [rng.random() for _ in range(100)]
        relevance = [rng.choice((0.0,) * 20 + (0.2, 0.4, 0.6, 0.8, 1.0)) for _ in range(100)]
        metric = module.NDCG()
        # two equal rows: the evaluator drops the axis of a single one
        metric.observe(
            torch.tensor([scores] * 2, dtype=torch.float64), torch.tensor([relevance] * 2, dtype=torch.float64)
        )
        cases.append((scores, relevance, metric.retrieve()["ndcg"]))
    return cases


def mwap(sources: Path) -> dict[str, Any]:
    rng = Random(0)
    actions = [("drill", "phone"), ("drill", "egg"), ("wash", "phone"), ("cut", "car"), ("fry", "shoe")]
    rows = []
    for number in range(80):
        action = rng.randrange(len(actions))
        annotation = rng.choice((0, 1, 1, 2, 3, 4)) if action < 4 else rng.choice((0, 2, 3))
        rows.append((number, f"video{rng.randrange(12)}", 0, 10, action, *actions[action], annotation))
    scores = np.random.default_rng(0).random((len(rows), len(actions)))
    columns = ["id", "video_id", "start", "end", "class_id", "verb", "noun", "annotation"]
    with tempfile.TemporaryDirectory() as folder:
        pd.DataFrame(rows, columns=columns).to_csv(Path(folder) / "rareact.csv", index=False)
        np.save(Path(folder) / "scores.npy", scores)
        command = [sys.executable, str((sources / "compute_score.py").resolve()), "scores.npy"]
        output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return {"rows": rows, "actions": actions, "scores": scores.tolist(), "mwap": float(output.removeprefix("mAP "))}


def wups(sources: Path, wordnet: WordNetCorpusReader) -> dict[str, Any]:
    module: Any = load(sources / "metrics.py")
    module.wordnet = wordnet
    module.word_tokenize = str.split
    words = sorted({word for answer, references in WUPS for text in (answer, *references) for word in text.split()})
    similarities = [(a, b, float(module.wup(a, b, 0))) for a, b in product(words, words)]
    cases = [(answer, refs, max(float(module.get_wups(answer, ref, 0)) for ref in refs)) for answer, refs in WUPS]
    return {"similarities": similarities, "cases": cases}


def lemmas(sources: Path, wordnet: WordNetCorpusReader) -> dict[str, Any]:
    """Store the lemmas of tagged texts, and all that pywsd asks of nltk to find them."""
    module: Any = load(sources / "pywsd_utils.py")
    module.wn, module.pos_tag = wordnet, lambda words: [(word, ALONE[word]) for word in words]
    lemmatizer, stemmer = WordNetLemmatizer(), PorterStemmer()
    texts = [[word.rsplit("/", 1) for word in line.split()] for line in TAGGED.strip().split("\n")]
    words = sorted({word.lower() for text in texts for word, _ in text})
    lemmas = {f"{word}/{part}": lemmatizer.lemmatize(word, part) for word in words for part in "anrv"}
    stems = {word: stemmer.stem(word) for word in words}
    return {
        "texts": texts,
        "alone": ALONE,
        "lemmas": lemmas,
        "stems": stems,
        "known": sorted(word for word in {*lemmas.values(), *stems.values()} if wordnet.synsets(word)),
        "cases": [module.lemmatize_sentence("", tokenizer=str, postagger=lambda _, text=text: text) for text in texts],
    }


def main() -> None:
    WordNetCorpusReader.map_wn = lambda self, version="wordnet": None  # to other versions
    sources, wordnet = Path(sys.argv[1]), WordNetCorpusReader(sys.argv[2], None)
    nltk.corpus.wordnet = wordnet  # that of nltk's lemmatizer
    goldens = {
        "cider": cider(),
        "vqa_accuracy": vqa_accuracy(sources),
        "ndcg": ndcg(sources),
        "mwap": mwap(sources),
        "wups": wups(sources, wordnet),
        "lemmas": lemmas(sources, wordnet),
        "okvqa": okvqa(sources),
    }
    OUT.write_text(json.dumps(goldens) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
