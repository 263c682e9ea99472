"""A contrastive run as frozen data, read once from YAML: two towers, the sets of pairs, and how they step.

The defaults are the paper's (its appendix on the vision encoder); an unknown key is refused by its path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.config import ConfigError, Resize, from_dict
from training.config import OptimConfig, read_mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """The tower that is kept. `architecture` is a convolutional network of timm: nfnet_f0 to nfnet_f6, dm_nfnet_f6, ..."""

    architecture: str
    image_size: int = 288
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Resize = "pad"
    # a mirror image half of the time, other brightness and contrast
    augment: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """BERT-like. `tokenizer` is a tokenizer.json; longer texts are cut."""

    tokenizer: str
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"text.dim {self.dim} is not a multiple of text.num_heads {self.num_heads}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsConfig:
    """A set of pairs: shards of KEY.jpg and KEY.txt. Every step takes a batch of each set, contrasted within itself."""

    name: str
    shards: str
    weight: float = 1.0
    batch_size: int = 256
    window: int = 4096

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ConfigError(f"set {self.name}: batch_size is {self.batch_size}, a contrast needs 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedConfig:
    """The optimizer and its limits. The learning rate falls in a line to zero."""

    optimizer: Literal["adam", "lamb"] = "adam"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    # each filter's gradient to this share of its norm (adaptive gradient clipping), image tower; 0: off
    image_clip: float = 0.01
    # the norm of all gradients of the text tower; 0: off
    text_clip: float = 10.0

    @property
    def course(self) -> OptimConfig:
        return OptimConfig(learning_rate=self.learning_rate, warmup_steps=self.warmup_steps, decay="linear", end=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveConfig:
    out: str
    steps: int
    image: ImageConfig
    text: TextConfig
    sets: tuple[PairsConfig, ...]
    optim: SpeedConfig = SpeedConfig()
    joint_dim: int = 1376
    # where the learned temperature starts
    temperature: float = 0.07
    label_smoothing: float = 0.1
    # shards whose recall is printed at the end; "": none
    held_out: str = ""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0
    checkpoint_steps: int = 1000
    log_steps: int = 10

    def __post_init__(self) -> None:
        names = [one.name for one in self.sets]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"sets must be some, each of its own name: {', '.join(names) or 'none'}")
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}, must be positive")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}, must lie in [0, 1)")


def read_config(file: Path) -> ContrastiveConfig:
    return parse_config(read_mapping(file))


def parse_config(values: dict[str, Any]) -> ContrastiveConfig:
    listed = values.get("sets", ())
    sets = tuple(from_dict(PairsConfig, entry, f"config.sets[{i}]") for i, entry in enumerate(listed))
    config: ContrastiveConfig = from_dict(ContrastiveConfig, {**values, "sets": sets})
    return config
