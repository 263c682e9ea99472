"""The text of an answer loses the lead that its template adds, and nothing else."""

from __future__ import annotations

import pytest

from model.prompt import EncodedPrompt
from server.api.answer_text import AnswerText, Echo
from server.api.generation import GenerationRequest
from server.prompt import PreparedPrompt
from server.wire import Sampling, Token
from tests.server.fakes import EOS, TOKENIZER


def pieces(text: str | list[int], *, lead: str, stop: str = "", echo: bool = False) -> list[tuple[str, int]]:
    """Return text and offset of each token, of one byte each, up to the end."""
    ids = [*(TOKENIZER.encode_plain(text) if isinstance(text, str) else text), EOS]
    prompt = PreparedPrompt(EncodedPrompt(token_ids=TOKENIZER.encode_plain("?"), media_index=[-1], media=[]), {}, None)
    sampling = Sampling(max_tokens=99)
    generation = GenerationRequest(prompt=prompt, sampling=sampling, stop=[stop] if stop else [], lead=lead, echo=echo)
    repeated = Echo.of(prompt.encoded.token_ids, [], TOKENIZER) if echo else None
    answer, pieces = AnswerText(generation, 0, TOKENIZER, repeated), []
    for token_id in ids:
        piece = answer.take(Token(request_id="", token_id=token_id, finish_reason="stop" if token_id == EOS else None))
        pieces.append((piece.text, piece.tokens[0].offset))
        if piece.finish_reason:
            break
    return pieces


def whole(text: str, *, lead: str, stop: str = "", echo: bool = False) -> str:
    return "".join(piece for piece, _ in pieces(text, lead=lead, stop=stop, echo=echo))


@pytest.mark.parametrize(
    ("text", "lead", "expected"),
    [
        (" a cat", " ", "a cat"),
        ("  a cat", " ", " a cat"),
        ("a cat", " ", "a cat"),
        ("\n a cat", "\n ", "a cat"),
        ("\na cat", "\n ", "a cat"),
        (" \na cat", "\n ", " \na cat"),
        (" ", "  ", ""),
        (" a cat", "", " a cat"),
    ],
)
def test_the_lead_is_removed_once(text: str, lead: str, expected: str) -> None:
    assert whole(text, lead=lead) == expected


def test_offsets_count_the_returned_text() -> None:
    assert pieces(" ab", lead=" ") == [("", 0), ("a", 0), ("b", 1), ("", 2)]


@pytest.mark.parametrize("echo", [False, True])
def test_a_token_after_bytes_of_no_character_has_the_offset_of_its_text(echo: bool) -> None:
    continuation = TOKENIZER.encode_plain("é")[1]
    a, b = TOKENIZER.encode_plain("ab")
    before = len("?") if echo else 0
    answer = pieces([continuation, a, b], lead="", echo=echo)
    assert answer == [("", before), ("\ufffda", before + 1), ("b", before + 2), ("", before + 3)]
    # tokens have the offset at which undecided bytes begin, so that offsets never become smaller
    answer = pieces([continuation, *TOKENIZER.encode_plain("😀a")], lead="", echo=echo)
    assert [offset - before for _, offset in answer] == [0, 0, 0, 0, 1, 2, 3]


def test_offsets_after_a_lead_and_bytes_of_no_character() -> None:
    continuation = TOKENIZER.encode_plain("é")[1]
    ids = [*TOKENIZER.encode_plain(" a"), continuation, *TOKENIZER.encode_plain("b")]
    assert pieces(ids, lead=" ") == [("", 0), ("a", 0), ("", 1), ("\ufffdb", 2), ("", 3)]


def test_offsets_never_become_smaller_and_end_with_the_length_of_the_text() -> None:
    """Also if a character begins before the bytes ahead of it are given up, and if the answer ends within one."""
    continuation = TOKENIZER.encode_plain("é")[1]
    for ids in ([continuation] * 5 + TOKENIZER.encode_plain("😀a"), [*TOKENIZER.encode_plain("a"), continuation]):
        answer = pieces(ids, lead="")
        offsets = [offset for _, offset in answer]
        assert offsets == sorted(offsets)
        assert offsets[-1] == len("".join(text for text, _ in answer))


def test_the_answer_after_an_echoed_prompt_that_ends_within_a_character() -> None:
    first, second = TOKENIZER.encode_plain("é")
    echo = Echo.of([first], [], TOKENIZER)
    answer = echo.detokenizer.copy()
    assert (answer.push(TOKENIZER.encode_plain("a")[0]), answer.start) == ("\ufffda", 1)
    assert (echo.detokenizer.push(second), echo.detokenizer.start) == ("é", 0)


def test_an_echoed_prompt_has_the_offsets_of_its_text() -> None:
    continuation = TOKENIZER.encode_plain("é")[1]
    echo = Echo.of([continuation, *TOKENIZER.encode_plain("aé"), *TOKENIZER.encode_plain("b")], [], TOKENIZER)
    assert (echo.text, [token.offset for token in echo.tokens]) == ("\ufffdaéb", [0, 1, 2, 2, 3])


def test_a_stop_string_within_the_lead_does_not_end_the_answer() -> None:
    assert whole("\na cat\nand", lead="\n", stop="\n") == "a cat"
    assert whole("\na cat\nand", lead="", stop="\n") == ""


def test_after_an_echoed_prompt_the_answer_keeps_its_lead() -> None:
    assert whole(" a cat", lead=" ", echo=True) == " a cat"
