"""The configuration of a model as frozen data: every family (OpenFlamingo, IDEFICS, the paper's) is a `FlamingoConfig`.

This module does not import torch, because the API process reads configurations too. Counts and sizes are checked once, in
`__post_init__`; a message has both numbers. An unknown key of a `config.json` is an error. `fingerprint` identifies the
weights of a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

FORMAT_VERSION = 1
PIECE_BYTES = 256
# no model has larger numbers: they come from a damaged file, and would take all memory or overflow in torch
MAX_SIZE = 2**24
MAX_LAYERS = 1000
# a whole number of more bits may be too large for a float
MAX_BITS = 1000
# a safetensors file begins with the length of its table of tensors
LENGTH_BYTES = 8

Norm = Literal["layer_norm", "rms_norm"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu", "silu"]
Position = Literal["rotary", "alibi", "learned"]
# where a query sees shots that attend alone: all after the prefix, or one after the other
AlonePositions = Literal["restart", "in_a_row"]
Resize = Literal["crop", "squash", "pad"]


class ConfigError(ValueError):
    """An invalid configuration; the message names the field and the values that conflict."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_sizes(part: str, config: Any) -> None:
    for entry in dataclasses.fields(config):
        value, limit = getattr(config, entry.name), MAX_LAYERS if entry.name == "num_layers" else MAX_SIZE
        if type(value) is int:
            _require(0 <= value <= limit, f"{part}.{entry.name} is {value}, must be in 0..{limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KinConfig:
    """The coordinates that `model/kin.py` appends to the features, and the sizes from which they are computed; 0: none."""

    dim: int = 0
    num_classes: int = 0
    num_ancestors: int = 0

    def __post_init__(self) -> None:
        _require_sizes("vision.kin", self)
        sizes = (self.dim, self.num_classes, self.num_ancestors)
        _require(all(sizes) or not any(sizes), f"vision.kin has sizes {sizes}, must be all positive or all zero")
        _require(
            self.dim <= self.num_ancestors,
            f"vision.kin.dim {self.dim} is more than vision.kin.num_ancestors {self.num_ancestors}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The frozen vision encoder: pixels [F, 3, h, w] -> features [F, P, Dv].

    `architecture` is a timm model, or `clip_vit` for CLIP's Vision Transformer with the sizes below.
    """

    architecture: str
    image_size: int
    feature_dim: int
    num_patches: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # crop: scale the shortest side, crop the centre (OpenFlamingo). squash: scale to the square, ignoring the aspect
    # (IDEFICS). pad: scale the longest side, pad with the mean colour (the paper).
    resize: Resize
    # CLIP Vision Transformers only
    patch_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    ffn_dim: int = 0
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    keep_class_token: bool = False
    kin: KinConfig = KinConfig()

    @property
    def width(self) -> int:
        """The width of a feature as the resampler reads it, with the coordinates of kin."""
        return self.feature_dim + self.kin.dim

    def __post_init__(self) -> None:
        _require_sizes("vision", self)
        _require(self.image_size > 0, f"vision.image_size is {self.image_size}, must be positive")
        _require(
            all(0 <= value <= 1 for value in self.mean),
            f"vision.mean is {list(self.mean)}, must be between 0 and 1, the values of black and white",
        )
        _require(
            all(0 < value < math.inf for value in self.std),
            f"vision.std is {list(self.std)}, must be positive and finite",
        )
        if self.architecture == "clip_vit":
            _require(self.patch_size > 0, f"vision.patch_size is {self.patch_size}, must be positive")
            _require(
                self.num_heads > 0 and self.feature_dim % self.num_heads == 0,
                f"vision.feature_dim {self.feature_dim} is not a multiple of vision.num_heads {self.num_heads}",
            )
            grid = self.image_size // self.patch_size
            expected = grid * grid + self.keep_class_token
            _require(
                self.num_patches == expected,
                f"vision.num_patches is {self.num_patches}, but the sizes give {expected}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResamplerConfig:
    """The Perceiver resampler: features [M, F, P, Dv] -> visual tokens [M, R, D] (paper, section 3.1)."""

    # the paper's ablations replace the Perceiver by a transformer with full attention over features and latents, or by an
    # MLP, without attention, on features that are averaged to num_latents
    kind: Literal["perceiver", "transformer", "mlp"] = "perceiver"
    dim: int
    num_layers: int
    num_latents: int = 64
    num_heads: int
    head_dim: int
    ffn_dim: int
    activation: Activation
    norm_eps: float = 1e-5
    qk_norm: bool = False
    # frames with an embedding of their own, which are interpolated linearly for longer videos; 0: none
    num_frames: int = 0
    # patches with a learned embedding of their position; 0: none
    num_spatial: int = 0
    # a linear map before the resampler, needed if its width differs from that of the features
    input_projection: bool = False
    input_norm: bool = False

    def __post_init__(self) -> None:
        _require_sizes("resampler", self)
        _require(self.num_latents > 0, f"resampler.num_latents is {self.num_latents}, must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedConfig:
    """GATED XATTN-DENSE (paper, figure 4), before language-model layers first, first + interval, ..."""

    first_layer: int
    interval: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    activation: Activation
    gated_ffn: bool = False
    norm: Norm = "layer_norm"
    norm_eps: float = 1e-5
    media_norm: bool = False
    qk_norm: bool = False
    # none: branches are added without a gate (an ablation)
    gate: Literal["scalar", "channel", "none"] = "scalar"
    attends: Literal["last", "all_previous"] = "last"
    # a token that reads no media skips the whole layer; in the paper it skips only the attention. A prompt without media is
    # then answered by the frozen language model alone
    needs_media: bool = False

    def __post_init__(self) -> None:
        _require_sizes("gated", self)
        _require(self.interval > 0, f"gated.interval is {self.interval}, must be positive")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the language-model layers that have a gated layer before them."""
        return tuple(range(self.first_layer, num_layers, self.interval))


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelConfig:
    """The frozen decoder; the rows of `num_new_tokens` (the media token and others) follow those of the vocabulary."""

    family: Literal["llama", "gpt_neox", "mpt", "opt", "chinchilla"]
    vocab_size: int
    num_new_tokens: int = 0
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    activation: Activation
    max_positions: int
    norm: Norm
    norm_eps: float
    norm_bias: bool = False
    gated_ffn: bool = False
    position: Position
    # a shot is computed right after the prefix in either case, so that its keys and values do not depend on its place
    alone_positions: AlonePositions = "restart"
    rotary_dim: int = 0
    rope_theta: float = 10000.0
    alibi_bias_max: int = 8
    # OPT's table of learned positions begins with two unused rows
    position_offset: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    # attention and feed-forward read the same input (GPT-NeoX's use_parallel_residual)
    parallel_residual: bool = False
    # LayerNorm over the full width of queries and keys, before the heads are split (MPT-1B)
    qk_norm: bool = False
    tied_head: bool = False
    # q4: the layers' weights have 16 values per group of 32 (GGUF's Q4_1), and may stay in 4 bits
    weights: Literal["float", "q4"] = "float"

    def __post_init__(self) -> None:
        _require_sizes("language_model", self)
        _require(
            self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
            f"language_model.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        _require(
            self.position != "rotary" or 0 < self.rotary_dim <= self.head_dim,
            f"language_model.rotary_dim is {self.rotary_dim}, must be in 1..{self.head_dim} (head_dim)",
        )
        _require(
            self.position != "learned" or self.alone_positions == "restart",
            f"language_model.alone_positions is {self.alone_positions!r}, must be 'restart' with learned positions: "
            "they are part of a shot's keys",
        )

    @property
    def has_key_offsets(self) -> bool:
        """True if a query sees keys of shots that attend alone at other positions than those they are rotated to."""
        return self.position == "rotary" and self.alone_positions == "in_a_row"

    @property
    def num_token_ids(self) -> int:
        return self.vocab_size + self.num_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """The markers with which a family writes a prompt; each is one token of the tokenizer."""

    media_token: str
    begin: str = ""
    media_open: str = ""
    media_close: str = ""
    # "": an end_of_chunk segment is refused
    end_of_chunk: str = ""
    # written between two consecutive text segments
    text_separator: str = ""
    strip_text: bool = False
    eos: tuple[str, ...] = ()
    # never sampled
    suppressed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FlamingoConfig:
    """A whole model; `name` is its name in `/v1/models`, `family` the lineage of its checkpoint."""

    name: str
    family: Literal["openflamingo", "idefics", "flamingo"]
    vision: VisionConfig
    resampler: ResamplerConfig
    gated: GatedConfig
    language_model: LanguageModelConfig
    prompt: PromptConfig
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        _require(
            self.format_version == FORMAT_VERSION,
            f"config.json has format_version {self.format_version}, this version reads {FORMAT_VERSION}",
        )
        _require(
            self.resampler.input_projection or self.resampler.dim == self.vision.width,
            f"resampler.dim {self.resampler.dim} differs from the width {self.vision.width} of the vision features "
            "and resampler.input_projection is false",
        )
        _require(
            self.resampler.num_spatial in (0, self.vision.num_patches),
            f"resampler.num_spatial {self.resampler.num_spatial} is neither 0 nor vision.num_patches "
            f"{self.vision.num_patches}",
        )
        _require(
            self.resampler.kind == "perceiver" or not self.resampler.qk_norm,
            f"resampler.qk_norm requires resampler.kind 'perceiver', but it is {self.resampler.kind!r}",
        )
        _require(bool(self.gated_layers), "gated.first_layer and gated.interval give no gated layer")

    @property
    def gated_layers(self) -> tuple[int, ...]:
        return self.gated.layers(self.language_model.num_layers)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def from_dict(kind: type, values: dict[str, Any], path: str = "config") -> Any:
    """Build one of the dataclasses above from JSON values; `ConfigError` names an unknown, missing or ill-typed key."""
    hints = get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(map(str, values.keys() - known.keys())):
        raise ConfigError(f"{path}: unknown key {', '.join(unknown)}")
    required = {n for n, f in known.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise ConfigError(f"{path}: missing key {', '.join(missing)}")
    return kind(**{name: _value(hints[name], value, f"{path}.{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        _require(isinstance(value, dict), f"{path}: expected an object, got {type(value).__name__}")
        return from_dict(hint, value, path)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        _require(value in get_args(hint), f"{path}: {value!r} is not one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        return _items(get_args(hint), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        _require(value.bit_length() <= MAX_BITS, f"{path}: expected float, got a number of too many digits")
        return float(value)
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    _require(fits, f"{path}: expected {hint.__name__}, got {value!r}")
    return value


def _items(hints: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    """Return the checked items of a list: as many as the hint has, or any number if it ends with an ellipsis."""
    _require(isinstance(value, (list, tuple)), f"{path}: expected a list, got {type(value).__name__}")
    if hints[-1] is not Ellipsis:
        _require(len(value) == len(hints), f"{path}: expected {len(hints)} values, got {len(value)}")
    return tuple(_value(hints[0], item, f"{path}[{i}]") for i, item in enumerate(value))


def load_config(folder: Path) -> FlamingoConfig:
    """Read the `config.json` of a model folder. Raises `ConfigError`."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} is not a model folder: it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    _require(isinstance(values, dict), f"{file} does not hold a JSON object")
    return from_dict(FlamingoConfig, values)


def fingerprint(folder: Path) -> str:
    """Return 32 hexadecimal digits that are equal for copies of a folder and change if any tensor was trained further.

    They are a digest of `config.json`, `tokenizer.json`, and the name, type, shape and a middle piece of every tensor, so
    large files are not read as a whole.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"flmbynce-weights")
    for name in ("config.json", "tokenizer.json"):
        digest.update(hashlib.blake2b((folder / name).read_bytes()).digest())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(_pieces(file))
    return digest.hexdigest()


def _pieces(file: Path) -> bytes:
    """Return a digest of the table of a safetensors file and of a piece of each tensor. Raises `ConfigError`."""
    digest = hashlib.blake2b()
    with file.open("rb") as weights:
        num_bytes = int.from_bytes(weights.read(LENGTH_BYTES), "little")
        table = weights.read(min(num_bytes, file.stat().st_size))
        digest.update(table)
        for start, end in _offsets(file, table):
            length = min(end - start, PIECE_BYTES)
            weights.seek(LENGTH_BYTES + num_bytes + start + (end - start - length) // 2)
            digest.update(weights.read(length))
    return digest.digest()


def _offsets(file: Path, table: bytes) -> list[tuple[int, int]]:
    """Return where each tensor begins and ends, in the order of their names. Raises `ConfigError`."""
    try:
        tensors = sorted(json.loads(table).items())
        offsets = [tuple(tensor["data_offsets"]) for name, tensor in tensors if name != "__metadata__"]
        if not all(0 <= start <= end <= file.stat().st_size for start, end in offsets):
            raise ValueError("a tensor ends before it begins, or after the file")
        return [(int(start), int(end)) for start, end in offsets]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors: {type(error).__name__}: {error}") from None
