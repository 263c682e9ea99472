"""The model folder: `config.json` describes the model, safetensors hold its weights, `tokenizer.json` its vocabulary.

It is written shard by shard into a temporary folder, which is moved to its path when complete: at most one shard is in
memory, and no reader sees an incomplete folder. Reading is strict: the tensors must be exactly the model's, and one error
lists all differences. A vision folder holds only a vision encoder, from contrastive pretraining.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import FlamingoConfig, VisionConfig, from_dict, load_config
from model.flamingo import Flamingo
from model.quantised import WeightFormat, packed_tensors, replace_linears
from model.ranks import ALONE, Part, Parts, Rank, rank_config
from model.vision import VisionEncoder

Shape: TypeAlias = tuple[int, ...]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHARD_BYTES = 4 * 2**30
MAX_LISTED = 20
# how many batches a norm has seen: the only whole numbers among a model's tensors
COUNTER = ".num_batches_tracked"
NO_FILES: Mapping[str, str | bytes] = MappingProxyType({})


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as this model."""


def save_folder(
    folder: Path,
    config: FlamingoConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_json: str | Path,
    *,
    files: Mapping[str, str | bytes] = NO_FILES,
    shard_bytes: int = SHARD_BYTES,
    replaces: bool = False,
) -> None:
    """Write a model folder; `tokenizer_json` is a file or its text, `files` maps names of further files to their contents.

    With `replaces`, the new folder replaces an existing one when it is complete. Otherwise, raises `CheckpointError` if
    the folder is not empty; for a tensor with values that are not finite; `ConfigError` for a config that cannot be read.
    """
    if not replaces and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} already exists and is not an empty folder")
    from_dict(FlamingoConfig, json.loads(config.to_json()))
    with moved_when_complete(folder, replaces=replaces) as partial:
        (partial / CONFIG).write_text(config.to_json(), encoding="utf-8")
        text = tokenizer_json.read_text(encoding="utf-8") if isinstance(tokenizer_json, Path) else tokenizer_json
        for name, content in {"tokenizer.json": text, **files}.items():
            (partial / name).write_bytes(content.encode() if isinstance(content, str) else content)
        _write_weights(partial, tensors, shard_bytes)


def load_folder(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    rank: Rank = ALONE,
    weight_format: WeightFormat | None = None,
) -> Flamingo:
    """Load the model for evaluation, with floating-point weights in `dtype`. Raises `CheckpointError`.

    Of the tensors that are divided between ranks, only the part of `rank` is read. With a weight format, each matrix is
    packed as it is read, so that the device never holds all of them unpacked.
    """
    config, files = load_config(folder), model_files(folder)
    with torch.device("meta"):
        model = Flamingo(rank_config(config, rank), rank)
        whole = model if rank == ALONE else Flamingo(config)
    stored = SafetensorsFiles(files, device)
    _check(whole, folder, stored)
    if weight_format is not None:
        replace_linears(weight_format, model.language_model.layers, model.gated)
    _assign(model, stored, dtype, Parts(config, rank))
    return model.eval()


def save_vision_folder(folder: Path, config: VisionConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write the folder of a vision encoder; an existing folder is replaced."""
    with moved_when_complete(folder, replaces=True) as partial:
        (partial / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
        _write_shard(partial / WEIGHTS, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def load_vision_folder(folder: Path) -> VisionEncoder:
    """Load an encoder to the CPU, for evaluation. Raises `CheckpointError`."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is not a vision folder: it lacks {CONFIG} or {WEIGHTS}")
    config = from_dict(VisionConfig, read_json(folder / CONFIG), f"{folder}/{CONFIG}")
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    stored = SafetensorsFiles([folder / WEIGHTS])
    _check(encoder, folder, stored)
    encoder.load_state_dict(dict(stored), assign=True)
    return encoder


def _check(module: nn.Module, folder: Path, stored: SafetensorsFiles) -> None:
    check_shapes(str(folder), shapes_of(module.state_dict()), {name: stored.shape(name) for name in stored})
    for name in stored:
        check_kind(f"{folder}: {name}", is_floating=stored.is_floating(name))


def _assign(model: Flamingo, stored: SafetensorsFiles, dtype: torch.dtype, parts: Parts) -> None:
    """Replace the model's tensors by the stored ones, or by a rank's parts of them; floating-point tensors get `dtype`."""
    tensors: dict[str, Tensor] = {}
    for name in stored:
        tensors |= _prepared(model, name, stored.part(name, parts.get(name)), dtype)
    model.load_state_dict(tensors, assign=True)


def _prepared(model: Flamingo, name: str, tensor: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the model's tensors that are made from a stored one, by name."""
    packed = packed_tensors(model, name, tensor)
    if packed is not None:
        return packed
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor}


@contextmanager
def moved_when_complete(folder: Path, *, replaces: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to `folder`, which becomes `folder` on success and is removed otherwise.

    With `replaces`, an existing `folder` stays as it is until then. If `folder` is a symbolic link, its target is replaced.
    A process that is killed between the two renames leaves no `folder`, but both versions complete, as hidden folders. What
    killed processes left is removed on the next success; only one process at a time may replace a folder.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if replaces and folder.exists():
            os.replace(folder, partial.with_name(f"{partial.name}-replaced"))
        os.replace(partial, folder)
        if replaces:
            _remove_hidden(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_hidden(folder: Path) -> None:
    """Remove what replacements of the folder left next to it: earlier versions, and parts of new ones."""
    name = re.compile(rf"\.{re.escape(folder.name)}-[a-z0-9_]{{8}}(-replaced)?")  # those of `mkdtemp`
    for hidden in folder.parent.iterdir():
        if name.fullmatch(hidden.name):
            shutil.rmtree(hidden, ignore_errors=True)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    shards = [_write_shard(folder / f"shard-{n}", shard) for n, shard in enumerate(_shards(tensors, shard_bytes))]
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    total = 0
    for n, sizes in enumerate(shards):
        file = f"model-{n + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{n}").rename(folder / file)
        weight_map |= dict.fromkeys(sizes, file)
        total += sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(file: Path, shard: dict[str, Tensor]) -> dict[str, int]:
    try:
        save_file(shard, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be written: {error}") from None
    file.chmod(0o644)  # safetensors restricts it to the owner, but another user may serve the folder
    return {name: tensor.nbytes for name, tensor in shard.items()}


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        _check_values(name, tensor)
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files as one mapping; shapes are known without reading."""

    def __init__(self, files: list[Path], device: torch.device | str = "cpu") -> None:
        self._file_of: dict[str, Any] = {}
        for file in files:
            opened = _open_safetensors(file, device)
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        # safetensors returns a view of a flat tensor, which keeps the file mapped even when other data replace the view's
        return self._file_of[name].get_tensor(name).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def part(self, name: str, part: Part | None) -> Tensor:
        """Return a copy of a part of a tensor, and read nothing else; None: the whole tensor."""
        if part is None:
            return self[name]
        stored = self._file_of[name].get_slice(name)
        return torch.cat([stored[index] for index in part.indices()], part.axis)

    def shape(self, name: str) -> Shape:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def is_floating(self, name: str) -> bool:
        return str(self._file_of[name].get_slice(name).get_dtype()).startswith(("F", "BF"))


def _check_values(name: str, tensor: Tensor) -> None:
    check_kind(name, is_floating=tensor.is_floating_point())
    if tensor.is_floating_point() and tensor.numel():
        # one pass without a copy; types of 8 bits have no minimum
        extremes = torch.stack(torch.aminmax(tensor if tensor.itemsize > 1 else tensor.float()))
        if not extremes.isfinite().all():
            raise CheckpointError(f"{name} has values that are infinite or no numbers")


def check_kind(name: str, *, is_floating: bool) -> None:
    """Raise `CheckpointError` for a tensor whose values are not floating-point numbers, unless it is a counter."""
    if not is_floating and not name.endswith(COUNTER):
        raise CheckpointError(f"{name} is not a tensor of floating-point numbers")


def model_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a model folder. Raises `CheckpointError` if there are none."""
    if not (files := weight_files(folder, WEIGHTS)):
        raise CheckpointError(f"{folder} holds no weights: neither {WEIGHTS} nor {WEIGHTS}.index.json")
    return files


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return `name` itself, or the shards that `name.index.json` lists; an empty list if the folder has neither."""
    if (whole := folder / name).is_file():
        return [whole]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} does not map tensors to files: its weight_map is {str(weight_map)[:80]}")
    # an index is untrusted data: it may only name files of its own folder
    files = {file.name: file for file in folder.iterdir() if file.is_file()}
    for shard in weight_map.values():
        if not isinstance(shard, str) or shard not in files:
            raise CheckpointError(f"{index} lists {str(shard)[:80]!r}, which is not a file of {folder}")
    return [files[shard] for shard in sorted(set(weight_map.values()))]


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return values


def _open_safetensors(file: Path, device: torch.device | str) -> Any:
    try:
        return safe_open(file, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def check_shapes(
    origin: str,
    expected: Mapping[str, Shape],
    stored: Mapping[str, Shape],
    ignored: re.Pattern[str] | None = None,
) -> None:
    """Raise one `CheckpointError` with every tensor that is missing, unexpected or of another shape.

    Stored tensors whose name matches `ignored` are optional.
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
