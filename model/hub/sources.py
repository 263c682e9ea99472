"""The sources of models: repositories of a Hugging Face Hub at a commit, and local folders.

Both list files by name and fetch those that an import reads. huggingface_hub downloads them; its own settings determine the
Hub's address, token and cache (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE). No code of a repository is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub  # its parts are loaded at their first use, so that a server without a named model never loads them
import yaml
from httpx2 import HTTPError
from huggingface_hub import constants, errors

from model.checkpoint.layout import KINDS, OPEN_CLIP_CONFIG, OPEN_CLIP_STEMS, STEMS, weights_name
from model.hub.job import SOURCE
from model.hub.progress import LogProgress
from model.likeness import LIKENESS
from model.prior import PRIOR

logger = logging.getLogger(__name__)

CHECKPOINT, CARD = "checkpoint.pt", "README.md"
# small files, fetched before anything large, so that an unsupported repository costs no download
METADATA = (
    CARD,
    "config.json",
    "tokenizer.json",
    LIKENESS,
    PRIOR,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    OPEN_CLIP_CONFIG,
    SOURCE,
    *(f"{stem}.{kind}.index.json" for stem in {*STEMS, *OPEN_CLIP_STEMS} for kind in KINDS),
)
NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>.+))?", re.ASCII)
DEFAULT_REVISION = "main"
# of a path that is no name of a repository
PATH_STARTS = (".", "/", "~")
UNSTATED = "not stated"
# a model card begins with its metadata as YAML
CARD_METADATA = re.compile(r"\s*---\n(.*?)\n---[ \t]*$", re.DOTALL | re.MULTILINE)
NULL = "tag:yaml.org,2002:null"
# characters of a licence's name, far above those in use
MAX_LICENSE = 200


class ModelNameError(RuntimeError):
    """A name that refers to no usable model; the message says in one line what is wrong and what to do."""


class HubUnreachable(ModelNameError):
    """The Hub does not answer, or offline mode is set, and huggingface_hub's cache lacks a needed file."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder with the files of a repository."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def key(self) -> str:
        """A digest of the files' names, sizes and times."""
        files = sorted((file.name, file.stat()) for file in self.path.iterdir() if file.is_file())
        text = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(file.name for file in self.path.iterdir() if file.is_file())

    def fetch(self, names: Iterable[str]) -> Path:
        """Return the folder itself, which already has the files."""
        return self.path


@dataclass(frozen=True)
class Repository:
    """A model repository of the Hub at a commit; `revision` is the branch, tag or commit that the user named."""

    name: str
    revision: str
    commit: str

    def __str__(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        return self.commit

    @classmethod
    def resolve(cls, name: str, revision: str) -> Repository:
        """Find the commit: with one request, unless it is given as a hash; the last known one if the Hub is unreachable."""
        with _explained(name, revision):
            return cls(name, revision, huggingface_hub.HfApi().resolve_revision(name, revision=revision).resolved)

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the files in the top folder."""
        self.fetch(METADATA)
        with _explained(self.name, self.revision):
            tree = huggingface_hub.get_cached_repo_tree(self.name, revision=self.commit)
        return frozenset(file.path for file in tree if "/" not in file.path)

    def fetch(self, names: Iterable[str]) -> Path:
        """Download the named files that exist in the repository and are not cached; return their folder."""
        with _explained(self.name, self.revision):
            progress = None if sys.stderr.isatty() else LogProgress.of(self.name)
            folder = huggingface_hub.snapshot_download(
                self.name, revision=self.commit, allow_patterns=list(names), tqdm_class=progress
            )
        return Path(folder)


Source = LocalFolder | Repository


def open_source(text: str) -> Source:
    """Return what `text` refers to: an existing folder, or else a repository `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Raises `ModelNameError`, and `HubUnreachable` if nothing is known of the repository.
    """
    path = Path(text)
    if path.is_dir():
        return LocalFolder(path)
    if text.startswith(PATH_STARTS):
        raise ModelNameError(f"{text} is no folder: expected a folder, OWNER/NAME or OWNER/NAME@REVISION")
    match = NAME.fullmatch(text)
    if match is None or path.exists():
        raise ModelNameError(
            f"{text} is neither a folder nor the name of a repository: expected OWNER/NAME or OWNER/NAME@REVISION"
        )
    return Repository.resolve(match["repository"], match["revision"] or DEFAULT_REVISION)


def read_object(source: Source, name: str) -> dict[str, Any]:
    """Read a small JSON file of the source; {} if there is none. Raises `ModelNameError`."""
    if name not in source.names:
        return {}
    try:
        values = json.loads((source.fetch([name]) / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelNameError(f"{source}: {name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelNameError(f"{source}: {name} does not hold a JSON object")
    return values


def weight_names(source: Source, stems: tuple[str, ...] = STEMS) -> list[str]:
    """Return the names of the files that hold the weights, safetensors if there are any. Raises `ModelNameError`."""
    whole = weights_name(source.names, stems)
    if whole is None:
        expected = " or ".join(f"{stem}.{kind}" for stem in stems for kind in KINDS)
        raise ModelNameError(f"{source} holds no weights that can be read: none of {expected}")
    if whole in source.names:
        return [whole]
    weight_map = read_object(source, f"{whole}.index.json").get("weight_map")
    shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not shards or not source.names.issuperset(shards):
        raise ModelNameError(f"{source}: {whole}.index.json lists files that are not in it")
    return shards


def license_of(source: Source) -> str:
    """Return the licence that the model card states in its metadata, or `not stated`.

    The metadata are parsed and not constructed: a few aliases in YAML can stand for more values than fit into memory.
    """
    if CARD not in source.names:
        return UNSTATED
    try:
        match = CARD_METADATA.match((source.fetch([CARD]) / CARD).read_text(encoding="utf-8-sig"))
        root = yaml.compose(match[1], Loader=yaml.SafeLoader) if match else None
    except (ValueError, yaml.YAMLError, RecursionError):
        return UNSTATED
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    stated = {key.value: _texts(value) for key, value in entries if key.value in ("license", "license_name")}
    license = stated.get("license", "")
    return (stated.get("license_name") if license in ("", "other") else "") or license or UNSTATED


def _texts(node: yaml.Node) -> str:
    """Return a text, or a flat list of texts, in one line; "" for other values, and for more than a licence needs."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    texts = [item.value for item in nodes if isinstance(item, yaml.ScalarNode) and item.tag != NULL]
    fits = len(texts) == len(nodes) and sum(map(len, texts)) <= MAX_LICENSE and all(map(str.isprintable, texts))
    return ", ".join(texts) if fits else ""


@contextmanager
def _explained(name: str, revision: str) -> Iterator[None]:
    """Raise `ModelNameError` with a remedy for every way in which the Hub refuses or fails."""
    hub = constants.ENDPOINT
    _route_log_lines()
    try:
        yield
    except errors.GatedRepoError:
        raise ModelNameError(
            f"{name} is gated: accept its conditions at {hub}/{name}, and set HF_TOKEN to a token of that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelNameError(
            f"{name} is not a folder, and {hub} has no repository of that name, or a private one: check the name, or set "
            "HF_TOKEN to a token that may read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNameError(f"{name} has no branch, tag or commit {revision!r}: see {hub}/{name}/commits") from None
    except (
        errors.LocalEntryNotFoundError,
        errors.RevisionResolutionError,
        errors.CachedRepoTreeNotFoundError,
    ) as error:
        message = f"{name} is not a folder and not completely in the cache, and {_unreachable(hub, error)}"
        raise HubUnreachable(message) from None
    except errors.HFValidationError as error:
        raise ModelNameError(f"{name} is not a valid name of a repository: {_first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise ModelNameError(_refusal(hub, name, error)) from None
    except (OSError, HTTPError) as error:
        raise ModelNameError(
            f"the download of {name} failed: {_first_line(error)}. Start again: finished files are kept"
        ) from None


def _route_log_lines() -> None:
    """Print huggingface_hub's log lines once, by the root logger's handler, and no line per request."""
    huggingface_hub.HfApi()  # loads the library, which adds a handler of its own
    logging.getLogger("huggingface_hub").handlers.clear()
    logging.getLogger("httpx2").setLevel(logging.WARNING)


def _unreachable(hub: str, error: Exception) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it to download"
    return f"{hub} cannot be reached: check the network and HF_ENDPOINT ({_first_line(error.__cause__ or error)})"


def _refusal(hub: str, name: str, error: errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return f"{hub} refuses {name} with status {status}: check that HF_TOKEN is valid and may read it"
    return f"{hub} answered with status {status} for {name}: try again later"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
