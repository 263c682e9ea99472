"""A contrastive run is frozen data, read once from YAML: two towers, the sets of pairs and the optimizer.

The defaults are the paper's (its appendix on the vision encoder); an unknown key raises a `ConfigError` that names its
path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.config import ConfigError, Resize, from_dict
from training.config import (
    OptimConfig,
    Precision,
    check_betas,
    check_homes,
    check_image_size,
    check_minima,
    check_not_empty,
    read_mapping,
)

# the least values of fields
TEXT_MINIMA = {"dim": 1, "num_layers": 1, "num_heads": 1, "ffn_dim": 1, "max_tokens": 1}
PAIRS_MINIMA = {"weight": 0, "batch_size": 2, "window": 1}
OPTIM_MINIMA = {"learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "image_clip": 0, "text_clip": 0}
RUN_MINIMA = {"steps": 0, "joint_dim": 1, "checkpoint_steps": 1, "log_steps": 1, "seed": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """The image tower, whose encoder is exported.

    `architecture` is a convolutional network of timm: nfnet_f0 to nfnet_f6, dm_nfnet_f6, ...
    """

    architecture: str
    image_size: int = 288
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Resize = "pad"
    # mirror half of the images, and change brightness and contrast
    augment: bool = True

    def __post_init__(self) -> None:
        check_minima("image.", self, {"image_size": 1})
        check_image_size("image.image_size", self.image_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The text tower, a BERT-like transformer.

    `tokenizer` is the path of a tokenizer.json; texts longer than `max_tokens` are truncated.
    """

    tokenizer: str
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    max_tokens: int = 64

    def __post_init__(self) -> None:
        check_minima("text.", self, TEXT_MINIMA)
        check_homes("text.", self, ["tokenizer"])
        if self.dim % self.num_heads:
            raise ConfigError(f"text.dim {self.dim} is not a multiple of text.num_heads {self.num_heads}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsConfig:
    """A set of pairs, in shards of KEY.jpg and KEY.txt.

    Every step takes a batch of each set and contrasts the pairs within that batch.
    """

    name: str
    shards: str
    weight: float = 1.0
    batch_size: int = 256
    window: int = 4096

    def __post_init__(self) -> None:
        check_minima(f"set {self.name}: ", self, PAIRS_MINIMA)
        check_homes(f"set {self.name}: ", self, ["shards"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveOptimConfig:
    """The optimizer and its gradient clipping; the learning rate falls linearly to zero."""

    optimizer: Literal["adam", "lamb"] = "adam"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    # image tower: the maximum norm of each filter's gradient, as a share of the filter's norm (adaptive gradient
    # clipping); 0: off
    image_clip: float = 0.01
    # text tower: the maximum norm of all gradients together; 0: off
    text_clip: float = 10.0

    def __post_init__(self) -> None:
        check_minima("optim.", self, OPTIM_MINIMA)
        check_betas(self.betas)

    @property
    def schedule(self) -> OptimConfig:
        return OptimConfig(learning_rate=self.learning_rate, warmup_steps=self.warmup_steps, decay="linear", end=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveConfig:
    out: str
    steps: int
    image: ImageConfig
    text: TextConfig
    sets: tuple[PairsConfig, ...]
    optim: ContrastiveOptimConfig = ContrastiveOptimConfig()
    joint_dim: int = 1376
    # the initial value of the learned temperature
    temperature: float = 0.07
    label_smoothing: float = 0.1
    # shards whose recall is printed at the end; "": none
    held_out: str = ""
    # a resumed run with auto keeps the precision of its checkpoint (training/precision.py)
    precision: Precision = "auto"
    seed: int = 0
    checkpoint_steps: int = 1000
    log_steps: int = 10

    def __post_init__(self) -> None:
        check_minima("", self, RUN_MINIMA)
        check_not_empty("", self, ["out"])
        check_homes("", self, ["out", "held_out"])
        if not self.sets:
            raise ConfigError("sets is empty, must list at least one set")
        names = [data_set.name for data_set in self.sets]
        if len(set(names)) != len(names):
            raise ConfigError(f"sets must have different names: {', '.join(names)}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature}, must be positive")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}, must be at least 0 and less than 1")


def read_config(file: Path) -> ContrastiveConfig:
    return parse_config(read_mapping(file))


def parse_config(values: dict[str, Any]) -> ContrastiveConfig:
    config: ContrastiveConfig = from_dict(ContrastiveConfig, values)
    return config
