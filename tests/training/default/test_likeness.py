"""The ancestors of classes, from lines in the form of WordNet's `data.noun`."""

from __future__ import annotations

from training.default.likeness import find_ancestors, read_hypernyms

LINES = [
    "  1 This software and database is being provided to you",
    "00000001 03 n 01 entity 0 002 ~ 00000002 n 0000 ~ 00000003 n 0000 | all there is",
    "00000002 03 n 02 animal 0 beast 0 001 @ 00000001 n 0000 | living | with a bar",
    "00000003 06 n 01 thing 0 002 @ 00000001 n 0000 + 00000009 v 0101 | not alive",
    "00000004 05 n 01 cat 0 002 @ 00000002 n 0000 ~ 00000005 n 0000 | purrs",
    "00000005 05 n 01 tabby 0 001 @ 00000004 n 0000 | striped",
    "00000006 05 n 01 dog 0 001 @i 00000002 n 0000 | barks",
    "00000007 06 n 01 cup 0 001 @ 00000003 n 0000 | holds tea",
]


def test_hypernyms_are_read_and_other_pointers_are_not() -> None:
    hypernyms = read_hypernyms(LINES)
    assert hypernyms["00000004"] == ["00000002"]
    assert hypernyms["00000003"] == ["00000001"]
    assert hypernyms["00000006"] == ["00000002"]
    assert hypernyms["00000001"] == []


def test_a_node_has_the_classes_below_it_and_equal_nodes_are_one() -> None:
    ancestors = find_ancestors(["00000005", "00000006", "00000007"], read_hypernyms(LINES))
    # tabby and cat have the same class, as thing and cup do; the root is left out
    assert sorted(map(tuple, ancestors.tolist())) == sorted(
        [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
    )
