"""Reads the files of a foreign checkpoint: its tensors, which are converted to ours, and its tokenizer.

A folder holds safetensors or PyTorch files, whole or in shards with an index; a `.pt` file holds a dictionary. Both are
mapped into memory and never executed. A plan lists, for each of our tensors, the foreign tensors of which it consists. It
is made from a family's table of names and the shapes of our empty model, before any tensor is read. So one error can list
all tensors that are missing, unexpected or of another shape.

The tokenizer consists of `tokenizer.json` and the tokens that begin, end and pad a text. The settings files that name those
tokens are read as data; no tokenizer class is needed or run.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from model.checkpoint.layout import KINDS, STEMS, weights_name
from model.config import MAX_SIZE, ConfigError
from model.folder import CheckpointError, SafetensorsFiles, Shape, check_kind, check_shapes, read_json, weight_files
from model.prompt import open_tokenizer

# field -> its neutral values; any other value is a feature that is not implemented
Neutral: TypeAlias = Mapping[str, tuple[Any, ...]]
# the type of each field that is a positive number
NumberTypes: TypeAlias = Mapping[str, type[int] | type[float]]
# our tensor, or our module for its weight and bias -> theirs, or those whose rows make up ours; {i} is the layer
Names: TypeAlias = Mapping[str, str | tuple[str, ...]]
Rearrange: TypeAlias = Callable[[Tensor], Tensor]

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
NONE: Mapping[str, Any] = MappingProxyType({})


def open_folder(folder: Path, stems: tuple[str, ...] = STEMS) -> Mapping[str, Tensor]:
    """Open the tensors of a Hugging Face folder: safetensors if there are any, PyTorch files otherwise."""
    name = weights_name({file.name for file in folder.iterdir()} if folder.is_dir() else (), stems)
    if name is None or not (files := weight_files(folder, name)):
        names = " or ".join(f"{stem}.{kind}[.index.json]" for stem in stems for kind in KINDS)
        raise CheckpointError(f"{folder} holds no weights: none of {names}")
    return SafetensorsFiles(files) if name.endswith(".safetensors") else _merged(files)


def read_pickle(file: Path) -> dict[str, Any]:
    """Read plain data that `torch.save` wrote; anything that would run code is refused."""
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file")
    try:
        # files from before PyTorch 1.6 are not zip archives and cannot be mapped
        read = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # unpickling may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} cannot be read as tensors and plain data alone: {reason}") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{file} holds a {type(read).__name__}, not a dictionary of tensors")
    return read


def only_tensors(values: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """Return the values; `CheckpointError` names those that are not dense tensors with a text as name."""
    if unexpected := [str(name) for name, value in values.items() if not isinstance(name, str) or not _is_dense(value)]:
        raise CheckpointError(f"{origin} holds entries that are not tensors: {', '.join(unexpected[:20])}")
    return dict(values)


def _is_dense(value: Any) -> bool:
    """Return whether the value is a tensor that is not sparse, quantised or without data."""
    if not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _merged(files: list[Path]) -> dict[str, Tensor]:
    return {name: tensor for file in files for name, tensor in only_tensors(read_pickle(file), str(file)).items()}


def refuse_fields(prefix: str, fields: Mapping[str, Any], neutral: Neutral) -> None:
    """Raise `CheckpointError` for the first field whose value is not neutral; an absent field is neutral."""
    for name, values in neutral.items():
        if name in fields and fields[name] not in values:
            raise CheckpointError(f"{prefix}{name} = {fields[name]!r} is not implemented")


def check_positive(prefix: str, fields: Mapping[str, Any], names: NumberTypes) -> dict[str, Any]:
    """Return the fields; of those in `names`, which have the type int or float, a null is left out.

    Raises `CheckpointError` for the first of these that is not a positive number of its type.
    """
    present = {name: value for name, value in fields.items() if value is not None or name not in names}
    for name, kind in names.items():
        value = present.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not value > 0:
            raise CheckpointError(f"{prefix}{name} = {value!r} is not implemented, it must be one positive number")
    return present


@contextmanager
def refuse_wrong_types(prefix: str) -> Iterator[None]:
    """Raise `CheckpointError` for a setting that is missing, or has a type or value that no check expected."""
    try:
        yield
    except (CheckpointError, ConfigError):
        raise
    except LookupError as error:
        raise CheckpointError(f"{prefix}it has no {error.args[0]}") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{prefix}a setting has a wrong type or value: {error}") from None


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the foreign checkpoint."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Recipe:
    """One of our tensors: the concatenated rows of its sources, rearranged, in our shape."""

    sources: tuple[Source, ...]
    shape: Shape
    rearrange: Rearrange | None = None

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [tensors[source.name] for source in self.sources]
        for source, part in zip(self.sources, parts, strict=True):
            check_kind(source.name, is_floating=part.is_floating_point())
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole if self.rearrange is None else self.rearrange(whole)).reshape(self.shape)


Plan = dict[str, Recipe]


def plan(
    shapes: Mapping[str, Shape],
    names: Names,
    ours: str = "",
    theirs: str = "",
    *,
    stored: Mapping[str, Shape] = NONE,
    rows: Mapping[str, tuple[int, ...]] = NONE,
    rearrange: Mapping[str, Rearrange] = NONE,
) -> Plan:
    """Plan the tensors of one of our modules; `ours` and `theirs` are prefixes of its names.

    `stored` has the shapes of foreign tensors that differ from ours. `rows` and `rearrange` are by the name of a module in
    the table: the numbers of rows of its sources if they are not equal, and a function that reorders its rows.
    """
    recipes: Plan = {}
    for name, shape in shapes.items():
        layer, pattern = LAYER.search(name), LAYER.sub("{i}", name, count=1)
        module, _, tensor = pattern.rpartition(".")
        sources = _several(names[pattern]) if pattern in names else [f"{s}.{tensor}" for s in _several(names[module])]
        first, *rest = stored.get(name, shape)
        counts = rows.get(module, ())
        if len(counts) != len(sources):
            counts = (first // len(sources),) * len(sources)
        recipes[ours + name] = Recipe(
            tuple(
                Source(theirs + source.format(i=layer and layer[0]), (count, *rest))
                for source, count in zip(sources, counts, strict=True)
            ),
            shape,
            rearrange.get(module),
        )
    return recipes


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def convert(
    origin: str, recipes: Plan, tensors: Mapping[str, Tensor], ignored: re.Pattern[str] | None = None
) -> dict[str, Tensor]:
    """Convert their tensors to ours. A tensor whose name matches `ignored` (a buffer, an unused part) is optional."""
    expected = {source.name: source.shape for recipe in recipes.values() for source in recipe.sources}
    stored = {name: tuple(tensors[name].shape) if name in expected else () for name in tensors}
    check_shapes(origin, expected, stored, ignored)
    return {name: recipe.apply(tensors) for name, recipe in recipes.items()}


SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class FolderTokenizer:
    tokenizer: Tokenizer
    # "" if the folder names none
    bos: str
    eos: str
    unk: str
    pad: str
    # the token that the tokenizer itself writes before every text
    begin: str

    def add(self, tokens: Iterable[str]) -> None:
        """Append the special tokens that the vocabulary lacks, in this order."""
        new = [token for token in tokens if self.tokenizer.token_to_id(token) is None]
        self.tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])

    def knows(self, token: str) -> bool:
        return self.tokenizer.token_to_id(token) is not None

    @property
    def pad_alone(self) -> str:
        """The padding token if it has no other meaning (it is then never sampled), else ""."""
        return "" if self.pad in (self.bos, self.eos, self.unk) else self.pad

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> FolderTokenizer:
    """Read the tokenizer. Raises `CheckpointError` and `ConfigError`.

    `config` is the folder's `config.json`, which may have token ids that the tokenizer's files lack.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json (a fast tokenizer saves one)")
    tokenizer = open_tokenizer(file)
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        values = read_json(folder / name) if (folder / name).is_file() else {}
        settings |= {key: value for key, value in values.items() if value is not None}
    bos = _token(tokenizer, settings, config, "bos")
    return FolderTokenizer(
        tokenizer=tokenizer,
        bos=bos,
        eos=_token(tokenizer, settings, config, "eos"),
        unk=_spelling(settings.get("unk_token")),
        pad=_spelling(settings.get("pad_token")),
        begin=_begin(tokenizer, settings, bos),
    )


def _token(tokenizer: Tokenizer, settings: Mapping[str, Any], config: Mapping[str, Any], kind: str) -> str:
    """Return the token that the tokenizer's settings name, else the one whose id is in the model's configuration."""
    spelling = _spelling(settings.get(f"{kind}_token"))
    if spelling and tokenizer.token_to_id(spelling) is not None:
        return spelling
    token_id = config.get(f"{kind}_token_id")
    if not isinstance(token_id, int) or not 0 <= token_id < MAX_SIZE:
        return ""
    return tokenizer.id_to_token(token_id) or ""


def _spelling(token: Any) -> str:
    """Return a token that is written as a string, or as an object with its content."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _begin(tokenizer: Tokenizer, settings: Mapping[str, Any], bos: str) -> str:
    if (adds_bos := settings.get("add_bos_token")) is not None:
        return bos if adds_bos else ""
    first = tokenizer.encode("").tokens[:1]
    return bos if first == [bos] else ""
