"""Import IDEFICS from a Hugging Face folder: LLaMA, CLIP ViT-H/14 with its class token, and M4's own bridge.

Its gated layers precede layers 0, n, 2n, ...; new tokens have tables of their own next to the frozen ones, as in our model.
All sizes come from `config.json`; the defaults of `configuration_idefics` for absent keys are below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.files import (
    FolderTokenizer,
    Names,
    Neutral,
    NumberTypes,
    Plan,
    check_positive,
    convert,
    open_folder,
    plan,
    read_tokenizer,
    refuse_fields,
    refuse_wrong_types,
)
from model.checkpoint.language_models import activation, convert_language_model, language_model_config
from model.checkpoint.vision_models import HUGGING_FACE, clip_config, convert_clip, read_preprocessor, with_colours
from model.config import (
    FlamingoConfig,
    GatedConfig,
    LanguageModelConfig,
    PromptConfig,
    ResamplerConfig,
    VisionConfig,
)
from model.flamingo import Flamingo
from model.folder import NO_FILES, CheckpointError, read_json, save_folder, shapes_of

DEFAULTS = {
    "vocab_size": 32000,
    "additional_vocab_size": 0,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "alpha_type": "float",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "cross_layer_interval": 1,
    "qk_layer_norms": False,
    "use_resampler": False,
    "max_position_embeddings": 2048,
}
PERCEIVER_DEFAULTS = {
    "resampler_n_latents": 64,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "qk_layer_norms_perceiver": False,
}
VISION_DEFAULTS = {
    "embed_dim": 768,
    "image_size": 224,
    "intermediate_size": 5120,
    "patch_size": 14,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
# positive numbers of the model and of its perceiver
NUMBERS: NumberTypes = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "rms_norm_eps": float,
    "cross_layer_interval": int,
    "max_position_embeddings": int,
    "resampler_n_latents": int,
    "resampler_depth": int,
    "resampler_n_heads": int,
    "resampler_head_dim": int,
}
PREPROCESSOR_NEUTRAL: Neutral = {
    "do_convert_rgb": (True, None),
    "do_normalize": (True,),
    "do_rescale": (True,),
    "do_resize": (True,),
    "resample": (3,),  # bicubic
}
GATES = {"float": "scalar", "vector": "channel"}

MEDIA, FAKE, END_OF_UTTERANCE = "<image>", "<fake_token_around_image>", "<end_of_utterance>"

# names of the whole checkpoint's tensors by part
PARTS = {
    "vision": re.compile(r"model\.vision_model\."),
    "language_model": re.compile(r"model\.(layers|norm)\.|model\.embed_tokens\.weight$|lm_head\.weight$"),
}
RESAMPLER: Names = {
    "latents": "latents",
    "layers.{i}.attention.media_norm": "blocks.{i}.0.context_layer_norm",
    "layers.{i}.attention.latent_norm": "blocks.{i}.0.latents_layer_norm",
    "layers.{i}.attention.query": "blocks.{i}.0.q_proj",
    "layers.{i}.attention.key_value": ("blocks.{i}.0.k_proj", "blocks.{i}.0.v_proj"),
    "layers.{i}.attention.output": "blocks.{i}.0.output_proj",
    "layers.{i}.attention.query_norm": "blocks.{i}.0.q_layer_norm",
    "layers.{i}.attention.key_norm": "blocks.{i}.0.k_layer_norm",
    "layers.{i}.feed_forward.norm": "blocks.{i}.1.ln",
    "layers.{i}.feed_forward.up": "blocks.{i}.1.fc",
    "layers.{i}.feed_forward.down": "blocks.{i}.1.c_proj",
    "norm": "layer_norm",
}
GATED: Names = {
    "attention_norm": "input_layernorm",
    "attention.query": "cross_attn.q_proj",
    "attention.key_value": ("cross_attn.k_proj", "cross_attn.v_proj"),
    "attention.output": "cross_attn.o_proj",
    "attention.query_norm": "cross_attn.q_layer_norm",
    "attention.key_norm": "cross_attn.k_layer_norm",
    "attn_gate": "alpha_cross_attn",
    "ffw_gate": "alpha_dense",
    "ffw_norm": "post_attention_layernorm",
    "feed_forward.up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": "mlp.down_proj",
}
NEW_ROWS = {
    "embed.new_rows": "model.embed_tokens.additional_embedding.weight",
    "head.new_rows": "lm_head.additional_fc.weight",
}
# buffers that older releases of transformers saved
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.position_ids$")


@dataclass(frozen=True, slots=True)
class Folder:
    """An IDEFICS folder, with complete settings that were checked for unsupported features."""

    path: Path
    model: Mapping[str, Any]
    vision: Mapping[str, Any]
    perceiver: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Folder:
        config = read_json(path / "config.json")
        if (kind := config.get("model_type")) != "idefics":
            raise CheckpointError(f"{path} is a {kind!r} model, not 'idefics'")
        parts = {part: config.get(part) or {} for part in ("vision_config", "perceiver_config")}
        for part, values in parts.items():
            if not isinstance(values, dict):
                raise CheckpointError(f"{path}: {part} is {values!r:.60}, must be an object")
        model = check_positive(f"{path}: ", {**DEFAULTS, **config}, NUMBERS)
        perceiver = {**PERCEIVER_DEFAULTS, **parts["perceiver_config"]}
        num_new = model["additional_vocab_size"]
        if type(num_new) is not int or num_new < 0:
            raise CheckpointError(
                f"{path}: additional_vocab_size is {num_new!r:.60}, must be a whole number, 0 or more"
            )
        if not model["use_resampler"]:
            raise CheckpointError(f"{path}: use_resampler is false, IDEFICS is supported only with a resampler")
        if model["alpha_type"] not in tuple(GATES):
            raise CheckpointError(f"{path}: alpha_type is {model['alpha_type']!r}, must be one of {', '.join(GATES)}")
        return cls(
            path,
            model,
            {**VISION_DEFAULTS, **parts["vision_config"]},
            check_positive(f"{path}: perceiver_config.", perceiver, NUMBERS),
        )


def import_idefics(
    source: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    name: str = "",
    files: Mapping[str, str | bytes] = NO_FILES,
) -> FlamingoConfig:
    """Write the model of the Hugging Face folder `source` to the new folder `out`, with further text files by name.

    `dtype` None keeps what is stored; the model's name is the folder's unless it is given.
    """
    folder = Folder.open(source)
    tokenizer = read_tokenizer(source, folder.model)
    with refuse_wrong_types(f"{source / 'config.json'}: "):
        config = FlamingoConfig(
            name=name or out.resolve().name,
            family="idefics",
            vision=_vision_config(folder),
            resampler=_resampler_config(folder),
            gated=_gated_config(folder),
            language_model=_language_model_config(folder, tokenizer),
            prompt=_prompt_config(tokenizer),
        )
    tensors = _tensors(folder, config, open_folder(source))
    cast = ((name, tensor if dtype is None else tensor.to(dtype)) for name, tensor in tensors)
    save_folder(out, config, cast, tokenizer.tokenizer.to_str(), files=files)
    return config


def _vision_config(folder: Folder) -> VisionConfig:
    as_clip = {**folder.vision, "model_type": "clip_vision_model", "hidden_size": folder.vision["embed_dim"]}
    config = clip_config(as_clip)
    config = replace(config, resize="squash", keep_class_token=True, num_patches=config.num_patches + 1)
    settings = read_preprocessor(folder.path)
    refuse_fields(f"{folder.path}: the image processor's ", settings, PREPROCESSOR_NEUTRAL)
    stated = settings.get("image_size") or settings.get("size") or {}
    size = stated.get("height", config.image_size) if isinstance(stated, dict) else stated
    if size != config.image_size:
        raise CheckpointError(
            f"{folder.path}: the image processor's size is {size}, the vision model's is {config.image_size}"
        )
    return with_colours(config, settings.get("image_mean"), settings.get("image_std"))


def _as_llama(folder: Folder) -> dict[str, Any]:
    return {**folder.model, "model_type": "llama"}


def _resampler_config(folder: Folder) -> ResamplerConfig:
    settings, dim = folder.perceiver, folder.vision["embed_dim"]
    return ResamplerConfig(
        dim=dim,
        num_layers=settings["resampler_depth"],
        num_latents=settings["resampler_n_latents"],
        num_heads=settings["resampler_n_heads"],
        head_dim=settings["resampler_head_dim"],
        ffn_dim=4 * dim,
        activation="relu",
        qk_norm=settings["qk_layer_norms_perceiver"],
    )


def _gated_config(folder: Folder) -> GatedConfig:
    settings = folder.model
    return GatedConfig(
        first_layer=0,
        interval=settings["cross_layer_interval"],
        num_heads=settings["num_attention_heads"],
        head_dim=settings["hidden_size"] // settings["num_attention_heads"],
        ffn_dim=settings["intermediate_size"],
        activation=activation(settings["hidden_act"]),
        gated_ffn=True,
        norm="rms_norm",
        norm_eps=settings["rms_norm_eps"],
        qk_norm=settings["qk_layer_norms"],
        gate=GATES[settings["alpha_type"]],  # type: ignore[arg-type]
    )


def _language_model_config(folder: Folder, tokenizer: FolderTokenizer) -> LanguageModelConfig:
    config = replace(language_model_config(_as_llama(folder)), num_new_tokens=folder.model["additional_vocab_size"])
    if len(tokenizer) > config.num_token_ids:
        raise CheckpointError(
            f"{folder.path}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size} + "
            f"{config.num_new_tokens} rows"
        )
    return config


def _prompt_config(tokenizer: FolderTokenizer) -> PromptConfig:
    # only instruction-tuned models have it
    end = END_OF_UTTERANCE if tokenizer.knows(END_OF_UTTERANCE) else ""
    never = (FAKE, MEDIA, tokenizer.pad_alone)
    return PromptConfig(
        media_token=MEDIA,
        begin=tokenizer.bos,
        media_open=FAKE,
        media_close=FAKE,
        end_of_chunk=end,
        text_separator=end,
        strip_text=True,
        eos=tuple(token for token in (tokenizer.eos, end) if token),
        suppressed=tuple(token for token in never if tokenizer.knows(token)),
    )


def _tensors(folder: Folder, config: FlamingoConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model under our names, after all were checked."""
    parts = _split(tensors)
    bridge = convert(str(folder.path), _bridge_plan(config), parts["bridge"], IGNORED)
    vision = convert_clip(config.vision, parts["vision"], HUGGING_FACE)
    language_model = convert_language_model(_as_llama(folder), parts["language_model"])
    yield from bridge.items()
    yield from ((f"vision.{name}", tensor) for name, tensor in vision.items())
    yield from ((f"language_model.{name}", tensor) for name, tensor in language_model.items())


def _split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "language_model": {}, "bridge": {}}
    for name, tensor in tensors.items():
        part = next((part for part, pattern in PARTS.items() if pattern.match(name)), "bridge")
        # names of CLIP's vision model alone have no `model.` prefix
        parts[part][name.removeprefix("model.") if part == "vision" else name] = tensor
    return parts


def _bridge_plan(config: FlamingoConfig) -> Plan:
    with torch.device("meta"):
        model = Flamingo(config)
    recipes = plan(shapes_of(model.resampler.state_dict()), RESAMPLER, "resampler.", "model.perceiver_resampler.")
    for index, (i, gated) in enumerate(model.gated_layers().items()):
        shapes, theirs = shapes_of(gated.state_dict()), f"model.gated_cross_attn_layers.{index}."
        stored = (
            {} if config.gated.gate == "scalar" else {gate: (1, 1, *shapes[gate]) for gate in ("attn_gate", "ffw_gate")}
        )
        recipes |= plan(shapes, GATED, f"gated.{i}.", theirs, stored=stored)
    shapes = shapes_of(model.language_model.state_dict())
    new_rows = {name: shape for name, shape in shapes.items() if name in NEW_ROWS}
    return recipes | plan(new_rows, NEW_ROWS, "language_model.")
