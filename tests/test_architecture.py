"""The house's rules as tests: which room may import which, what a process must never load, and how a file is kept.

Two tables hold the arrows; every other rule is one function from the parsed tree to a list of complaints. Each rule
is also shown a small tree that breaks it, so that none of them can pass by looking at nothing.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
CLIENT = "flamboyance_client"
PRUNED = {"node_modules", "build", "dist", "shared", "__pycache__"}

# the first table: what a room may import besides itself
ROOMS: dict[str, set[str]] = {
    "kernels": set(),
    "model": {"kernels"},
    "server": {"kernels", "model"},
    "training": {"kernels", "model"},
    CLIENT: set(),
    # the default model is measured in process, on the split that its training asks
    "evaluation": {"model", "training", CLIENT},
    "bench": {"kernels", "model", "server", CLIENT},
    "tests": {"kernels", "model", "server", "training", "evaluation", "bench", CLIENT},
}

TORCH = {"torch", "torchvision", "timm", "triton", "safetensors.torch"}
HTTP = {"fastapi", "starlette", "uvicorn"}

# the second table: what a module must not load, not even through another module of ours; a name covers what is below it
FORBIDDEN: dict[str, set[str]] = {
    "server.api": TORCH,
    "server.app": TORCH,
    # the API knows the rooms below it, never the other way round: quality -> fewshot -> store
    "server.quality": TORCH | HTTP | {"server.api"},
    "server.fewshot": TORCH | HTTP | {"server.api", "server.quality"},
    "server.store": TORCH | HTTP | {"server.api", "server.quality", "server.fewshot"},
    "server.media": TORCH | HTTP | {"server.api", "server.quality", "server.fewshot", "server.store"},
    "server.engine_client": TORCH | HTTP | {"server.api", "server.quality", "server.fewshot", "server.store"},
    "server.schemas": TORCH | {"server.api"},
    "server.settings": TORCH,
    "server.wire": TORCH | HTTP,
    "server.engine": HTTP,
    "model.config": TORCH,
    "model.prompt": TORCH,
    "model.tokenizer": TORCH,
    "model.media": TORCH,
    "model": HTTP,
    "kernels": HTTP,
    "training": HTTP,
    CLIENT: TORCH | HTTP,
}

ENVIRONMENT_READERS = {"server/settings.py"}
TRANSFORMERS_ROOMS = {"tests", "bench", "evaluation"}


@dataclass(frozen=True)
class Source:
    module: str
    path: str  # from the root, with slashes
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def room(self) -> str:
        return self.module.partition(".")[0]

    @property
    def package(self) -> str:
        return self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]

    @cached_property
    def imports(self) -> list[tuple[str, int]]:
        """Every name imported anywhere in the file, `from a import b` as `a.b`, with its line."""
        found = [name for node in ast.walk(self.tree) for name in _imported(node, self.package)]
        return sorted(found, key=lambda name: name[1])


def _imported(node: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


class Tree:
    """All Python files of a checkout and the imports between them."""

    def __init__(self, root: Path) -> None:
        self.sources = [_read(root, path) for path in sorted(_python_files(root))]
        self.by_module = {source.module: source for source in self.sources}

    def target(self, name: str) -> str | None:
        """The module of ours that importing `name` loads: itself, or the one that holds the name."""
        holder = name.rpartition(".")[0]
        return name if name in self.by_module else holder if holder in self.by_module else None

    def edges(self, source: Source) -> set[str]:
        targets = {self.target(name) for name, _ in source.imports}
        return {target for target in targets if target is not None and target != source.module}

    def loads(self, source: Source) -> set[str]:
        """Modules of ours that importing this one runs directly: its imports, and the packages around them and it."""
        names = [name.split(".") for name in {source.module, *self.edges(source)}]
        loaded = {".".join(parts[: end + 1]) for parts in names for end in range(len(parts))}
        return (loaded & self.by_module.keys()) - {source.module}

    def chain_to(self, source: Source, forbidden: set[str]) -> list[str] | None:
        """The shortest way from a module to a forbidden import, through modules of ours."""
        trails, seen = [[source.module]], {source.module}
        for trail in trails:  # grows while it is read: breadth first
            here = self.by_module[trail[-1]]
            if hit := next((name for name, _ in here.imports if _is_below(name, forbidden)), None):
                return [*trail, hit]
            new = sorted(self.loads(here) - seen)
            seen.update(new)
            trails.extend([*trail, module] for module in new)
        return None


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in PRUNED and not f.endswith(".egg-info")]
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def _read(root: Path, path: Path) -> Source:
    relative = path.relative_to(root)
    parts = list(relative.with_suffix("").parts)
    if parts[:3] == ["clients", "python", "src"]:
        parts = parts[3:]
    if parts[-1] == "__init__":
        parts.pop()
    return Source(".".join(parts), relative.as_posix(), path.read_text(encoding="utf-8"))


def _is_below(name: str, tops: set[str]) -> bool:
    return any(name == top or name.startswith(top + ".") for top in tops)


def rooms_point_one_way(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        if source.room not in ROOMS:
            yield f"{source.path}: the room {source.room!r} is not in the table"
            continue
        allowed = ROOMS[source.room] | {source.room}
        for name, line in source.imports:
            if (room := name.partition(".")[0]) in ROOMS and room not in allowed:
                yield f"{source.path}:{line}: {source.room} must not import {name}"


def processes_stay_light(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        for top, forbidden in FORBIDDEN.items():
            if _is_below(source.module, {top}) and (chain := tree.chain_to(source, forbidden)):
                yield f"{source.path}: {top} must not load {chain[-1]}, but {' -> '.join(chain)}"


def no_circles(tree: Tree) -> Iterator[str]:
    try:
        TopologicalSorter({source.module: tree.edges(source) for source in tree.sources}).prepare()
    except CycleError as error:
        yield " <- ".join(error.args[1])


def no_import_inside_a_function(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        for function in ast.walk(source.tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                hidden = (node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom))
                yield from (f"{source.path}:{node.lineno}: import inside {function.name}" for node in hidden)


def transformers_is_an_oracle_only(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        for name, line in source.imports:
            if _is_below(name, {"transformers"}) and source.room not in TRANSFORMERS_ROOMS:
                yield f"{source.path}:{line}: imports transformers"


def only_settings_reads_the_environment(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        if source.room == "tests" or source.path in ENVIRONMENT_READERS:
            continue
        for node in ast.walk(source.tree):
            if _reads_environment(node):
                yield f"{source.path}:{getattr(node, 'lineno', 0)}: reads the environment"


def _reads_environment(node: ast.AST) -> bool:
    names = {"environ", "environb", "getenv"}
    if isinstance(node, ast.Attribute):
        return node.attr in names and isinstance(node.value, ast.Name) and node.value.id == "os"
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in names for a in node.names)


def every_helper_lives_with_its_noun(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        if Path(source.path).stem in {"utils", "util", "helpers", "common", "misc"}:
            yield f"{source.path}: names no idea"


def every_file_says_its_idea(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        if source.tree.body and not ast.get_docstring(source.tree):  # an empty __init__.py has no idea to say
            yield f"{source.path}: has no module docstring"


def every_file_fits_in_a_sitting(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        if (lines := len(source.text.splitlines())) > MAX_LINES:
            yield f"{source.path}: {lines} lines, more than {MAX_LINES}"


Rule = Callable[[Tree], Iterator[str]]

# each rule beside a tree that breaks it, file by file, and a word of the complaint that it must raise
BROKEN: list[tuple[Rule, dict[str, str], str]] = [
    (rooms_point_one_way, {"kernels/norm.py": "from model.config import X"}, "kernels must not import model.config"),
    (rooms_point_one_way, {"model/layers.py": "import server.settings"}, "model must not import server"),
    (rooms_point_one_way, {"evaluation/run.py": "from server import app"}, "evaluation must not import server"),
    (rooms_point_one_way, {"model/a.py": "from ..server import app"}, "model must not import server.app"),
    (rooms_point_one_way, {"attic/old.py": ""}, "'attic' is not in the table"),
    (processes_stay_light, {"server/api/routes/chat.py": "import torch.nn"}, "server.api must not load torch.nn"),
    (
        processes_stay_light,
        {
            "server/api/routes/chat.py": "from model.batch import Batch",
            "model/__init__.py": "",
            "model/batch.py": "from torch import Tensor",
        },
        "server.api.routes.chat -> model.batch -> torch.Tensor",
    ),
    (
        processes_stay_light,
        {
            "server/api/routes/chat.py": "from server.wire import Token",
            "server/engine/__init__.py": "from server.engine import runner",
            "server/engine/runner.py": "import torch",
            "server/wire.py": "import msgspec",
        },
        "server.api.routes.chat -> server.engine -> server.engine.runner -> torch",
    ),
    (
        processes_stay_light,
        {
            "server/fewshot/shots.py": "from server.services import Services",
            "server/services.py": "from server.api.admission import Admission",
            "server/api/admission.py": "",
        },
        "server.fewshot.shots -> server.services -> server.api.admission.Admission",
    ),
    (processes_stay_light, {"server/engine/engine.py": "from fastapi import FastAPI"}, "must not load fastapi"),
    (
        no_circles,
        {"model/a.py": "from model import b", "model/b.py": "from model.c import C", "model/c.py": "import model.a"},
        "model.a",
    ),
    (no_import_inside_a_function, {"model/a.py": "def f():\n    if True:\n        import json"}, "model/a.py:3"),
    (transformers_is_an_oracle_only, {"model/a.py": "from transformers import AutoModel"}, "model/a.py:1"),
    (only_settings_reads_the_environment, {"server/app.py": "import os\nkey = os.environ['KEY']"}, "server/app.py:2"),
    (only_settings_reads_the_environment, {"model/a.py": "from os import getenv"}, "model/a.py:1"),
    (every_helper_lives_with_its_noun, {"server/utils.py": ""}, "server/utils.py"),
    (every_file_says_its_idea, {"model/a.py": "import json"}, "model/a.py"),
    (every_file_fits_in_a_sitting, {"model/a.py": "\n" * (MAX_LINES + 1)}, "401 lines"),
]

RULES = list(dict.fromkeys(rule for rule, _, _ in BROKEN))


def _name(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.fixture(scope="module")
def repository() -> Tree:
    return Tree(ROOT)


def test_the_whole_house_is_read(repository: Tree) -> None:
    assert {"kernels", "model", "server", "tests", CLIENT} <= {source.room for source in repository.sources}


@pytest.mark.parametrize("rule", RULES, ids=_name)
def test_the_house_keeps_the_rule(rule: Rule, repository: Tree) -> None:
    complaints = list(rule(repository))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(("rule", "files", "complaint"), BROKEN, ids=_name)
def test_the_rule_sees_its_violation(rule: Rule, files: dict[str, str], complaint: str, tmp_path: Path) -> None:
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    complaints = list(rule(Tree(tmp_path)))
    assert any(complaint in line for line in complaints), complaints
