"""VQA accuracy: an answer is right if three of nine people gave it, averaged over the ten ways to leave one of them out.

Texts are normalised as in the official evaluator, github.com/GT-Vision-Lab/VQA (`vqaEval.py`): punctuation, articles,
numerals and contractions, and only if people's answers differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMERALS)}}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUM_AGREEING = 3

# a word without one of its apostrophes becomes the word
_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_PERSON = "some" + "body"
_WORDS = (*_APOSTROPHES.split(), f"{_PERSON}'d've", f"{_PERSON}'ll", f"{_PERSON}'s")
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _WORDS for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS[f"{_PERSON}'d"] = f"{_PERSON}d"  # as in the official table

_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the official evaluator passes a flag in the position of this count


def normalise(answer: str) -> str:
    text = answer
    for mark in PUNCTUATION:
        is_apart = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if is_apart or _DIGIT_COMMA.search(answer) else " ")
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, people: Sequence[str]) -> float:
    """Return the accuracy of an answer, from 0 to 1, by the answers of people."""
    answer, *texts = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *people))
    if len(set(texts)) > 1:
        answer, *texts = map(normalise, (answer, *texts))
    num_equal = texts.count(answer)
    # a person who gave the answer is not among the other nine
    return sum(min(1.0, (num_equal - (text == answer)) / NUM_AGREEING) for text in texts) / len(texts)
