"""Import a decoder from GGUF: sizes from the file's metadata, dequantised weights, and its vocabulary as a tokenizer.

The architecture is Llama with a byte-level BPE. llama.cpp orders the rows of queries and keys for its interleaved rotary
positions (adjacent pairs); ours rotate one half against the other, as in Hugging Face, so these rows are reordered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from model.checkpoint.files import FolderTokenizer, Names, convert
from model.checkpoint.language_models import decoder_plan
from model.config import ConfigError, LanguageModelConfig
from model.folder import CheckpointError

# iterates over a sequence, and may show the progress
Track: TypeAlias = Callable[[Sequence[Any]], Iterable[Any]]

NAMES: Names = {
    "embed": "token_embd",
    "layers.{i}.attention_norm": "blk.{i}.attn_norm",
    "layers.{i}.attention.qkv": ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"),
    "layers.{i}.attention.output": "blk.{i}.attn_output",
    "layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "layers.{i}.feed_forward.up": ("blk.{i}.ffn_gate", "blk.{i}.ffn_up"),
    "layers.{i}.feed_forward.down": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}

# gguf's token types that are markers, and whether they are special (left out of decoded text)
CONTROL, USER_DEFINED = 3, 4
MARKERS = {CONTROL: True, USER_DEFINED: False}

# pre-tokenizers by llama.cpp's name of the scheme
PRE_TOKENIZERS = {"smollm": (pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False))}


class GGUFFile:
    """An open GGUF file, with its configuration, tensors and tokenizer in this repository's terms."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _read_errors(path):
            self._reader = GGUFReader(path)
        self._names = {tensor.name for tensor in self._reader.tensors}

    def config(self, num_new_tokens: int = 0) -> LanguageModelConfig:
        """Return the decoder's configuration. Raises `CheckpointError` and `ConfigError`."""
        with _read_errors(self.path):
            return self._config(num_new_tokens)

    def _config(self, num_new_tokens: int) -> LanguageModelConfig:
        if (architecture := self._value("general.architecture")) != "llama":
            raise CheckpointError(f"{self.path}: the architecture is {architecture!r}, only 'llama' is supported")
        if (scaling := self._value("llama.rope.scaling.type", "none")) != "none" or "rope_freqs.weight" in self._names:
            raise CheckpointError(f"{self.path}: rotary scaling {scaling!r} is not supported")
        dim, num_heads = self._value("llama.embedding_length"), self._value("llama.attention.head_count")
        head_dim = self._value("llama.attention.key_length", dim // num_heads)
        return LanguageModelConfig(
            family="llama",
            vocab_size=len(self._value("tokenizer.ggml.tokens")),
            num_new_tokens=num_new_tokens,
            dim=dim,
            num_layers=self._value("llama.block_count"),
            num_heads=num_heads,
            num_kv_heads=self._value("llama.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            ffn_dim=self._value("llama.feed_forward_length"),
            activation="silu",
            max_positions=self._value("llama.context_length"),
            norm="rms_norm",
            norm_eps=_written(self._value("llama.attention.layer_norm_rms_epsilon")),
            gated_ffn=True,
            position="rotary",
            rotary_dim=self._value("llama.rope.dimension_count", head_dim),
            rope_theta=_written(self._value("llama.rope.freq_base", 10000.0)),
            tied_head="output.weight" not in self._names,
            weights="q4" if self._layers_are_q4() else "float",
        )

    def _layers_are_q4(self) -> bool:
        matrices = [t for t in self._reader.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
        return all(t.tensor_type == GGMLQuantizationType.Q4_1 for t in matrices)

    def tensors(self, track: Track = iter) -> dict[str, Tensor]:
        """Return the decoder's tensors in float32, with names relative to `language_model.`. Raises `CheckpointError`.

        `track` iterates over the tensors of the file as they are read, and may show the progress.
        """
        config = self.config()
        rows = (config.num_heads + config.num_kv_heads) * config.head_dim
        halves = partial(to_half_split, head_dim=config.head_dim, num_rows=rows)
        return convert(str(self.path), decoder_plan(config, NAMES, halves), self._dequantised(track))

    @property
    def license(self) -> str:
        """The licence that the file states, or ""."""
        with _read_errors(self.path):
            return str(self._value("general.license", ""))

    def folder_tokenizer(self) -> FolderTokenizer:
        """Return the file's vocabulary and the tokens that begin, end and pad a text. Raises `CheckpointError`."""
        with _read_errors(self.path):
            bos = self._token("bos")
            return FolderTokenizer(
                tokenizer=self._tokenizer(()),
                bos=bos,
                eos=self._token("eos"),
                unk=self._token("unknown"),
                pad=self._token("padding"),
                begin=bos if self._value("tokenizer.ggml.add_bos_token", False) else "",
            )

    def _token(self, kind: str) -> str:
        token_id = self._value(f"tokenizer.ggml.{kind}_token_id", -1)
        return "" if token_id == -1 else str(self._value("tokenizer.ggml.tokens")[token_id])

    def tokenizer(self, new_tokens: Sequence[str] = ()) -> Tokenizer:
        """Return the file's vocabulary, followed by `new_tokens` as special tokens. Raises `CheckpointError`."""
        with _read_errors(self.path):
            return self._tokenizer(new_tokens)

    def _tokenizer(self, new_tokens: Sequence[str]) -> Tokenizer:
        tokens, merges = self._value("tokenizer.ggml.tokens"), self._value("tokenizer.ggml.merges", [])
        kind, scheme = self._value("tokenizer.ggml.model"), self._value("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or scheme not in PRE_TOKENIZERS:
            raise CheckpointError(
                f"{self.path}: the tokenizer is {kind!r} with pre-tokenizer {scheme!r}, "
                f"only 'gpt2' with {', '.join(map(repr, PRE_TOKENIZERS))} is supported"
            )
        vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair.split(" ")) for pair in merges]))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[scheme]))
        tokenizer.decoder = decoders.ByteLevel()
        types = self._value("tokenizer.ggml.token_type", [])
        markers = [_marker(token, MARKERS[kind]) for token, kind in zip(tokens, types, strict=False) if kind in MARKERS]
        tokenizer.add_tokens([*markers, *(_marker(token, True) for token in new_tokens)])
        if (size := tokenizer.get_vocab_size()) != len(tokens) + len(new_tokens):
            raise CheckpointError(f"{self.path}: {len(tokens)} tokens and {len(new_tokens)} new ones give {size} ids")
        return tokenizer

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is None:
            raise CheckpointError(f"{self.path}: the metadata has no {key}")
        return default

    def _dequantised(self, track: Track) -> dict[str, Tensor]:
        with _read_errors(self.path):
            return {
                tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
                for tensor in track(self._reader.tensors)
            }


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Report what the libraries raise for a damaged file as a `CheckpointError` that names it."""
    try:
        yield
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # the file's numbers and names are not checked, and tokenizers documents no error type
        raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error


def to_half_split(weight: Tensor, *, head_dim: int, num_rows: int) -> Tensor:
    """Reorder the first `num_rows` rows from pairs to halves: a head's rows 0, 1, 2, 3, ... become 0, 2, ..., 1, 3, ..."""
    pairs = weight[:num_rows].view(-1, head_dim // 2, 2, weight.shape[1])  # [H, K / 2, 2, D]
    return torch.cat([pairs.transpose(1, 2).flatten(0, 2), weight[num_rows:]])


def _marker(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _written(value: float) -> float:
    """Return the original decimal: GGUF stores float32, so that 1e-5 reads back as 9.999999747378752e-06."""
    return float(str(np.float32(value)))
