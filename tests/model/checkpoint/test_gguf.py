"""GGUF files against other implementations: transformers on a tiny file, llama.cpp on the default model's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.batch import whole_sequences
from model.checkpoint.gguf import GGUFFile
from model.config import LanguageModelConfig
from model.folder import CheckpointError
from model.language_model import LanguageModel
from model.zoo.default import expert_files

F32, F16, Q4_1, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "F16", "Q4_1", "Q8_0"))
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_end|>", *ALPHABET, "he", "Ġthe", "Ġt"]
TYPES = [3, 3, *[1] * (len(TOKENS) - 2)]
MERGES = ["h e", "Ġ t", "Ġt he"]
HEADS, KV_HEADS = 4, 2


def tiny_llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Reorder Hugging Face's halves to llama.cpp's pairs: row j + s * K / 2 of a head becomes row 2 j + s."""
    head_dim = weight.shape[0] // num_heads
    rows = [
        head * head_dim + row % 2 * (head_dim // 2) + row // 2 for head in range(num_heads) for row in range(head_dim)
    ]
    return weight[rows]


NAMES = {
    "input_layernorm": ("attn_norm", F32),
    "self_attn.q_proj": ("attn_q", Q4_1),
    "self_attn.k_proj": ("attn_k", Q4_1),
    "self_attn.v_proj": ("attn_v", Q8_0),
    "self_attn.o_proj": ("attn_output", F16),
    "post_attention_layernorm": ("ffn_norm", F32),
    "mlp.gate_proj": ("ffn_gate", Q4_1),
    "mlp.up_proj": ("ffn_up", Q4_1),
    "mlp.down_proj": ("ffn_down", F16),
    "embed_tokens": ("token_embd", Q8_0),
    "norm": ("output_norm", F32),
    "lm_head": ("output", F16),
}


def gguf_name(name: str) -> tuple[str, GGMLQuantizationType]:
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    layer = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    ours, kind = NAMES[".".join(parts[2:] if layer else parts)]
    return f"{layer}{ours}.weight", kind


def write(path: Path, llama: LlamaForCausalLM, *, drop: str = "", **metadata: str) -> LlamaForCausalLM:
    """Write the model as GGUF, and set its weights to the rounded ones of the file."""
    writer, tied = GGUFWriter(path, metadata.get("architecture", "llama")), llama.config.tie_word_embeddings
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(TOKENS.index("<|endoftext|>"))
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_add_bos_token(metadata.get("add_bos") == "yes")
    if "license" in metadata:
        writer.add_license(metadata["license"])
    rounded: dict[str, Tensor] = {}
    for theirs, tensor in llama.state_dict().items():
        name, kind = gguf_name(theirs)
        if name == drop or (tied and theirs == "lm_head.weight"):
            continue
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2], 0)
        stored = quantize(tensor.numpy(), kind)
        rounded[theirs] = torch.from_numpy(np.array(dequantize(stored, kind)))
        writer.add_tensor(name, interleaved(stored, heads) if heads else stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if tied:
        rounded["lm_head.weight"] = rounded["model.embed_tokens.weight"]
    llama.load_state_dict(rounded, strict=not drop)
    return llama


@torch.inference_mode()
def log_probs(config: LanguageModelConfig, tensors: dict[str, Tensor], token_ids: list[int]) -> Tensor:
    with torch.device("meta"):
        model = LanguageModel(config)
    model.load_state_dict(tensors, assign=True)
    batch = whole_sequences([token_ids], [[-1] * len(token_ids)])
    x = model.embed_tokens(batch)
    for layer in model.layers:
        x = layer(x, model.step_context(batch, x.dtype), None)
    return model.logits(x).log_softmax(-1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_file_gives_the_log_probabilities_of_transformers(tied: bool, tmp_path: Path) -> None:
    llama = write(tmp_path / "tiny.gguf", tiny_llama(tied=tied))
    source = GGUFFile(tmp_path / "tiny.gguf")
    token_ids = torch.randint(len(TOKENS), (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        theirs = llama(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    ours = log_probs(source.config(), source.tensors(), token_ids)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_float32_metadata_reads_as_the_original_decimal(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    config = GGUFFile(tmp_path / "tiny.gguf").config(num_new_tokens=2)
    assert (config.norm_eps, config.rope_theta, config.num_token_ids) == (1e-5, 5000.0, len(TOKENS) + 2)


def test_the_tokenizer_knows_merges_digits_and_markers(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    tokenizer = GGUFFile(tmp_path / "tiny.gguf").tokenizer(["<image>", "<eoc>"])
    encoded = tokenizer.encode("<image>h the 42<eoc><|im_end|>")
    assert encoded.tokens == ["<image>", "h", "Ġthe", "Ġ", "4", "2", "<eoc>", "<|im_end|>"]
    assert [encoded.ids[0], encoded.ids[-2], encoded.ids[-1]] == [len(TOKENS), len(TOKENS) + 1, 1]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "h the 42"


def test_a_new_token_that_exists_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    with pytest.raises(CheckpointError, match="261 tokens and 1 new ones give 261 ids"):
        GGUFFile(tmp_path / "tiny.gguf").tokenizer(["<|im_end|>"])


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tiny_llama(tied=True), architecture="mamba")
    with pytest.raises(CheckpointError, match="'mamba', only 'llama'"):
        GGUFFile(tmp_path / "tiny.gguf").config()


def test_another_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tiny_llama(tied=True), pre="llama-bpe")
    with pytest.raises(CheckpointError, match="'llama-bpe', only 'gpt2' with 'smollm'"):
        GGUFFile(tmp_path / "tiny.gguf").tokenizer()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tiny_llama(tied=True), drop="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"missing \(1\): blk\.1\.ffn_up\.weight"):
        GGUFFile(tmp_path / "tiny.gguf").tensors()


def test_a_file_that_is_not_gguf_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"not a GGUF file at all, but long enough to be looked at")
    with pytest.raises(CheckpointError, match=r"no\.gguf cannot be read as GGUF"):
        GGUFFile(tmp_path / "no.gguf")


def test_a_file_that_was_cut_is_refused_with_its_path(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    data = (tmp_path / "tiny.gguf").read_bytes()
    for length in (*range(24, 400, 7), len(data) - 1):
        (tmp_path / "tiny.gguf").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
            GGUFFile(tmp_path / "tiny.gguf")


def test_metadata_that_cannot_be_used_are_refused_with_the_path(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    data = bytearray((tmp_path / "tiny.gguf").read_bytes())
    heads = b"llama.attention.head_count\x04\0\0\0"  # a number of four bytes follows
    position = data.index(heads) + len(heads)
    data[position : position + 4] = bytes(4)
    merge = data.index(MERGES[0].encode())
    data[merge : merge + 1] = b"Q"
    (tmp_path / "tiny.gguf").write_bytes(data)
    file = GGUFFile(tmp_path / "tiny.gguf")
    for read in (file.config, file.tensors, file.tokenizer):
        with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be read as GGUF"):
            read()


@pytest.fixture(scope="module")
def smollm() -> GGUFFile:
    return GGUFFile(expert_files().language_model)


# ids from llama.cpp's own tokenizer, the vocabulary's home
LLAMA_CPP_IDS = {
    "A photo of a dog.": [49, 8003, 282, 253, 2767, 30],
    "It's 1234 o'clock,  we'll\n\n\tgo": [
        *[1589, 506, 216, 33, 34, 35, 36, 263, 23, 17466, 28, 216, 392, 3060, 1116, 197, 2345],
    ],
    "naïve Σίσυφος 日本語 🐱": [
        *[3546, 46494, 5664, 113, 22442, 18751, 20574, 35461, 39346, 17097, 241, 115, 40993, 179, 120, 248],
        *[15107, 234, 126],
    ],
    "½ x² ٣٤ Ⅷ": [16738, 1792, 19133, 216, 164, 113, 164, 114, 216, 173, 223, 117],
    "def f(x):\n    return x_1+3.14": [1604, 275, 24, 104, 727, 472, 1003, 1792, 79, 33, 27, 35, 30, 33, 36],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
}


def test_smollm_tokenizes_as_llama_cpp_does(smollm: GGUFFile) -> None:
    tokenizer = smollm.tokenizer()
    assert {text: tokenizer.encode(text).ids for text in LLAMA_CPP_IDS} == LLAMA_CPP_IDS
    for text, ids in LLAMA_CPP_IDS.items():
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_smollm_agrees_with_llama_cpp(smollm: GGUFFile) -> None:
    # "The capital of France is" -> " Paris", " the", " located"; llama.cpp rounds activations to 8 bits
    logprobs = log_probs(smollm.config(), smollm.tensors(), [504, 3575, 282, 4649, 314])[-1]
    best = logprobs.topk(3)
    assert best.indices.tolist() == [7042, 260, 4528]
    torch.testing.assert_close(best.values, torch.tensor([-0.2589, -2.7646, -4.2949]), atol=0.1, rtol=0)
