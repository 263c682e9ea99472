"""Files of answers: lines that are damaged, settings of other runs, and runs at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.benchmarks.journal import Journal

NOT_A_NUMBER = '{"id": "1", "ranked": [["a", NaN]]}'


def read(folder: Path, seed: int = 0) -> None:
    with Journal(folder, "coco", {"seed": seed}):
        pass


def test_a_journal_with_other_settings_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path, "coco", {"seed": 0}) as journal:
        journal.write({"id": "1", "text": "a"})
    path = journal.path.rename(journal.path.with_name(Journal(tmp_path / "other", "coco", {"seed": 1}).path.name))
    with pytest.raises(ValueError, match="answers of a run with other settings"):
        read(tmp_path, seed=1)
    assert path.exists()


def test_a_damaged_line_of_a_journal_is_named(tmp_path: Path) -> None:
    with Journal(tmp_path, "coco", {"seed": 0}) as journal:
        journal.write({"id": "1", "text": "a"})
    journal.path.write_text(journal.path.read_text().replace('"text"', '"te'))
    with pytest.raises(ValueError, match=r"coco-.*\.jsonl, line 2 is damaged: .*; remove the line to ask again"):
        read(tmp_path)


@pytest.mark.parametrize("line", ["3", "{}", '{"id": 1, "text": ""}', '{"id": "1", "ranked": []}', NOT_A_NUMBER])
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, line: str) -> None:
    with Journal(tmp_path, "coco", {"seed": 0}) as journal:
        journal.write({"id": "1", "ranked": [["a", 0.5]]})
    with Journal(tmp_path, "coco", {"seed": 0}) as journal:
        assert journal.outcomes.keys() == {"1"}
    with journal.path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"coco-.*\.jsonl, line 3 is damaged: .* is no answer; remove the line"):
        read(tmp_path)


def test_a_journal_has_one_run_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path, "coco", {"seed": 0}), pytest.raises(ValueError, match=r"another run writes .*coco-.*jsonl"):
        read(tmp_path)
    read(tmp_path)
