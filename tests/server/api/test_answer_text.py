"""An answer's text token by token: what its template puts in front of it is taken off, and nothing else."""

from __future__ import annotations

import pytest

from model.prompt import EncodedPrompt
from server.api.answer_text import AnswerText
from server.api.generation import GenerationRequest
from server.prompt import PreparedPrompt
from server.wire import Sampling, Token
from tests.server.fakes import EOS, TOKENIZER


def pieces(text: str, *, lead: str, stop: str = "", echo: bool = False) -> list[tuple[str, int]]:
    """Text and offset of each token of one byte, up to the end."""
    ids = [*TOKENIZER.encode_plain(text), EOS]
    prompt = PreparedPrompt(EncodedPrompt(token_ids=TOKENIZER.encode_plain("?"), media_index=[-1], media=[]), {}, None)
    sampling = Sampling(max_tokens=99)
    generation = GenerationRequest(prompt=prompt, sampling=sampling, stop=[stop] if stop else [], lead=lead, echo=echo)
    answer, found = AnswerText(generation, 0, TOKENIZER), []
    for token_id in ids:
        piece = answer.take(Token(request_id="", token_id=token_id, finish_reason="stop" if token_id == EOS else None))
        found.append((piece.text, piece.tokens[0].offset))
        if piece.finish_reason:
            break
    return found


def whole(text: str, *, lead: str, stop: str = "", echo: bool = False) -> str:
    return "".join(piece for piece, _ in pieces(text, lead=lead, stop=stop, echo=echo))


@pytest.mark.parametrize(
    ("text", "lead", "shown"),
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
def test_the_lead_is_taken_off_once(text: str, lead: str, shown: str) -> None:
    assert whole(text, lead=lead) == shown


def test_offsets_count_what_is_shown() -> None:
    assert pieces(" ab", lead=" ") == [("", 0), ("a", 0), ("b", 1), ("", 2)]


def test_a_stop_string_within_the_lead_does_not_end_the_answer() -> None:
    assert whole("\na cat\nand", lead="\n", stop="\n") == "a cat"
    assert whole("\na cat\nand", lead="", stop="\n") == ""


def test_behind_the_echoed_prompt_the_answer_is_as_it_was_written() -> None:
    assert whole(" a cat", lead=" ", echo=True) == " a cat"
