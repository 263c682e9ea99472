"""The token ids of a candidate are those that follow the same text in an answered shot."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model.config import PromptConfig
from model.prompt import EndOfChunk, Media, PromptTokenizer, Segment, Text, encode
from server.prompt import PromptEnd
from tests.tiny_models import CONFIGS, FAMILIES, PROMPT, Family, prompt_tokenizer

CAT = bytes(32)
SHOT: list[Segment] = [Media(CAT), Text("Output: dog"), EndOfChunk()]
MARKERS = ("</s>", "<image>", "<|endofchunk|>")


def with_markers(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in MARKERS])
    return tokenizer


def word_tokenizer(*merged: str) -> PromptTokenizer:
    """Return a byte-level BPE tokenizer of letters that also has these words as tokens; "Ġ" is a leading space."""

    def build() -> Tokenizer:
        vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        merges = []
        for word in merged:
            for end in range(2, len(word) + 1):
                if word[:end] not in vocabulary:
                    vocabulary[word[:end]] = len(vocabulary)
                    merges.append((word[: end - 1], word[end - 1]))
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return with_markers(tokenizer)

    return PromptTokenizer(build(), build(), PROMPT)


def space_prefixing_tokenizer(prompt: PromptConfig = PROMPT) -> PromptTokenizer:
    """Return a tokenizer like Llama's: every text begins with an additional space."""

    def build() -> Tokenizer:
        letters = {letter: i for i, letter in enumerate("▁ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz:")}
        vocabulary = letters | {"▁c": 60, "▁ca": 61, "▁cat": 62, "<unk>": 63}
        tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "c"), ("▁c", "a"), ("▁ca", "t")], unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return with_markers(tokenizer)

    return PromptTokenizer(build(), build(), prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answered_shot_is_the_prompt_and_the_candidate(family: Family) -> None:
    tokenizer = prompt_tokenizer(CONFIGS[family].prompt)
    prompt: list[Segment] = [*SHOT, Media(CAT), Text("Output:")]
    answered = encode([*SHOT, Media(CAT), Text("Output: cat")], tokenizer).token_ids
    ids = PromptEnd(prompt, tokenizer).ids_after(" cat")
    assert encode(prompt, tokenizer).token_ids + ids == answered
    assert tokenizer.decode(ids) == " cat"


def test_a_candidate_may_follow_media_directly() -> None:
    tokenizer = prompt_tokenizer(replace(PROMPT, strip_text=True))
    assert tokenizer.decode(PromptEnd([Media(CAT)], tokenizer).ids_after(" cat")) == "cat"


def test_the_space_belongs_to_the_candidates_token() -> None:
    tokenizer = word_tokenizer("Ġcat")
    ids = PromptEnd([Media(CAT), Text("Output:")], tokenizer).ids_after(" cat")
    assert [tokenizer.token(token_id) for token_id in ids] == ["Ġcat"]


def test_a_tokenizer_that_prefixes_texts_with_a_space_adds_no_second_one() -> None:
    tokenizer = space_prefixing_tokenizer()
    assert [tokenizer.token(i) for i in tokenizer.encode_plain(" cat")] == ["▁", "▁cat"]
    ids = PromptEnd([Media(CAT), Text("Output:")], tokenizer).ids_after(" cat")
    assert [tokenizer.token(token_id) for token_id in ids] == ["▁cat"]


def test_a_candidate_that_would_merge_with_the_prompt_is_encoded_alone() -> None:
    tokenizer = word_tokenizer("tcat")
    prompt: list[Segment] = [Text("Output")]
    assert encode([Text("Outputcat")], tokenizer).token_ids[: len("Output")] != encode(prompt, tokenizer).token_ids
    ids = PromptEnd(prompt, tokenizer).ids_after("cat")
    assert [tokenizer.token(token_id) for token_id in ids] == ["c", "a", "t"]


def test_neighbouring_texts_of_a_prompt_stay_apart() -> None:
    """IDEFICS puts a token between two texts, and trims each."""
    tokenizer = space_prefixing_tokenizer(replace(PROMPT, text_separator="<|endofchunk|>", strip_text=True))
    prompt: list[Segment] = [Media(CAT), Text("Question:"), Text("Output:")]
    answered = encode([*prompt[:-1], Text("Output: cat")], tokenizer).token_ids
    assert encode(prompt, tokenizer).token_ids + PromptEnd(prompt, tokenizer).ids_after(" cat") == answered


def test_a_candidate_that_spells_a_marker_stays_text() -> None:
    tokenizer = prompt_tokenizer()
    ids = PromptEnd([Media(CAT), Text("Output:")], tokenizer).ids_after(" <image>")
    assert tokenizer.media_token_id not in ids
    assert tokenizer.decode(ids) == " <image>"


def test_text_before_the_last_marker_has_no_effect() -> None:
    tokenizer = prompt_tokenizer()
    prompt: list[Segment] = [Text("spells </s> itself"), Media(CAT), Text("Output:")]
    assert PromptEnd(prompt, tokenizer).ids_after(" cat") == tokenizer.encode_plain(" cat")


def test_an_empty_prompt_may_have_candidates() -> None:
    assert PromptEnd([], prompt_tokenizer()).ids_after("cat") == prompt_tokenizer().encode_plain("cat")
