"""Check that names and prose use the field's standard terms: `python -m tests.language.check [--all] [PATH...]`.

`private_words.txt` lists the words that are refused and their replacements. Docstrings must open with a sentence. Without
arguments the paths in `checked_paths.txt` are checked; `--all` checks the whole repository.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
WORDS = FOLDER / "private_words.txt"
PATHS = FOLDER / "checked_paths.txt"
KINDS = ("name", "variable", "function", "file", "phrase")
PROSE_SUFFIXES = (".md", ".toml", ".yaml")
PRUNED = {"build", "dist", "node_modules", "shared", "__pycache__"}

OPENERS = ("What", "Where", "Which", "Who", "Whom", "Whose", "How", "From", "Whether", "That", "Of", "As", "The same")
OPENER = re.compile(rf"({'|'.join(OPENERS)})\b")
# the fields of syntax nodes that hold identifiers
NAME_FIELDS = {"id", "attr", "arg", "name", "asname", "module", "rest", "names"}


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern that is refused in one kind of text, and what to write instead."""

    kind: str
    pattern: re.Pattern[str]
    write: str


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    path: str
    line: int
    text: str
    write: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text} -> write {self.write}"


def parse_rules(text: str) -> list[Rule]:
    """Read lines of the form `kind: pattern -> replacement`; `#` begins a comment line.

    Raises `ValueError` for a line of another form.
    """
    rules = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            kind, _, rest = line.partition(": ")
            pattern, arrow, write = rest.rpartition(" -> ")
            if kind not in KINDS or not arrow:
                raise ValueError(f"line {number}: {line!r} is not of the form 'kind: pattern -> replacement'")
            rules.append(Rule(kind, _compiled(kind, pattern.strip()), write.strip()))
    return rules


def _compiled(kind: str, pattern: str) -> re.Pattern[str]:
    if kind != "phrase":
        return re.compile(pattern)
    return re.compile(rf"(?<!\w)(?:{pattern.replace(' ', chr(92) + 's+')})(?!\w)", re.IGNORECASE)


def check_python(path: str, source: str, rules: Sequence[Rule]) -> Iterator[Finding]:
    tree = ast.parse(source, path)
    for kind, name, line in dict.fromkeys([*path_names(path), *identifiers(tree)]):
        for rule in rules:
            if rule.kind == kind and rule.pattern.fullmatch(name.lstrip("_")):
                yield Finding(path, line, name, rule.write)
    for text, line in [*strings(tree), *comments(source)]:
        yield from check_prose(path, text, rules, line)
    for docstring, line in docstrings(tree):
        yield from check_docstring(path, docstring, line)


def check_prose(path: str, text: str, rules: Sequence[Rule], first_line: int = 1) -> Iterator[Finding]:
    for rule in rules:
        if rule.kind == "phrase":
            for match in rule.pattern.finditer(text):
                line = first_line + text.count("\n", 0, match.start())
                yield Finding(path, line, " ".join(match[0].split()), rule.write)


def check_docstring(path: str, docstring: str, line: int) -> Iterator[Finding]:
    """Check the first line of a docstring, as `inspect.cleandoc` returns it."""
    first = docstring.partition("\n")[0].rstrip()
    if match := OPENER.match(first):
        yield Finding(path, line, f'docstring opens with "{match[0]}"', "a sentence about the thing: subject first")
    if not (first[:1].isupper() or first[:1] == "`"):
        yield Finding(path, line, f"docstring opens with {first[:20]!r}", "a capital letter or a backtick first")
    if not first.endswith("."):
        yield Finding(path, line, f"docstring's first line ends with {first[-20:]!r}", "one sentence with a full stop")


def path_names(path: str) -> Iterator[tuple[str, str, int]]:
    for part in Path(path).with_suffix("").parts:
        yield from ((kind, part, 1) for kind in ("name", "file"))


def identifiers(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """Yield kind, identifier and line; the parts of a dotted module name one by one."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        for field, value in ast.iter_fields(node):
            texts = value if isinstance(value, list) else [value]
            if field in NAME_FIELDS:
                dotted = (text for text in texts if isinstance(text, str))
                yield from (("name", name, line) for text in dotted for name in text.split("."))
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield "variable", name, line
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield "variable", name, line
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield "function", name, line


def strings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield string literals, docstrings and the text of f-strings among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno


def comments(source: str) -> Iterator[tuple[str, int]]:
    """Yield comments with their first lines; comments on adjacent lines are one text."""
    text, first, last = "", 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield text, first
                text, first = "", token.start[0]
            text, last = f"{text}{token.string.lstrip('#')}\n", token.start[0]
    yield text, first


def docstrings(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield all docstrings, those of private functions and classes too, with their lines."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            yield docstring, node.body[0].lineno


def files_below(path: Path) -> Iterator[Path]:
    """Yield the Python and prose files of a file or folder, without build outputs and hidden folders."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        parts = file.relative_to(path).parts[:-1]
        if file.suffix in (".py", *PROSE_SUFFIXES) and not any(p in PRUNED or p.startswith(".") for p in parts):
            yield file


def check_file(file: Path, root: Path, rules: Sequence[Rule]) -> list[Finding]:
    path, text = file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")
    check = check_python if file.suffix == ".py" else check_prose
    return sorted(set(check(path, text, rules)))


def listed_paths(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.language.check", description=__doc__)
    parser.add_argument("paths", nargs="*", help="files and folders (default: those of checked_paths.txt)")
    parser.add_argument("--all", action="store_true", help="check the whole repository")
    options = parser.parse_args(arguments)
    listed = [str(ROOT)] if options.all else options.paths or listed_paths(PATHS.read_text(encoding="utf-8"))
    paths = [(ROOT / path).resolve() for path in listed]
    if missing := [str(path) for path in paths if not path.exists()]:
        parser.error(f"no such file or folder: {', '.join(missing)}")
    rules = parse_rules(WORDS.read_text(encoding="utf-8"))
    findings = [finding for path in paths for file in files_below(path) for finding in check_file(file, ROOT, rules)]
    print(*findings, sep="\n", end="\n" if findings else "")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
