"""The model folder: `config.json` describes the model, safetensors hold its weights, `tokenizer.json` its vocabulary.

It is written shard by shard into a temporary folder, which is moved to its path when complete: no more than one shard is in
memory, and no reader sees an incomplete folder. Reading is strict: the tensors must be exactly the model's.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.tensor_files import CheckpointError, SafetensorsFiles, check_shapes, shapes_of, weight_files
from model.config import FlamingoConfig, load_config
from model.flamingo import Flamingo

WEIGHTS = "model.safetensors"
SHARD_BYTES = 4 * 2**30


def save_folder(
    folder: Path,
    config: FlamingoConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_json: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder; `tokenizer_json` is a file or its text. Raises `CheckpointError` for a folder with contents."""
    with _moved_when_complete(folder) as partial:
        (partial / "config.json").write_text(config.to_json(), encoding="utf-8")
        text = tokenizer_json.read_text(encoding="utf-8") if isinstance(tokenizer_json, Path) else tokenizer_json
        (partial / "tokenizer.json").write_text(text, encoding="utf-8")
        _write_weights(partial, tensors, shard_bytes)


def load_folder(folder: Path, device: torch.device | str, dtype: torch.dtype) -> Flamingo:
    """Load the model for evaluation, with floating-point weights in `dtype`. Raises `CheckpointError`."""
    config = load_config(folder)
    files = weight_files(folder, WEIGHTS)
    if not files:
        raise CheckpointError(f"{folder} holds no weights: neither {WEIGHTS} nor {WEIGHTS}.index.json")
    with torch.device("meta"):
        model = Flamingo(config)
    stored = SafetensorsFiles(files, device)
    check_shapes(str(folder), shapes_of(model.state_dict()), {name: stored.shape(name) for name in stored})
    model.load_state_dict({name: _cast(stored[name], dtype) for name in stored}, assign=True)
    return model.eval()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextmanager
def _moved_when_complete(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `folder`, which becomes `folder` on success and is removed otherwise."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} already exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    save_file(shard, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors restricts it to the owner, but another user may serve the folder
    return {name: tensor.nbytes for name, tensor in shard.items()}


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard
