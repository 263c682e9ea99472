"""Tiny repositories under the published names and in their formats, made of the stored OpenFlamingo checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.files import open_folder
from model.hub.published import CLIP_VIT_L_14
from tests.model.checkpoint.test_idefics import make_model, make_processor
from tests.model.checkpoint.test_openflamingo import GOLDENS, read

REDPAJAMA = "openflamingo/OpenFlamingo-4B-vitl-rpj3b"
LLAMA = "openflamingo/OpenFlamingo-9B"
# repository -> the stored checkpoint that it is made of, and the layers that have a gated one before them
CHECKPOINTS = {
    "openflamingo/OpenFlamingo-3B-vitl-mpt1b": ("mpt", (0, 1, 2, 3)),
    "openflamingo/OpenFlamingo-3B-vitl-mpt1b-langinstruct": ("mpt", (0, 1, 2, 3)),
    "openflamingo/OpenFlamingo-4B-vitl-rpj3b": ("gpt_neox", (1,)),
    "openflamingo/OpenFlamingo-4B-vitl-rpj3b-langinstruct": ("gpt_neox", (1,)),
    "openflamingo/OpenFlamingo-9B-vitl-mpt7b": ("mpt", (3,)),
    "openflamingo/OpenFlamingo-9B": ("llama", (0, 1)),
}
LANGUAGE_MODELS = {
    "anas-awadalla/mpt-7b": "mpt",
    "togethercomputer/RedPajama-INCITE-Base-3B-v1": "gpt_neox",
    "togethercomputer/RedPajama-INCITE-Instruct-3B-v1": "gpt_neox",
}
MOSAIC_GPT = ("anas-awadalla/mpt-1b-redpajama-200b", "anas-awadalla/mpt-1b-redpajama-200b-dolly")
MOSAIC_NAMES = {".norm_1.": ".ln_1.", ".norm_2.": ".ln_2.", ".ffn.": ".mlp.mlp_", ".norm_f.": ".ln_f."}
GATES = ("attn_gate", "ff_gate")


def write_openflamingo(root: Path) -> dict[str, Path]:
    """Write the repositories; return their folders by name."""
    folders = {CLIP_VIT_L_14: GOLDENS / "clip"}
    folders |= {name: GOLDENS / golden / "language_model" for name, golden in LANGUAGE_MODELS.items()}
    folders |= dict.fromkeys(MOSAIC_GPT, _write_mosaic_gpt(root / "mosaic_gpt"))
    for name, (golden, layers) in CHECKPOINTS.items():
        folders[name] = root / name
        folders[name].mkdir(parents=True)
        torch.save(_with_layers(read(golden), layers), folders[name] / "checkpoint.pt")
        (folders[name] / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n")
    return folders


def _with_layers(state: dict[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the state with gated layers before these layers; the gates of a layer that was added are closed."""
    gated = {name: tensor for name, tensor in state.items() if ".gated_cross_attn_layer." in name}
    stored = {int(name.partition(".gated")[0].rpartition(".")[2]) for name in gated}
    kept = {name: tensor for name, tensor in state.items() if name not in gated}
    for layer in layers:
        origin = layer if layer in stored else min(stored)
        for name, tensor in gated.items():
            if f".{origin}.gated" in name:
                is_closed = layer not in stored and name.endswith(GATES)
                kept[name.replace(f".{origin}.gated", f".{layer}.gated")] = tensor * 0 if is_closed else tensor.clone()
    return kept


def _write_mosaic_gpt(folder: Path) -> Path:
    """Write the stored MPT as MosaicML's first code saved it, in one PyTorch file."""
    origin = GOLDENS / "mpt" / "language_model"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(origin / name, folder)
    config = json.loads((origin / "config.json").read_text())
    sizes = {name: config[name] for name in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size")}
    mosaic = {"model_type": "mosaic_gpt", "mlp_ratio": 4, "alibi": True, "no_bias": True}
    (folder / "config.json").write_text(json.dumps({**sizes, **mosaic}))
    torch.save(
        {_mosaic_name(name): tensor for name, tensor in open_folder(origin).items()}, folder / "pytorch_model.bin"
    )
    return folder


def _mosaic_name(name: str) -> str:
    for theirs, ours in MOSAIC_NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("up_proj", "up").replace("down_proj", "down")


def write_idefics(folder: Path) -> Path:
    processor = make_processor()
    make_model(len(processor.tokenizer), qk_layer_norms=True, alpha_type="float").save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    return folder
