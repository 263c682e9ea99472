"""Reading of foreign checkpoints: their tensors as mappings from name to tensor, and plain data, which is never executed.

A folder holds safetensors or PyTorch files, whole or in shards with an index; a `.pt` file holds a dictionary. Both are
mapped into memory, so that a conversion does not hold its sources as well as its results.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from model.folder import CheckpointError, SafetensorsFiles, weight_files

# field -> its neutral values; any other value is a feature that is not implemented
Neutral: TypeAlias = Mapping[str, tuple[Any, ...]]


def open_folder(folder: Path, stems: tuple[str, ...] = ("model", "pytorch_model")) -> Mapping[str, Tensor]:
    """Open the tensors of a Hugging Face folder: safetensors if there are any, PyTorch files otherwise."""
    for kind in ("safetensors", "bin"):
        for stem in stems:
            if files := weight_files(folder, f"{stem}.{kind}"):
                return SafetensorsFiles(files) if kind == "safetensors" else _merged(files)
    names = " or ".join(f"{stem}.{kind}[.index.json]" for stem in stems for kind in ("safetensors", "bin"))
    raise CheckpointError(f"{folder} holds no weights: none of {names}")


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


def only_tensors(values: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """Return the values; `CheckpointError` names those that are not tensors."""
    if unexpected := [str(name) for name, value in values.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{origin} holds more than tensors: {', '.join(unexpected[:20])}")
    return dict(values)


def _merged(files: list[Path]) -> dict[str, Tensor]:
    return {name: tensor for file in files for name, tensor in only_tensors(read_pickle(file), str(file)).items()}


def refuse_fields(prefix: str, fields: Mapping[str, Any], neutral: Neutral) -> None:
    """Raise `CheckpointError` for the first field whose value is not neutral; an absent field is neutral."""
    for name, values in neutral.items():
        if name in fields and fields[name] not in values:
            raise CheckpointError(f"{prefix}{name} = {fields[name]!r} is not implemented")
