"""Import Hugging Face decoders: each family is a reader of its configuration and a table of names.

A checkpoint with a feature that the decoder does not implement is refused, and the error names the field: a model either
computes the same numbers as its original or does not load. The tables follow transformers' modules, that of MPT-1B
(`mosaic_gpt`) its own code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.files import (
    Names,
    Neutral,
    NumberTypes,
    Plan,
    Rearrange,
    check_positive,
    convert,
    plan,
    refuse_fields,
    refuse_wrong_types,
)
from model.config import Activation, LanguageModelConfig
from model.folder import CheckpointError, shapes_of
from model.language_model import LanguageModel

HuggingFaceConfig = Mapping[str, Any]

CONFIG = "the language model's config: "
QKV = "layers.{i}.attention.qkv"

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
}

# positive numbers; where the reader has a default, it replaces a null
NUMBERS: NumberTypes = {
    "vocab_size": int,
    "hidden_size": int,
    "d_model": int,
    "num_hidden_layers": int,
    "n_layers": int,
    "num_attention_heads": int,
    "n_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "intermediate_size": int,
    "ffn_dim": int,
    "max_position_embeddings": int,
    "max_seq_len": int,
    "rms_norm_eps": float,
    "layer_norm_eps": float,
    "layer_norm_epsilon": float,
    "rope_theta": float,
    "rotary_emb_base": float,
    "rotary_pct": float,
    "partial_rotary_factor": float,
    "expansion_ratio": int,
    "mlp_ratio": int,
}

NEUTRAL_ANYWHERE: Neutral = {"quantization_config": (None,)}
NEUTRAL_ROTARY: Neutral = {"rope_type": (None, "default"), "type": (None, "default"), "factor": (None, 1.0)}
NEUTRAL_LLAMA: Neutral = {"sliding_window": (None,), "partial_rotary_factor": (None, 1.0)}
NEUTRAL_MPT: Neutral = {
    "logit_scale": (None,),
    "no_bias": (True,),
    "norm_type": ("layernorm", "low_precision_layernorm"),
}
NEUTRAL_MPT_ATTENTION: Neutral = {
    "alibi": (True,),
    "attn_type": ("multihead_attention",),
    "clip_qkv": (None,),
    "prefix_lm": (None, False),
    "qk_gn": (None, False),
    "rope": (None, False),
    "sliding_window_size": (-1,),
    "softmax_scale": (None,),
}
NEUTRAL_MOSAIC: Neutral = {
    "alibi": (True,),
    "attn_clip_qkv": (None,),
    "logit_scale": (None,),
    "no_bias": (True,),
    "prefix_lm": (None, False),
    "softmax_scale": (None,),
}


def activation(name: Any) -> Activation:
    if name not in tuple(ACTIVATIONS):
        raise CheckpointError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rotary(config: HuggingFaceConfig) -> dict[str, Any]:
    """Return the fields of rotary positions, read from `rope_parameters` (transformers 5) or from the older fields."""
    for name in ("rope_scaling", "rope_parameters"):
        refuse_fields(f"{CONFIG}{name}.", config.get(name) or {}, NEUTRAL_ROTARY)
    return {**config, **check_positive(f"{CONFIG}rope_parameters.", config.get("rope_parameters") or {}, NUMBERS)}


def _decoder(config: HuggingFaceConfig, **fields: Any) -> LanguageModelConfig:
    """Return a configuration from the sizes that most families of transformers name alike, and further fields."""
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    sizes = {
        "vocab_size": config["vocab_size"],
        "dim": dim,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": dim // heads,
        "max_positions": config.get("max_position_embeddings", 2048),
    }
    return LanguageModelConfig(**sizes | fields)


def llama(config: HuggingFaceConfig) -> LanguageModelConfig:
    rope = rotary(config)
    refuse_fields(CONFIG, rope, NEUTRAL_LLAMA)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return _decoder(
        config,
        family="llama",
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        ffn_dim=config["intermediate_size"],
        activation=activation(config.get("hidden_act", "silu")),
        norm="rms_norm",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        gated_ffn=True,
        position="rotary",
        rotary_dim=head_dim,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        qkv_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        ffn_bias=config.get("mlp_bias", False),
        tied_head=config.get("tie_word_embeddings", False),
    )


def gpt_neox(config: HuggingFaceConfig) -> LanguageModelConfig:
    rope = rotary(config)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rotary_part = rope.get("partial_rotary_factor", rope.get("rotary_pct", 0.25))
    return _decoder(
        config,
        family="gpt_neox",
        ffn_dim=config["intermediate_size"],
        activation=activation(config.get("hidden_act", "gelu")),
        norm="layer_norm",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        norm_bias=True,
        position="rotary",
        rotary_dim=int(head_dim * rotary_part),
        rope_theta=float(rope.get("rope_theta", rope.get("rotary_emb_base", 10000.0))),
        qkv_bias=config.get("attention_bias", True),
        output_bias=config.get("attention_bias", True),
        ffn_bias=True,
        parallel_residual=config.get("use_parallel_residual", True),
        tied_head=config.get("tie_word_embeddings", False),
    )


def mpt(config: HuggingFaceConfig) -> LanguageModelConfig:
    attention = config.get("attn_config") or {}
    refuse_fields(CONFIG, config, NEUTRAL_MPT)
    refuse_fields(f"{CONFIG}attn_config.", attention, NEUTRAL_MPT_ATTENTION)
    return _mosaic_decoder(
        config,
        ffn_ratio=config.get("expansion_ratio", 4),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        alibi_bias_max=attention.get("alibi_bias_max", 8),
        qk_norm=attention.get("qk_ln", False),
        tied_head=config.get("tie_word_embeddings", True),
    )


def mosaic_gpt(config: HuggingFaceConfig) -> LanguageModelConfig:
    refuse_fields(CONFIG, {"alibi": False, "no_bias": False, **config}, NEUTRAL_MOSAIC)
    return _mosaic_decoder(
        config,
        ffn_ratio=config.get("mlp_ratio", 4),
        norm_eps=1e-5,
        alibi_bias_max=config.get("alibi_bias_max", 8),
        qk_norm=config.get("attn_qk_ln", False),
        tied_head=True,
    )


def _mosaic_decoder(
    config: HuggingFaceConfig, *, ffn_ratio: int, norm_eps: float, alibi_bias_max: int, qk_norm: bool, tied_head: bool
) -> LanguageModelConfig:
    return LanguageModelConfig(
        family="mpt",
        vocab_size=config["vocab_size"],
        dim=config["d_model"],
        num_layers=config["n_layers"],
        num_heads=config["n_heads"],
        num_kv_heads=config["n_heads"],
        head_dim=config["d_model"] // config["n_heads"],
        ffn_dim=ffn_ratio * config["d_model"],
        activation="gelu",
        max_positions=config.get("max_seq_len", 2048),
        norm="layer_norm",
        norm_eps=norm_eps,
        position="alibi",
        alibi_bias_max=alibi_bias_max,
        qk_norm=qk_norm,
        tied_head=tied_head,
    )


def opt(config: HuggingFaceConfig) -> LanguageModelConfig:
    bias = config.get("enable_bias", True)
    neutral = {
        "word_embed_proj_dim": (None, config["hidden_size"]),
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (None, False),
        "layer_norm_elementwise_affine": (True,),
    }
    refuse_fields(CONFIG, config, neutral)
    return _decoder(
        config,
        family="opt",
        ffn_dim=config["ffn_dim"],
        activation=activation(config.get("activation_function", "relu")),
        norm="layer_norm",
        norm_eps=1e-5,
        norm_bias=True,
        position="learned",
        position_offset=2,
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=bias,
        tied_head=config.get("tie_word_embeddings", True),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of decoders, as a reader of its configuration and a table of names."""

    read: Callable[[HuggingFaceConfig], LanguageModelConfig]
    names: Names
    # prefix of every module but the head; files of the bare decoder lack it
    root: str
    # buffers that some versions of the library saved
    ignored: str
    # [head 0: query, key, value; head 1: ...] instead of [queries; keys; values]
    interleaved_qkv: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> str:
        """The path of the layers, without the index of a layer."""
        return str(self.names["layers.{i}.attention_norm"]).partition(".{i}.")[0]

    def table(self, name: str) -> str:
        return f"{self.names[name]}.weight"

    def full_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under the names of a whole model, also those of a bare decoder or of another version."""
        return {self._full_name(name): tensor for name, tensor in tensors.items()}

    def _full_name(self, name: str) -> str:
        name = self.renamed.get(name, name)
        first = name.split(".", 1)[0]
        return name if first in (self.root, self.names["head"]) else f"{self.root}.{name}"


LLAMA: Names = {
    "embed": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.qkv": tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    "layers.{i}.attention.output": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.feed_forward.up": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    "layers.{i}.feed_forward.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
GPT_NEOX: Names = {
    "embed": "gpt_neox.embed_in",
    "layers.{i}.attention_norm": "gpt_neox.layers.{i}.input_layernorm",
    "layers.{i}.attention.qkv": "gpt_neox.layers.{i}.attention.query_key_value",
    "layers.{i}.attention.output": "gpt_neox.layers.{i}.attention.dense",
    "layers.{i}.ffn_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "layers.{i}.feed_forward.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "layers.{i}.feed_forward.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
MPT: Names = {
    "embed": "transformer.wte",
    "layers.{i}.attention_norm": "transformer.blocks.{i}.norm_1",
    "layers.{i}.attention.qkv": "transformer.blocks.{i}.attn.Wqkv",
    "layers.{i}.attention.query_norm": "transformer.blocks.{i}.attn.q_ln",
    "layers.{i}.attention.key_norm": "transformer.blocks.{i}.attn.k_ln",
    "layers.{i}.attention.output": "transformer.blocks.{i}.attn.out_proj",
    "layers.{i}.ffn_norm": "transformer.blocks.{i}.norm_2",
    "layers.{i}.feed_forward.up": "transformer.blocks.{i}.ffn.up_proj",
    "layers.{i}.feed_forward.down": "transformer.blocks.{i}.ffn.down_proj",
    "norm": "transformer.norm_f",
    "head": "lm_head",
}
MOSAIC_GPT: Names = {
    **MPT,
    "layers.{i}.attention_norm": "transformer.blocks.{i}.ln_1",
    "layers.{i}.ffn_norm": "transformer.blocks.{i}.ln_2",
    "layers.{i}.feed_forward.up": "transformer.blocks.{i}.mlp.mlp_up",
    "layers.{i}.feed_forward.down": "transformer.blocks.{i}.mlp.mlp_down",
    "norm": "transformer.ln_f",
}
OPT: Names = {
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "layers.{i}.attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
    "layers.{i}.attention.qkv": tuple(f"model.decoder.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    "layers.{i}.attention.output": "model.decoder.layers.{i}.self_attn.out_proj",
    "layers.{i}.ffn_norm": "model.decoder.layers.{i}.final_layer_norm",
    "layers.{i}.feed_forward.up": "model.decoder.layers.{i}.fc1",
    "layers.{i}.feed_forward.down": "model.decoder.layers.{i}.fc2",
    "norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}

FAMILIES = {
    "llama": Family(read=llama, names=LLAMA, root="model", ignored=r"rotary_emb\.inv_freq$"),
    "gpt_neox": Family(
        read=gpt_neox,
        names=GPT_NEOX,
        root="gpt_neox",
        ignored=r"\.attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$",
        interleaved_qkv=True,
        renamed={"lm_head.weight": "embed_out.weight"},
    ),
    "mpt": Family(read=mpt, names=MPT, root="transformer", ignored=r"\.attn_bias$"),
    "mosaic_gpt": Family(read=mosaic_gpt, names=MOSAIC_GPT, root="transformer", ignored=r"\.attn_bias$"),
    "opt": Family(read=opt, names=OPT, root="model", ignored=r"\.decoder\.version$"),
}


@refuse_wrong_types(CONFIG)
def language_model_config(config: HuggingFaceConfig) -> LanguageModelConfig:
    """Read the values of a `config.json`; `CheckpointError` names a feature that is not implemented."""
    refuse_fields(CONFIG, config, NEUTRAL_ANYWHERE)
    return family_of(config).read(check_positive(CONFIG, config, NUMBERS))


def family_of(config: HuggingFaceConfig) -> Family:
    kind = config.get("model_type")
    if kind not in tuple(FAMILIES):
        raise CheckpointError(f"the language model's model_type {kind!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[str(kind)]


def convert_language_model(config: HuggingFaceConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the decoder's tensors to our names, relative to `language_model.`."""
    family, ours = family_of(config), language_model_config(config)
    head = family.names["head"]
    ignored = re.compile(family.ignored + (rf"|^{head}\." if ours.tied_head else ""))
    separate = partial(_separate, num_heads=ours.num_heads) if family.interleaved_qkv else None
    recipes = decoder_plan(ours, family.names, separate)
    return convert("the language model's checkpoint", recipes, family.full_names(tensors), ignored)


def decoder_plan(config: LanguageModelConfig, names: Names, rearrange_qkv: Rearrange | None) -> Plan:
    """Plan the decoder, whose names are relative to `language_model.`."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    with torch.device("meta"):
        shapes = shapes_of(LanguageModel(config).state_dict())
    rearrange = {} if rearrange_qkv is None else {QKV: rearrange_qkv}
    return plan(shapes, names, rows={QKV: (query, key, key)}, rearrange=rearrange)


def _separate(fused: Tensor, num_heads: int) -> Tensor:
    """Reorder rows [H * 3 * K, ...] of all heads to [3 * H * K, ...]: all queries, all keys, all values."""
    return fused.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
