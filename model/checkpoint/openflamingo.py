"""Import OpenFlamingo from its checkpoint.pt and the folders of its language model and its vision encoder.

The checkpoint holds the trained parts: resampler, gated layers (before layers n - 1, 2n - 1, ...) and the token table. Its
sizes are known only from the shapes of its tensors; all its attention heads are 64 wide. Its tensors of frozen parts take
precedence over their folders, as in the library.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.experts import (
    END_OF_CHUNK,
    LANGUAGE_MODEL,
    MEDIA,
    NEW_ROWS,
    VISION,
    HuggingFaceDecoder,
    VisionExpert,
    prompt_config,
)
from model.checkpoint.files import FolderTokenizer, Plan, convert, only_tensors, plan, read_pickle
from model.checkpoint.vision_models import OPEN_CLIP, convert_clip, load_clip_folder
from model.config import FlamingoConfig, GatedConfig, ResamplerConfig
from model.flamingo import Flamingo
from model.folder import NO_FILES, CheckpointError, save_folder, shapes_of

logger = logging.getLogger(__name__)

HEAD_DIM = 64
PAD = "<PAD>"

# a state dict contains these modules twice, under two paths
DUPLICATES = re.compile(r"lang_encoder\.(gated_cross_attn_layers|old_decoder_blocks)\.")
GATED_LAYER = re.compile(r"lang_encoder\..+\.(\d+)\.gated_cross_attn_layer\.")

RESAMPLER = {
    "latents": "latents",
    "frame_embeddings": "frame_embs",
    "layers.{i}.attention.media_norm": "layers.{i}.0.norm_media",
    "layers.{i}.attention.latent_norm": "layers.{i}.0.norm_latents",
    "layers.{i}.attention.query": "layers.{i}.0.to_q",
    "layers.{i}.attention.key_value": "layers.{i}.0.to_kv",
    "layers.{i}.attention.output": "layers.{i}.0.to_out",
    "layers.{i}.feed_forward.norm": "layers.{i}.1.0",
    "layers.{i}.feed_forward.up": "layers.{i}.1.1",
    "layers.{i}.feed_forward.down": "layers.{i}.1.3",
    "norm": "norm",
}
GATED = {
    "attn_gate": "attn_gate",
    "attention_norm": "attn.norm",
    "attention.query": "attn.to_q",
    "attention.key_value": "attn.to_kv",
    "attention.output": "attn.to_out",
    "ffw_gate": "ff_gate",
    "ffw_norm": "ff.0",
    "feed_forward.up": "ff.1",
    "feed_forward.down": "ff.3",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a `checkpoint.pt` by part."""

    file: Path
    bridge: dict[str, Tensor]  # resampler and gated layers, full names
    language_model: dict[str, Tensor]  # names as in the language model's own folder
    vision: dict[str, Tensor]  # names as in open_clip

    @classmethod
    def open(cls, file: Path) -> Checkpoint:
        values = read_pickle(file)
        # a training run stores the optimizer's state too, and wraps the model in DistributedDataParallel
        state = values.get("model_state_dict", values)
        if not isinstance(state, dict):
            raise CheckpointError(f"{file}: model_state_dict is a {type(state).__name__}, not a dictionary of tensors")
        tensors = {name.removeprefix("module."): t for name, t in only_tensors(state, str(file)).items()}
        parts: dict[str, dict[str, Tensor]] = {"bridge": {}, "language_model": {}, "vision": {}}
        for name, tensor in tensors.items():
            if not DUPLICATES.match(name):
                part, name = _part(name)
                parts[part][name] = tensor
        return cls(file, **parts)


def _part(name: str) -> tuple[str, str]:
    if name.startswith("vision_encoder."):
        return "vision", "visual." + name.removeprefix("vision_encoder.")
    if name.startswith("lang_encoder.") and not GATED_LAYER.match(name):
        return "language_model", name.removeprefix("lang_encoder.").replace(".decoder_layer.", ".")
    return "bridge", name


def import_openflamingo(
    *,
    checkpoint: Path,
    language_model: Path,
    vision_model: Path,
    every_n_layers: int,
    out: Path,
    dtype: torch.dtype | None = None,
    name: str = "",
    files: Mapping[str, str | bytes] = NO_FILES,
) -> FlamingoConfig:
    """Write the whole model to the new folder `out`, with further text files by name.

    `dtype` None keeps what is stored; the model's name is the folder's unless it is given.
    """
    read = Checkpoint.open(checkpoint)
    decoder, vision = _open_decoder(language_model, read), _vision_expert(vision_model, read)
    tables = {name: _rows(name, decoder, read) for name in decoder.tables}
    num_frozen = len(decoder.tokenizer) - _num_new_tokens(decoder.tokenizer)
    text = decoder.convert(
        {name: rows[:num_frozen] for name, rows in tables.items()}, prompt_config(decoder.tokenizer, never=[PAD])
    )
    config = FlamingoConfig(
        name=name or out.resolve().name,
        family="openflamingo",
        vision=vision.config,
        resampler=_resampler_config(read),
        gated=_gated_config(read, every_n_layers, text.config.num_layers),
        language_model=text.config,
        prompt=text.prompt,
    )
    bridge = convert(str(checkpoint), _bridge_plan(config, decoder.family.layers), read.bridge)
    new_rows = {f"{LANGUAGE_MODEL}{n}{NEW_ROWS}": r[num_frozen:] for n, r in tables.items() if len(r) > num_frozen}
    tensors = bridge | new_rows | vision.tensors | text.tensors
    cast = ((name, tensor if dtype is None else tensor.to(dtype)) for name, tensor in tensors.items())
    save_folder(out, config, cast, text.tokenizer.to_str(), files=files)
    return config


def _open_decoder(folder: Path, checkpoint: Checkpoint) -> HuggingFaceDecoder:
    """Open the language model with the checkpoint's tensors and OpenFlamingo's tokens."""
    decoder = HuggingFaceDecoder.open(folder)
    decoder.tokenizer.add([END_OF_CHUNK, MEDIA] if decoder.tokenizer.pad else [END_OF_CHUNK, MEDIA, PAD])
    return replace(decoder, tensors=decoder.tensors | decoder.family.full_names(checkpoint.language_model))


def _num_new_tokens(tokenizer: FolderTokenizer) -> int:
    """Return how many of the tokenizer's last ids are tokens that OpenFlamingo added."""
    ids = {tokenizer.tokenizer.token_to_id(token) for token in (END_OF_CHUNK, MEDIA, PAD)}
    return sum(1 for _ in takewhile(ids.__contains__, reversed(range(len(tokenizer)))))


def _rows(name: str, decoder: HuggingFaceDecoder, checkpoint: Checkpoint) -> Tensor:
    """Return a row per token; the language model's own table may be padded, or end before the new tokens."""
    full, table, num_tokens = decoder.family.table(name), decoder.table(name), len(decoder.tokenizer)
    if full in decoder.family.full_names(checkpoint.language_model) and len(table) != num_tokens:
        raise CheckpointError(f"the checkpoint's lang_encoder.{full} has {len(table)} rows for {num_tokens} tokens")
    if len(table) >= num_tokens:
        return table[:num_tokens]
    if name == "embed":
        raise CheckpointError(
            f"no embeddings of {MEDIA} and other new tokens: the checkpoint has no lang_encoder.{full}, and that of "
            f"{decoder.path} has {len(table)} rows for {num_tokens} tokens"
        )
    missing = num_tokens - len(table)
    logger.warning("%d new tokens have no output rows in either source, they are set to zero", missing)
    return torch.cat([table, table.new_zeros(missing, *table.shape[1:])])


def _vision_expert(folder: Path, checkpoint: Checkpoint) -> VisionExpert:
    config, tensors = load_clip_folder(folder)
    if checkpoint.vision:
        tensors = convert_clip(config, checkpoint.vision, OPEN_CLIP)
    return VisionExpert(config=config, tensors={f"{VISION}{name}": tensor for name, tensor in tensors.items()})


def _resampler_config(checkpoint: Checkpoint) -> ResamplerConfig:
    if "perceiver.media_time_embs" in checkpoint.bridge:
        raise CheckpointError(
            f"{checkpoint.file}: perceiver.media_time_embs makes visual tokens depend on the position of media in the "
            "prompt, which is not supported: media are encoded once for all positions"
        )
    num_latents, dim = _sizes(checkpoint, "perceiver.latents")
    ffn_dim, _ = _sizes(checkpoint, "perceiver.layers.0.1.1.weight")
    frames = checkpoint.bridge.get("perceiver.frame_embs")
    return ResamplerConfig(
        dim=dim,
        num_layers=len({name.split(".")[2] for name in checkpoint.bridge if name.startswith("perceiver.layers.")}),
        num_latents=num_latents,
        num_heads=_num_heads(checkpoint, "perceiver.layers.0.0.to_q.weight"),
        head_dim=HEAD_DIM,
        ffn_dim=ffn_dim,
        activation="gelu",
        num_frames=0 if frames is None else len(frames),
    )


def _gated_config(checkpoint: Checkpoint, every_n_layers: int, num_layers: int) -> GatedConfig:
    stored = {int(match[1]): match[0] for match in map(GATED_LAYER.match, checkpoint.bridge) if match}
    expected = list(range(every_n_layers - 1, num_layers, every_n_layers)) if every_n_layers > 0 else []
    if not expected or sorted(stored) != expected:
        raise CheckpointError(
            f"{checkpoint.file} has gated layers before layers {sorted(stored)} of the language model's {num_layers}, "
            f"but with one every {every_n_layers} layers they should be before {expected}"
        )
    first = stored[expected[0]]
    ffn_dim, _ = _sizes(checkpoint, f"{first}ff.1.weight")
    return GatedConfig(
        first_layer=every_n_layers - 1,
        interval=every_n_layers,
        num_heads=_num_heads(checkpoint, f"{first}attn.to_q.weight"),
        head_dim=HEAD_DIM,
        ffn_dim=ffn_dim,
        activation="gelu",
    )


def _sizes(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Return the shape of a matrix. Raises `CheckpointError` if it is missing or not a matrix."""
    if name not in checkpoint.bridge:
        raise CheckpointError(f"{checkpoint.file} has no tensor {name}")
    shape = tuple(checkpoint.bridge[name].shape)
    if len(shape) != 2:
        raise CheckpointError(f"{checkpoint.file}: {name} has shape {list(shape)}, expected a matrix")
    return shape


def _num_heads(checkpoint: Checkpoint, name: str) -> int:
    rows, _ = _sizes(checkpoint, name)
    if rows % HEAD_DIM:
        raise CheckpointError(
            f"{checkpoint.file}: {name} has {rows} rows, not a multiple of {HEAD_DIM} (a head's width)"
        )
    return rows // HEAD_DIM


def _bridge_plan(config: FlamingoConfig, layers: str) -> Plan:
    with torch.device("meta"):
        model = Flamingo(config)
    recipes = plan(shapes_of(model.resampler.state_dict()), RESAMPLER, "resampler.", "perceiver.")
    for i, gated in model.gated_layers().items():
        theirs = f"lang_encoder.{layers}.{i}.gated_cross_attn_layer."
        recipes |= plan(shapes_of(gated.state_dict()), GATED, f"gated.{i}.", theirs)
    return recipes
