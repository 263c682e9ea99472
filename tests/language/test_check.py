"""The language check reports a violation of each kind with its line, and passes plain English."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.language import check
from tests.language.check import (
    WORDS,
    check_docstring,
    check_prose,
    check_python,
    files_below,
    main,
    parse_rules,
)

FOLDER = Path(__file__).resolve().parent
RULES = parse_rules(WORDS.read_text(encoding="utf-8"))
# the words are artificial, so that this file passes the check itself
ARTIFICIAL = parse_rules(
    """
# a comment
name: Frob|(\\w+_)?frob -> Gadget
variable: blip -> the noun
function: zork -> run
file: quux -> example
phrase: grue for -> expected
phrase: least plugh -> minimum level
"""
)


def reported(source: str, path: str = "server/app.py") -> list[str]:
    return [str(finding) for finding in check_python(path, source, ARTIFICIAL)]


@pytest.mark.parametrize(
    "source",
    [
        "class Frob: pass",
        "import server.frob",
        "from server import Frob",
        "from server import Widget as Frob",
        "item.is_frob",
        "call(frob=1)",
        "def f(_frob): pass",
        "global_ = lambda: frob",
        "match x:\n    case [*frob]: pass",
    ],
)
def test_a_name_is_refused_wherever_code_uses_it(source: str) -> None:
    findings = reported(source)
    assert findings
    assert all(finding.endswith("-> write Gadget") for finding in findings)


@pytest.mark.parametrize("source", ["class Frobs: pass", "x = 'frob'", "# Frob", "def f(frobnicate): pass"])
def test_a_name_is_refused_as_a_whole_word_of_code_alone(source: str) -> None:
    assert not reported(source)


@pytest.mark.parametrize(
    "source",
    [
        "blip = 1",
        "for blip in x: pass",
        "[blip for blip in x]",
        "def f(blip): pass",
        "def f(*, blip=1): pass",
        "lambda blip: 1",
        "if (blip := 1): pass",
        "with x as blip: pass",
        "try: pass\nexcept OSError as blip: pass",
        "self._blip = 1",
        "blip: int = 1",
    ],
)
def test_a_bound_variable_is_refused(source: str) -> None:
    assert any(": blip -> write the noun" in line or ": _blip -> write the noun" in line for line in reported(source))


def test_a_variable_rule_allows_reads_and_functions() -> None:
    assert not reported("print(item.blip)\ndef blip(): pass\n")


def test_a_function_rule_refuses_definitions_alone() -> None:
    assert reported("class A:\n    async def zork(self): pass") == ["server/app.py:2: zork -> write run"]
    assert not reported("zork = item.zork")


def test_a_file_rule_refuses_parts_of_the_path() -> None:
    assert reported("", "server/quux.py") == ["server/quux.py:1: quux -> write example"]
    assert reported("", "server/frob/app.py") == ["server/frob/app.py:1: frob -> write Gadget"]
    assert not reported("import quux")


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('x = 1\ny = f"Not grue for {x}"', 2),
        ('"""A module.\n\nIt is Grue\nfor it.\n"""', 3),
        ("x = 1  # grue for", 1),
        ("x = 1\n# first grue\n# for, second\n", 2),
    ],
)
def test_a_phrase_is_refused_in_strings_and_comments(source: str, line: int) -> None:
    (finding,) = check_python("server/app.py", source, ARTIFICIAL)
    assert (finding.line, finding.write) == (line, "expected")


def test_a_phrase_is_refused_in_markdown_across_lines() -> None:
    text = "# Title\n\nThe least\n  plugh is logged, the leastplugh and the least plughs are not.\n"
    assert [str(finding) for finding in check_prose("docs/a.md", text, ARTIFICIAL)] == [
        "docs/a.md:3: least plugh -> write minimum level"
    ]


@pytest.mark.parametrize(
    "docstring",
    [
        *(f"{opener} a request holds." for opener in check.OPENERS),
        "return the row.",
        "[T, D] after the decoder.",
        "Return the row",
        "Return the row that\nfollows.",
    ],
)
def test_a_docstring_opens_with_a_sentence(docstring: str) -> None:
    assert len(list(check_docstring("a.py", docstring, 1))) == 1


@pytest.mark.parametrize(
    "docstring",
    [
        "Return the row.",
        "Return whether the row is finite.\n\nfragments after it are not checked",
        "`python -m server` serves the model.",
        "POST /v1/score scores candidates.",
        "Whatever.",
        "Office hours.",
    ],
)
def test_a_sentence_passes(docstring: str) -> None:
    assert not list(check_docstring("a.py", docstring, 1))


def test_every_docstring_is_checked() -> None:
    source = '"""one"""\nclass _A:\n    """two"""\n    async def _f(self):\n        """three"""\n'
    assert {finding.line for finding in check_python("a.py", source, [])} == {1, 3, 5}


@pytest.mark.parametrize("line", ["noun: x -> y", "name x -> y", "name: x", "x"])
def test_a_rule_of_another_form_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        parse_rules(f"\n{line}")


@pytest.mark.parametrize("line", (FOLDER / "violations.txt").read_text(encoding="utf-8").splitlines())
def test_private_phrases_are_refused(line: str) -> None:
    assert list(check_prose("docs/a.md", line, RULES))


@pytest.mark.parametrize("line", (FOLDER / "plain_english.txt").read_text(encoding="utf-8").splitlines())
def test_plain_english_passes(line: str) -> None:
    assert not list(check_prose("docs/a.md", line, RULES))


def test_every_phrase_has_an_example() -> None:
    examples = (FOLDER / "violations.txt").read_text(encoding="utf-8").splitlines()
    unused = [rule.pattern.pattern for rule in RULES if rule.kind == "phrase" and not any_matches(rule, examples)]
    assert not unused


def any_matches(rule: check.Rule, examples: list[str]) -> bool:
    return any(rule.pattern.search(example) for example in examples)


def test_no_replacement_is_itself_refused() -> None:
    """A name that one rule recommends must not be refused by another."""
    names = [name for rule in RULES if rule.kind == "name" for name in re.findall(r"\w+", rule.write)]
    rules = [rule for rule in RULES if rule.kind == "name"]
    assert not [name for name in names for rule in rules if rule.pattern.fullmatch(name)]


def test_build_outputs_and_hidden_folders_are_skipped(tmp_path: Path) -> None:
    for path in ("a.py", "b/c.md", "b/d.json", "build/e.py", ".venv/f.py", "__pycache__/g.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("")
    assert [file.name for file in files_below(tmp_path)] == ["a.py", "c.md"]
    assert [file.name for file in files_below(tmp_path / "a.py")] == ["a.py"]


def test_the_status_tells_whether_there_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "clean.py").write_text('"""Serve the model."""\n')
    assert main(["clean.py"]) == 0
    (tmp_path / "docs.md").write_text((FOLDER / "violations.txt").read_text(encoding="utf-8"))
    assert main(["--all"]) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["missing.py"])
