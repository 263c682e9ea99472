"""Tensors on disk as mappings from name to tensor, read on access and never executed; and the check that they fit a model.

A folder holds safetensors or PyTorch files, whole or in shards with an index; a `.pt` file holds a dictionary. Both are
mapped into memory, so that a conversion does not hold its sources as well as its results. One error lists everything that
does not fit.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
# field -> its neutral values; any other value is a feature that is not implemented
Neutral: TypeAlias = Mapping[str, tuple[Any, ...]]

MAX_LISTED = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot become this model."""


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files as one mapping; shapes are known without reading."""

    def __init__(self, files: list[Path], device: torch.device | str = "cpu") -> None:
        self._file_of: dict[str, Any] = {}
        for file in files:
            opened = _open_safetensors(file, device)
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> Shape:
        return tuple(self._file_of[name].get_slice(name).get_shape())


def open_folder(folder: Path, stems: tuple[str, ...] = ("model", "pytorch_model")) -> Mapping[str, Tensor]:
    """Open the tensors of a Hugging Face folder: safetensors if there are any, PyTorch files otherwise."""
    for kind in ("safetensors", "bin"):
        for stem in stems:
            if files := weight_files(folder, f"{stem}.{kind}"):
                return SafetensorsFiles(files) if kind == "safetensors" else _merged(files)
    names = " or ".join(f"{stem}.{kind}[.index.json]" for stem in stems for kind in ("safetensors", "bin"))
    raise CheckpointError(f"{folder} holds no weights: none of {names}")


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return `name` itself, or the shards that `name.index.json` lists; an empty list if the folder has neither."""
    if (whole := folder / name).is_file():
        return [whole]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    for shard in shards:
        # an index is untrusted data: it may only name files of its own folder
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"{index} lists {shard!r}, which is not a file of {folder}")
    return [folder / shard for shard in shards]


def read_pickle(file: Path) -> dict[str, Any]:
    """Read plain data that `torch.save` wrote; anything that would run code is refused."""
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file")
    try:
        # files from before PyTorch 1.6 are no zip archives and cannot be mapped
        read = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} cannot be read as tensors and plain data alone: {reason}") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{file} holds a {type(read).__name__}, not a dictionary of tensors")
    return read


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return values


def only_tensors(values: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """Return the values; `CheckpointError` names those that are not tensors."""
    if unexpected := [str(name) for name, value in values.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{origin} holds more than tensors: {', '.join(unexpected[:20])}")
    return dict(values)


def _merged(files: list[Path]) -> dict[str, Tensor]:
    return {name: tensor for file in files for name, tensor in only_tensors(read_pickle(file), str(file)).items()}


def _open_safetensors(file: Path, device: torch.device | str) -> Any:
    try:
        return safe_open(file, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def refuse_fields(prefix: str, fields: Mapping[str, Any], neutral: Neutral) -> None:
    """Raise `CheckpointError` for the first field whose value is not neutral; an absent field is neutral."""
    for name, values in neutral.items():
        if name in fields and fields[name] not in values:
            raise CheckpointError(f"{prefix}{name} = {fields[name]!r} is not implemented")


def check_shapes(
    origin: str,
    expected: Mapping[str, Shape],
    stored: Mapping[str, Shape],
    ignored: re.Pattern[str] | None = None,
) -> None:
    """Raise one `CheckpointError` with every tensor that is missing, unexpected or of another shape.

    Stored tensors whose name matches `ignored` may be there or not.
    """
    unexpected = [name for name in stored if name not in expected and not (ignored and ignored.search(name))]
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unexpected": unexpected,
        "misshapen": [
            f"{name}: found {list(stored[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if stored.get(name, shape) != shape
        ],
    }
    lines = [f"{title} ({len(names)}): {'; '.join(_shorten(names))}" for title, names in problems.items() if names]
    if lines:
        raise CheckpointError(f"{origin} does not fit the model. " + ". ".join(lines))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _shorten(names: Sequence[str]) -> list[str]:
    if len(names) <= MAX_LISTED:
        return list(names)
    return [*names[:MAX_LISTED], f"and {len(names) - MAX_LISTED} more"]
