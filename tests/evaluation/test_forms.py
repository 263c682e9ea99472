"""Tests of the comparison of forms: a row per form, with differences by episode and ranges over orders."""

from __future__ import annotations

from evaluation.binding import Episode
from evaluation.forms import FORMS, PREVIOUS, Answers, format_rows, in_order, summarise

EPISODE = Episode(("a", "b", "c", "d", "e"), ("v", "w", "x", "y", "z"), tuple((n, n % 5) for n in range(25)), 99, 0)


def answers(previous: bool, alone: bool, in_a_row: bool, *orders: bool) -> Answers:
    in_own_order = {name: {1: correct} for name, correct in zip(FORMS, (previous, alone, in_a_row), strict=True)}
    by_order = {name: [{1: correct} for correct in orders] for name, form in FORMS.items() if form.has_order}
    return Answers(in_own_order, by_order)


ANSWERS = [answers(True, False, True, True, False), answers(True, True, True, True, True), answers(False, False, True)]


def test_a_row_has_the_accuracy_of_its_form() -> None:
    previous, alone, in_a_row = (summarise("drawings", ANSWERS, 1, form) for form in FORMS)
    assert [str(row["accuracy"])[:5] for row in (previous, alone, in_a_row)] == ["0.667", "0.333", "1.000"]
    assert "less previous" not in previous
    assert str(alone["less previous"]).startswith("-0.333")
    assert str(in_a_row["less previous"]).startswith("+0.333")
    assert str(in_a_row["less previous"]).endswith("(previous)")


def test_orders_are_those_of_forms_that_have_one() -> None:
    previous, alone, in_a_row = (summarise("drawings", ANSWERS, 1, form) for form in FORMS)
    for row in (previous, in_a_row):
        assert (row["by order"], row["changed by order"]) == ("0.500 .. 1.000", 0.5)
    assert "by order" not in alone
    header = "| images | shots per word | shots attend | accuracy | less previous | by order | changed by order |"
    assert format_rows([previous, alone, in_a_row]).splitlines()[0] == header


def test_an_order_keeps_the_words_of_the_first_round() -> None:
    ordered = in_order(EPISODE, 0)
    assert ordered.shots != EPISODE.shots
    assert sorted(ordered.shots[:5]) == list(EPISODE.shots[:5])
    assert sorted(ordered.shots[5:]) == list(EPISODE.shots[5:])


def test_the_first_form_is_that_of_the_paper() -> None:
    assert FORMS[PREVIOUS].shots_attend == "previous"
