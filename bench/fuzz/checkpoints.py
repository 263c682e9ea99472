"""Loads mutated model folders and checkpoints: each must load, or be refused with an error that names the file.

The files are those that a user downloads: `config.json`, safetensors and their index, `tokenizer.json`, PyTorch's archives
and GGUF.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from bench import random_models
from bench.fuzz.isolated import Try
from bench.fuzz.mutation import mutate, mutate_json
from model.checkpoint.files import open_folder, read_pickle, read_tokenizer
from model.checkpoint.gguf import GGUFFile
from model.config import ConfigError
from model.folder import CheckpointError, load_folder, read_json
from server.served_model import ServedModel
from server.settings import Settings, SettingsError

# a header may announce any size; the process must not take it
MEMORY_BYTES = 16 * 2**30
EXPECTED = (CheckpointError, ConfigError, SettingsError)
TOKENS = ["<s>", "</s>", "a", "b", "ab", "<image>"]


@dataclass(frozen=True, slots=True)
class Door:
    """A file of a folder, and the function that reads the folder."""

    folder: Path
    file: str
    read: Callable[[Path], object]


def make() -> Try:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    folder = Path(tempfile.mkdtemp(prefix="flamboyance-fuzz-"))
    doors = _doors(folder)
    originals = {door.folder / door.file: (door.folder / door.file).read_bytes() for door in doors}

    def attempt(rng: random.Random) -> str | None:
        door = rng.choice(doors)
        path = door.folder / door.file
        path.write_bytes(_changed(originals[path], rng, is_json=path.suffix == ".json"))
        try:
            door.read(door.folder)
        except EXPECTED as error:
            return None if str(error) else f"{door.file}: an error without a message"
        except BaseException as error:  # a panic of a Rust library is not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return f"{door.file}: {_described(error)}"
        finally:
            path.write_bytes(originals[path])
        return None

    return attempt


def _changed(data: bytes, rng: random.Random, *, is_json: bool) -> bytes:
    if is_json and rng.random() < 0.8:
        return mutate_json(json.loads(data), rng)
    if data[8:9] == b"{" and rng.random() < 0.6:  # the header of safetensors
        length = int.from_bytes(data[:8], "little")
        header = mutate_json(json.loads(data[8 : 8 + length]), rng)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return mutate(data, rng)


def _described(error: BaseException) -> str:
    """Return the type of an error and the innermost function of this repository in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/model/" in frame.filename or "/server/" in frame.filename]
    function = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"
    return f"{type(error).__name__} in {function}"


def _doors(folder: Path) -> list[Door]:
    native, sharded, pickled, gguf = (folder / name for name in ("native", "sharded", "pickled", "gguf"))
    shutil.copytree(random_models.folder("tiny"), native)
    shutil.copytree(native, sharded)
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    names = _open_names(native)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    pickled.mkdir()
    torch.save({"a": torch.zeros(3, 2), "b": torch.ones(4, dtype=torch.bfloat16)}, pickled / "pytorch_model.bin")
    gguf.mkdir()
    write_gguf(gguf / "model.gguf")
    (native / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "add_bos_token": True}))
    return [
        Door(native, "config.json", _load),
        Door(native, "model.safetensors", _load),
        Door(native, "config.json", _serve),
        Door(native, "model.safetensors", _serve),
        Door(native, "tokenizer.json", _serve),
        Door(native, "tokenizer.json", lambda path: read_tokenizer(path, {})),
        Door(native, "tokenizer_config.json", lambda path: read_tokenizer(path, {"eos_token_id": 1})),
        Door(native, "config.json", lambda path: read_tokenizer(path, read_json(path / "config.json"))),
        Door(sharded, "model.safetensors.index.json", _load),
        Door(pickled, "pytorch_model.bin", lambda path: dict(open_folder(path))),
        Door(pickled, "pytorch_model.bin", lambda path: read_pickle(path / "pytorch_model.bin")),
        Door(gguf, "model.gguf", _read_gguf),
    ]


def _open_names(folder: Path) -> list[str]:
    return list(open_folder(folder))


def _load(folder: Path) -> object:
    return load_folder(folder, "cpu", torch.float32)


def _serve(folder: Path) -> object:
    return ServedModel.load(Settings(model=str(folder)))


def _read_gguf(folder: Path) -> object:
    file = GGUFFile(folder / "model.gguf")
    return file.config(), file.tensors(), file.tokenizer(["<eoc>"])


def write_gguf(path: Path) -> None:
    """Write a Llama of one layer."""
    dim, hidden, heads = 32, 32, 2
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(dim)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 1, 1, 1, 4])
    writer.add_token_merges(["a b"])
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {
        "token_embd": (len(TOKENS), dim),
        **{f"blk.0.{name}": (dim, dim) for name in matrices},
        **dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), (dim,)),
    }
    for name, shape in shapes.items():
        kind = GGMLQuantizationType.Q4_1 if len(shape) == 2 else GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", quantize(np.ones(shape, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
