"""A folder loads as the model that was saved; a folder of other tensors is refused with a list of all that do not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import load_config
from model.folder import CheckpointError, load_folder, save_folder
from tests.tiny_models import CONFIGS, FAMILIES, Family, byte_tokenizer, tiny_model

CONFIG = CONFIGS["idefics"]
TOKENIZER = byte_tokenizer().to_str()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_folder(tmp_path / "tiny", CONFIG, tiny_model(CONFIG).state_dict().items(), TOKENIZER)
    return tmp_path / "tiny"


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors by name (dots as __); None removes a tensor."""
    tensors: dict[str, Tensor | None] = {**load_file(folder / "model.safetensors")}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("shard_bytes", [2**30, 4096], ids=["whole", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads(family: Family, shard_bytes: int, tmp_path: Path) -> None:
    saved = tiny_model(CONFIGS[family]).state_dict()
    folder = tmp_path / "below" / "tiny"
    save_folder(folder, CONFIGS[family], saved.items(), TOKENIZER, shard_bytes=shard_bytes)
    loaded = load_folder(folder, "cpu", torch.float32)
    assert loaded.config == load_config(folder) == CONFIGS[family]
    assert not loaded.training
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    assert (folder / "tokenizer.json").read_text() == TOKENIZER


def test_shards_have_the_requested_size_and_hugging_face_names(tmp_path: Path) -> None:
    model = tiny_model(CONFIG)
    save_folder(tmp_path / "tiny", CONFIG, model.state_dict().items(), TOKENIZER, shard_bytes=40_000)
    files = sorted(file.name for file in (tmp_path / "tiny").glob("*.safetensors"))
    assert len(files) > 1
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "tiny" / file).values()) for file in files]
    assert max(sizes) <= 40_000
    index = json.loads((tmp_path / "tiny" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


def test_no_more_than_one_shard_is_in_memory(tmp_path: Path) -> None:
    alive = 0

    class Watched(Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal alive
        for name, tensor in tiny_model(CONFIG).state_dict().items():
            alive += 1
            assert alive <= 3, f"{alive} tensors are alive where a shard has room for one"
            yield name, tensor.clone().as_subclass(Watched)

    save_folder(tmp_path / "tiny", CONFIG, stream(), TOKENIZER, shard_bytes=1)


def test_weights_load_in_the_requested_dtype(folder: Path) -> None:
    model = load_folder(folder, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_one_error_lists_all_that_does_not_fit(folder: Path) -> None:
    rewrite(folder, resampler__latents=torch.zeros(7, 16), gated__0__attn_gate=None, gated__0__alpha=torch.zeros(1))
    with pytest.raises(CheckpointError) as raised:
        load_folder(folder, "cpu", torch.float32)
    message = str(raised.value)
    assert "missing (1): gated.0.attn_gate" in message
    assert "unexpected (1): gated.0.alpha" in message
    assert "misshapen (1): resampler.latents: found [7, 16], expected [4, 16]" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_of_other_numbers_are_refused(dtype: torch.dtype, folder: Path) -> None:
    rewrite(folder, resampler__latents=torch.ones(4, 16, dtype=dtype))
    with pytest.raises(CheckpointError, match=r"resampler\.latents is not a tensor of floating-point numbers"):
        load_folder(folder, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("model.safetensors", None, "holds no weights"),
        ("model.safetensors", "not tensors", "cannot be read as safetensors"),
        ("model.safetensors.index.json", '{"weight_map": {"x": "../x.safetensors"}}', "not a file of"),
        ("model.safetensors.index.json", "[]", "does not hold a JSON object"),
        ("model.safetensors.index.json", '{"weight_map": []}', r"index\.json does not map tensors to files"),
        ("model.safetensors.index.json", '{"weight_map": {"x": 1, "y": "z"}}', r"index\.json lists '1'"),
        ("model.safetensors.index.json", '{"weight_map": {"x": ["z"]}}', r"index\.json lists "),
        ("model.safetensors.index.json", '{"weight_map": {"x": "' + "z" * 5000 + '"}}', r"index\.json lists 'zz"),
        ("model.safetensors.index.json", '{"a":' * 100_000, r"index\.json is not JSON"),
        ("model.safetensors.index.json", "9" * 5000, r"index\.json is not JSON"),
    ],
)
def test_files_without_weights_are_refused_by_name(file: str, text: str | None, complaint: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        load_folder(folder, "cpu", torch.float32)


def test_an_existing_folder_is_not_overwritten(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="already exists"):
        save_folder(folder, CONFIG, tiny_model(CONFIG, seed=1).state_dict().items(), TOKENIZER)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(1)
        raise CheckpointError("half way")

    with pytest.raises(CheckpointError, match="half way"):
        save_folder(tmp_path / "tiny", CONFIG, broken(), TOKENIZER, shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_the_target_of_a_link_is_replaced(folder: Path, tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "large disk" / "tiny", tmp_path / "out" / "model"
    for path in (target, link):
        path.parent.mkdir()
    link.symlink_to(target)
    if exists:
        folder.rename(target)
    for killed in (".tiny-x1y2_z34", ".tiny-x1y2_z34-replaced"):
        (target.parent / killed).mkdir()
    kept = [target.parent / name for name in (".tiny-2-x1y2_z34", ".tiny-notes")]
    for folder_kept in kept:
        folder_kept.mkdir()
    weights = tiny_model(CONFIG, seed=1).state_dict()
    save_folder(link, CONFIG, weights.items(), TOKENIZER, replaces=True)
    assert link.readlink() == target
    loaded = load_folder(target, "cpu", torch.float32).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())
    assert {*target.parent.iterdir()} == {target, *kept}
    assert [*link.parent.iterdir()] == [link]
