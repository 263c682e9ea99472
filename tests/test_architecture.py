"""Rules of the repository: permitted imports between folders, modules that a process never loads, and forms of files.

Two tables state the permitted imports. Each rule is a function that yields the violations in a source tree, and is also
tested with a small tree that breaks it, so that no rule can pass because it checks nothing.
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

# the first table: the other folders that a top-level folder may import
FOLDERS: dict[str, set[str]] = {
    "kernels": set(),
    "model": {"kernels"},
    "server": {"kernels", "model"},
    "training": {"kernels", "model"},
    # it loads the others by name, when their command is called
    "flamboyance": set(),
    CLIENT: set(),
    "clients": set(),  # the script of the playground
    # the default model and the methods by likeness are evaluated in process, on the split that its training defines
    "evaluation": {"kernels", "model", "server", "training", CLIENT},
    "bench": {"kernels", "model", "server", "deploy", CLIENT},  # the function that routes requests
    "deploy": {"model", "server", "bench", "tests", CLIENT},  # its tests, and load for its pictures
    "tests": {"kernels", "model", "server", "training", "flamboyance", "evaluation", "bench", "deploy", CLIENT},
}

TORCH = {"torch", "torchvision", "timm", "triton", "safetensors.torch"}
HTTP = {"fastapi", "starlette", "uvicorn"}

# the second table: modules that a module must not load, not even indirectly; a name includes its submodules
FORBIDDEN: dict[str, set[str]] = {
    "server.api": TORCH,
    "server.app": TORCH,
    # the layers of the server, each without those above it: api -> quality -> fewshot -> store
    "server.quality": TORCH | HTTP | {"server.api"},
    "server.fewshot": TORCH | HTTP | {"server.api", "server.quality"},
    "server.access": TORCH | HTTP | {"server.api", "server.quality", "server.fewshot"},
    "server.store": TORCH | HTTP | {"server.api", "server.quality", "server.fewshot"},
    "server.media": TORCH | HTTP | {"server.api", "server.quality", "server.fewshot", "server.store"},
    "server.engine_client": TORCH
    | HTTP
    | {"server.api", "server.quality", "server.fewshot", "server.store", "server.engine"},
    "server.schemas": TORCH | {"server.api"},
    "server.settings": TORCH,
    "server.wire": TORCH | HTTP,
    "server.engine": HTTP,
    "model.config": TORCH,
    "model.hub.prepare": TORCH,
    "model.prompt": TORCH,
    "model.media": TORCH,
    "deploy.ray": TORCH | {"bench", "tests"},
    "model": HTTP,
    "kernels": HTTP,
    "training": HTTP,
    "flamboyance": TORCH | HTTP,
    # through the public interface alone
    "evaluation.benchmarks": TORCH | HTTP | {"server", "model", "training", "kernels"},
    CLIENT: TORCH | HTTP,
}

# the second reads the key of the server that it evaluates, and may not import the first
ENVIRONMENT_READERS = {
    "server/settings.py",
    "evaluation/benchmarks/__main__.py",
    # the address and the key of the server
    "clients/python/src/flamboyance_client/connection.py",
    # for an error that names what httpx has read
    "clients/python/src/flamboyance_client/processes.py",
}
TRANSFORMERS_FOLDERS = {"tests", "bench", "evaluation"}


@dataclass(frozen=True)
class Source:
    """A Python file of the source tree."""

    module: str
    path: str  # relative to the root, with slashes
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def folder(self) -> str:
        return self.module.partition(".")[0]

    @property
    def package(self) -> str:
        return self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]

    @cached_property
    def imports(self) -> list[tuple[str, int]]:
        """The names that the file imports, `from a import b` as `a.b`, with their lines."""
        names = [name for node in ast.walk(self.tree) for name in _imported(node, self.package)]
        return sorted(names, key=lambda name: name[1])


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
        """Return the module that importing `name` loads: `name` or its parent; None for other packages."""
        parent = name.rpartition(".")[0]
        return name if name in self.by_module else parent if parent in self.by_module else None

    def edges(self, source: Source) -> set[str]:
        targets = {self.target(name) for name, _ in source.imports}
        return {target for target in targets if target is not None and target != source.module}

    def loads(self, source: Source) -> set[str]:
        """Return the modules that importing this one loads directly: its imports, and all parent packages."""
        names = [name.split(".") for name in {source.module, *self.edges(source)}]
        loaded = {".".join(parts[: end + 1]) for parts in names for end in range(len(parts))}
        return (loaded & self.by_module.keys()) - {source.module}

    def chain_to(self, source: Source, forbidden: set[str]) -> list[str] | None:
        """Return the shortest chain of imports from a module to a forbidden name, or None."""
        chains, visited = [[source.module]], {source.module}
        for chain in chains:  # grows during the iteration: breadth-first search
            last = self.by_module[chain[-1]]
            if name := next((name for name, _ in last.imports if _is_below(name, forbidden)), None):
                return [*chain, name]
            new = sorted(self.loads(last) - visited)
            visited.update(new)
            chains.extend([*chain, module] for module in new)
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


def folders_import_only_permitted_folders(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        if source.folder not in FOLDERS:
            yield f"{source.path}: the folder {source.folder!r} is not in the table"
            continue
        allowed = FOLDERS[source.folder] | {source.folder}
        for name, line in source.imports:
            if (folder := name.partition(".")[0]) in FOLDERS and folder not in allowed:
                yield f"{source.path}:{line}: {source.folder} must not import {name}"


def modules_load_nothing_forbidden(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        for top, forbidden in FORBIDDEN.items():
            if _is_below(source.module, {top}) and (chain := tree.chain_to(source, forbidden)):
                yield f"{source.path}: {top} must not load {chain[-1]}, but {' -> '.join(chain)}"


def imports_have_no_cycles(tree: Tree) -> Iterator[str]:
    try:
        TopologicalSorter({source.module: tree.edges(source) for source in tree.sources}).prepare()
    except CycleError as error:
        yield " <- ".join(error.args[1])


def imports_are_at_module_level(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        for function in ast.walk(source.tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                imports = (node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom))
                yield from (f"{source.path}:{node.lineno}: import inside {function.name}" for node in imports)


def only_tests_and_measurements_import_transformers(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        for name, line in source.imports:
            if _is_below(name, {"transformers"}) and source.folder not in TRANSFORMERS_FOLDERS:
                yield f"{source.path}:{line}: imports transformers"


def only_settings_read_the_environment(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        if source.folder == "tests" or source.path in ENVIRONMENT_READERS:
            continue
        for node in ast.walk(source.tree):
            if _reads_environment(node):
                yield f"{source.path}:{getattr(node, 'lineno', 0)}: reads the environment"


def _reads_environment(node: ast.AST) -> bool:
    names = {"environ", "environb", "getenv"}
    if isinstance(node, ast.Attribute):
        return node.attr in names and isinstance(node.value, ast.Name) and node.value.id == "os"
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in names for a in node.names)


def modules_have_specific_names(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        if Path(source.path).stem in {"utils", "util", "helpers", "common", "misc"}:
            yield f"{source.path}: the name states no purpose"


def modules_have_docstrings(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        if source.tree.body and not ast.get_docstring(source.tree):  # an empty __init__.py needs none
            yield f"{source.path}: has no module docstring"


def files_are_short(tree: Tree) -> Iterator[str]:
    for source in tree.sources:
        if (lines := len(source.text.splitlines())) > MAX_LINES:
            yield f"{source.path}: {lines} lines, more than {MAX_LINES}"


Rule = Callable[[Tree], Iterator[str]]

# each rule with a tree that breaks it, by path, and a part of the expected message
VIOLATIONS: list[tuple[Rule, dict[str, str], str]] = [
    (
        folders_import_only_permitted_folders,
        {"kernels/norm.py": "from model.config import X"},
        "kernels must not import model.config",
    ),
    (
        folders_import_only_permitted_folders,
        {"model/layers.py": "import server.settings"},
        "model must not import server",
    ),
    (
        folders_import_only_permitted_folders,
        {"evaluation/run.py": "from bench import table"},
        "evaluation must not import bench",
    ),
    (
        folders_import_only_permitted_folders,
        {"model/a.py": "from ..server import app"},
        "model must not import server.app",
    ),
    (folders_import_only_permitted_folders, {"attic/old.py": ""}, "'attic' is not in the table"),
    (
        modules_load_nothing_forbidden,
        {"server/api/routes/chat.py": "import torch.nn"},
        "server.api must not load torch.nn",
    ),
    (
        modules_load_nothing_forbidden,
        {
            "server/api/routes/chat.py": "from model.batch import Batch",
            "model/__init__.py": "",
            "model/batch.py": "from torch import Tensor",
        },
        "server.api.routes.chat -> model.batch -> torch.Tensor",
    ),
    (
        modules_load_nothing_forbidden,
        {
            "server/api/routes/chat.py": "from server.engine.config import EngineConfig",
            "server/engine/__init__.py": "from server.engine.device import runner",
            "server/engine/device/runner.py": "import torch",
            "server/engine/config.py": "import dataclasses",
        },
        "server.api.routes.chat -> server.engine -> server.engine.device.runner -> torch",
    ),
    (
        modules_load_nothing_forbidden,
        {
            "server/store/support_sets.py": "from server.media.store import MediaStore",
            "server/media/store.py": "from server.fewshot.shots import Shot",
            "server/fewshot/shots.py": "",
        },
        "server.store must not load server.fewshot.shots.Shot, but server.store.support_sets -> server.media.store -> "
        "server.fewshot.shots.Shot",
    ),
    (
        modules_load_nothing_forbidden,
        {"server/engine/engine.py": "from fastapi import FastAPI"},
        "must not load fastapi",
    ),
    (
        imports_have_no_cycles,
        {"model/a.py": "from model import b", "model/b.py": "from model.c import C", "model/c.py": "import model.a"},
        "model.a",
    ),
    (imports_are_at_module_level, {"model/a.py": "def f():\n    if True:\n        import json"}, "model/a.py:3"),
    (
        only_tests_and_measurements_import_transformers,
        {"model/a.py": "from transformers import AutoModel"},
        "model/a.py:1",
    ),
    (only_settings_read_the_environment, {"server/app.py": "import os\nkey = os.environ['KEY']"}, "server/app.py:2"),
    (only_settings_read_the_environment, {"model/a.py": "from os import getenv"}, "model/a.py:1"),
    (modules_have_specific_names, {"server/utils.py": ""}, "server/utils.py"),
    (modules_have_docstrings, {"model/a.py": "import json"}, "model/a.py"),
    (files_are_short, {"model/a.py": "\n" * (MAX_LINES + 1)}, "401 lines"),
]

RULES = list(dict.fromkeys(rule for rule, _, _ in VIOLATIONS))


def _name(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.fixture(scope="module")
def repository() -> Tree:
    return Tree(ROOT)


def test_all_folders_are_read(repository: Tree) -> None:
    assert {"kernels", "model", "server", "tests", CLIENT} <= {source.folder for source in repository.sources}


@pytest.mark.parametrize("rule", RULES, ids=_name)
def test_the_repository_conforms_to_the_rule(rule: Rule, repository: Tree) -> None:
    violations = list(rule(repository))
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize(("rule", "files", "message"), VIOLATIONS, ids=_name)
def test_the_rule_finds_a_violation(rule: Rule, files: dict[str, str], message: str, tmp_path: Path) -> None:
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    violations = list(rule(Tree(tmp_path)))
    assert any(message in violation for violation in violations), violations
