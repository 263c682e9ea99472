"""Each family against transformers, on tiny random models: the same log-probabilities and the same greedy tokens.

MPT-1B's norm of queries and keys is in no transformers release: the oracle is MPT with that norm put behind `Wqkv`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from model.batch import whole_sequences
from model.checkpoint.language_models import convert_language_model, language_model_config
from model.config import ConfigError
from model.folder import CheckpointError
from model.language_model import LanguageModel

VOCABULARY = 61
PROMPT = [3, 17, 42, 8, 8, 60, 1, 29, 5, 33, 12, 50]
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=80, **changes))


def gpt_neox(**changes: Any) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(SIZES | {"hidden_size": 64, "intermediate_size": 80} | changes)))


def mpt(heads: int) -> MptForCausalLM:
    return MptForCausalLM(MptConfig(vocab_size=VOCABULARY, d_model=48, n_layers=3, n_heads=heads, max_seq_len=64))


def opt(**changes: Any) -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=80, max_position_embeddings=64, **changes))


ORACLES = {
    "llama": lambda: llama(),
    "llama-grouped-heads": lambda: llama(num_key_value_heads=2),
    "llama-wide-heads": lambda: llama(head_dim=20),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "llama-theta": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "gpt_neox": lambda: gpt_neox(),
    "gpt_neox-full-rotary": lambda: gpt_neox(rotary_pct=1.0),
    "gpt_neox-sequential": lambda: gpt_neox(use_parallel_residual=False, rotary_pct=1.0),
    "gpt_neox-sequential-quarter": lambda: gpt_neox(use_parallel_residual=False, hidden_act="gelu_new"),
    "gpt_neox-tied-no-bias": lambda: gpt_neox(tie_word_embeddings=True, attention_bias=False),
    "mpt": lambda: mpt(4),
    "mpt-heads-no-power-of-two": lambda: mpt(6),
    "opt": lambda: opt(),
    "opt-untied-no-bias": lambda: opt(tie_word_embeddings=False, enable_bias=False),
}


@torch.no_grad()
def randomise(module: Any) -> Any:
    """Set weights so large that a wrong, swapped or missing part changes the logits."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(0.2 * noise + (name.endswith("weight")))
    return module.eval()


@torch.no_grad()
def log_probs(model: LanguageModel, token_ids: list[int]) -> Tensor:
    batch = whole_sequences([token_ids], [[-1] * len(token_ids)])
    x = model.embed_tokens(batch)
    context = model.step_context(batch, x.dtype)
    for layer in model.layers:
        x = layer(x, context, None)
    return model.logits(x).log_softmax(-1)


def ours(config: dict[str, Any], tensors: dict[str, Tensor]) -> LanguageModel:
    with torch.device("meta"):
        model = LanguageModel(language_model_config(config))
    model.load_state_dict(convert_language_model(config, tensors), assign=True)
    return model.eval()


@torch.no_grad()
def check(model: LanguageModel, oracle: Any) -> None:
    expected = oracle(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    torch.testing.assert_close(log_probs(model, PROMPT), expected, atol=1e-4, rtol=0)
    theirs, tokens = list(PROMPT), list(PROMPT)
    for _ in range(8):
        theirs.append(int(oracle(torch.tensor([theirs])).logits[0, -1].argmax()))
        tokens.append(int(log_probs(model, tokens)[-1].argmax()))
    assert tokens == theirs


@pytest.mark.parametrize("name", ORACLES)
def test_gives_the_log_probabilities_of_transformers(name: str) -> None:
    oracle = randomise(ORACLES[name]())
    check(ours(oracle.config.to_dict(), oracle.state_dict()), oracle)


class NormedQKV(nn.Module):
    """Norms of queries and keys over the full width, before heads are split."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        self.fused = fused
        self.q_ln = nn.LayerNorm(fused.in_features, bias=False)
        self.k_ln = nn.LayerNorm(fused.in_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.fused(x).chunk(3, dim=-1)
        return torch.cat([self.q_ln(query), self.k_ln(key), value], dim=-1)


def normed_mpt() -> Any:
    oracle: Any = mpt(6)
    for block in oracle.transformer.blocks:
        block.attn.Wqkv = NormedQKV(block.attn.Wqkv)
    return randomise(oracle)


def written(oracle: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """The oracle's tensors under a checkpoint's names."""
    tensors = {}
    for name, tensor in oracle.state_dict().items():
        for theirs, name_in_file in names.items():
            name = name.replace(theirs, name_in_file)
        tensors[name] = tensor
    return tensors


MPT_NAMES = {"Wqkv.fused.": "Wqkv.", "Wqkv.q_ln": "q_ln", "Wqkv.k_ln": "k_ln"}
MOSAIC_NAMES = MPT_NAMES | {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "norm_f": "ln_f",
    "ffn.up_proj": "mlp.mlp_up",
    "ffn.down_proj": "mlp.mlp_down",
}
MOSAIC_CONFIG = {
    "model_type": "mosaic_gpt",
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "n_layers": 3,
    "n_heads": 6,
    "mlp_ratio": 4,
    "max_seq_len": 64,
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_qk_ln": True,
    "attn_clip_qkv": None,
    "no_bias": True,
}


def test_mpt_norms_queries_and_keys() -> None:
    oracle = normed_mpt()
    config = oracle.config.to_dict()
    config["attn_config"]["qk_ln"] = True
    check(ours(config, written(oracle, MPT_NAMES)), oracle)


def test_mosaic_gpt_under_its_own_names_and_settings() -> None:
    oracle = normed_mpt()
    tensors = written(oracle, MOSAIC_NAMES)
    del tensors["lm_head.weight"]  # MPT-1B has no head of its own
    check(ours(MOSAIC_CONFIG, tensors), oracle)


def test_fields_of_older_transformers_are_read() -> None:
    rotary: dict[str, Any] = {"rotary_pct": 1.0, "rotary_emb_base": 500}
    new = GPTNeoXConfig(**SIZES, **rotary).to_dict()
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | rotary
    assert language_model_config(new).rotary_dim == 12
    assert language_model_config(new).rope_theta == 500.0
    assert language_model_config(old) == language_model_config(new)

    new = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0}).to_dict()
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | {"rope_theta": 500.0, "rope_scaling": None}
    assert language_model_config(new).rope_theta == 500.0
    assert language_model_config(old) == language_model_config(new)


def test_gpt_neox_head_by_either_name() -> None:
    oracle = randomise(gpt_neox())
    tensors = oracle.state_dict()
    renamed = {name.replace("lm_head", "embed_out"): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    config = oracle.config.to_dict()
    new, old = convert_language_model(config, tensors), convert_language_model(config, renamed)
    assert torch.equal(new["head.weight"], old["head.weight"])


def test_a_file_of_the_bare_decoder_and_its_buffers() -> None:
    config = LlamaConfig(**SIZES, intermediate_size=80, tie_word_embeddings=True)
    tensors = dict(LlamaModel(config).state_dict())
    whole = convert_language_model(config.to_dict(), {f"model.{name}": tensor for name, tensor in tensors.items()})
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    bare = convert_language_model(config.to_dict(), tensors)
    assert whole.keys() == bare.keys()
    assert all(torch.equal(whole[name], bare[name]) for name in whole)


LLAMA_CONFIG = LlamaConfig(**SIZES).to_dict()
NEOX_CONFIG = GPTNeoXConfig(**SIZES).to_dict()
MPT_CONFIG = MptConfig(vocab_size=VOCABULARY).to_dict()
OPT_CONFIG = OPTConfig(**SIZES).to_dict()


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (LLAMA_CONFIG, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_parameters.rope_type"),
        (LLAMA_CONFIG, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type = 'linear'"),
        (LLAMA_CONFIG, {"sliding_window": 128}, "sliding_window = 128"),
        (LLAMA_CONFIG, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA_CONFIG, {"hidden_act": "mish"}, "'mish'"),
        (LLAMA_CONFIG, {"model_type": "bloom"}, "'bloom'"),
        (LLAMA_CONFIG, {"model_type": ["llama"]}, "['llama']"),
        (LLAMA_CONFIG, {"hidden_act": {}}, "activation {}"),
        (LLAMA_CONFIG, {"rope_parameters": 5}, "a setting has a wrong type or value"),
        (MPT_CONFIG, {"attn_config": "alibi"}, "a setting has a wrong type or value"),
        (LLAMA_CONFIG, {"hidden_size": "64"}, "hidden_size = '64'"),
        (LLAMA_CONFIG, {"hidden_size": None}, "it has no hidden_size"),
        (LLAMA_CONFIG, {"num_attention_heads": 0}, "num_attention_heads = 0"),
        (LLAMA_CONFIG, {"rope_parameters": {"rope_theta": "many"}}, "rope_parameters.rope_theta = 'many'"),
        (MPT_CONFIG, {"n_heads": 0}, "n_heads = 0"),
        (NEOX_CONFIG, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type"),
        (MPT_CONFIG, {"attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv = 6.0"),
        (MPT_CONFIG, {"attn_config": {"softmax_scale": 0.5}}, "attn_config.softmax_scale"),
        (MPT_CONFIG, {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config.attn_type"),
        (MPT_CONFIG, {"attn_config": {"alibi": False}}, "attn_config.alibi"),
        (MPT_CONFIG, {"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm"),
        (MPT_CONFIG, {"logit_scale": 0.1}, "logit_scale"),
        (MPT_CONFIG, {"no_bias": False}, "no_bias"),
        (MOSAIC_CONFIG, {"attn_clip_qkv": 6.0}, "attn_clip_qkv"),
        (MOSAIC_CONFIG, {"alibi": False}, "alibi"),
        (OPT_CONFIG, {"word_embed_proj_dim": 24}, "word_embed_proj_dim = 24"),
        (OPT_CONFIG, {"do_layer_norm_before": False}, "do_layer_norm_before"),
        (OPT_CONFIG, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_features_are_refused_by_name(config: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    language_model_config(config)
    with pytest.raises(CheckpointError) as caught:
        language_model_config(config | changes)
    assert named in str(caught.value)


def test_a_field_that_is_missing_is_named() -> None:
    config = {name: value for name, value in LLAMA_CONFIG.items() if name != "hidden_size"}
    with pytest.raises(CheckpointError, match="has no hidden_size"):
        language_model_config(config)


def test_a_null_is_a_default() -> None:
    nulls = {"rope_theta": None, "rms_norm_eps": None, "rope_parameters": {"rope_theta": None}}
    config = language_model_config(LLAMA_CONFIG | nulls)
    assert (config.rope_theta, config.norm_eps) == (10000.0, 1e-6)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        language_model_config(LLAMA_CONFIG | {"num_key_value_heads": 3})


def test_one_error_lists_all_that_does_not_fit() -> None:
    oracle = llama()
    tensors = dict(oracle.state_dict())
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(24, 48)
    with pytest.raises(CheckpointError) as caught:
        convert_language_model(oracle.config.to_dict(), tensors)
    message = str(caught.value)
    assert "missing (1): model.norm.weight" in message
    assert "unexpected (1): model.layers.0.mlp.extra.weight" in message
    assert "model.layers.1.self_attn.k_proj.weight: found [24, 48], expected [48, 48]" in message
