"""A training run as frozen data, read once from YAML: the model, the sets that it learns from, and how it steps.

An unknown key raises by its path; the run's folder keeps a copy of what was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from model.config import ConfigError, from_dict

# episodes and alignment are the default model's own, sequences and captions the ablations': made from the folder of
# `python -m training.default_data`; turned are episodes in made-up domains
SetKind = Literal["pairs", "documents", "videos", "episodes", "turned", "alignment", "sequences", "captions"]
MADE_SETS = ("episodes", "turned", "alignment", "sequences", "captions")
# what a run may train; a new token's rows belong to the bridge
PARTS = ("bridge", "vision", "language_model")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetConfig:
    """One data set of the mixture. `weight` is the paper's lambda; `batch_size` counts examples of a step, all
    processes together."""

    name: str
    kind: SetKind
    shards: str  # a glob of tar files; the data folder of a made set
    weight: float = 1.0
    batch_size: int = 8
    max_tokens: int = 256
    max_media: int = 5
    # reading order is cut into so many streams, each owned by one process: the order is the same for any number of them
    streams: int = 1
    # records shuffled among each other, inside a shard
    window: int = 256
    # how often text reads the next image rather than the last, decided once a document
    p_next: float = 0.0
    # documents with fewer images are passed over, and images that fit their sentence worse than this
    min_media: int = 1
    min_similarity: float = 0.24
    # frames of a clip, taken at one a second
    max_frames: int = 8
    # how long the mean of a turned set's domains may be beside a picture, and what is each picture's own: two of a thing
    # are less alike by it (`training/default/discriminants.py`)
    strangeness: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.batch_size % self.streams:
            raise ConfigError(
                f"set {self.name}: batch_size {self.batch_size} is not a multiple of streams {self.streams}"
            )
        if not 0.0 <= self.p_next <= 1.0:
            raise ConfigError(f"set {self.name}: p_next is {self.p_next}, must lie in 0..1")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    learning_rate: float = 1e-4
    # gates are single numbers that start at zero: they may need larger steps than the matrices behind them
    gate_rate: float = 1.0
    # and a resampler that begins with what matters (`model/zoo/bridge.py`) smaller ones
    resampler_rate: float = 1.0
    warmup_steps: int = 5000
    # constant (the paper's pre-training), or down to `end` of the learning rate by the run's last step: along half a
    # cosine, in a line, or by the same factor every step (the paper's fine-tuning, to a tenth)
    decay: Literal["constant", "cosine", "linear", "exponential"] = "constant"
    end: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    # what moves the layers' matrices: AdamW (the paper), or Muon at so many times the learning rate
    matrices: Literal["adamw", "muon"] = "adamw"
    muon_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.end <= 1.0:
            raise ConfigError(f"optim.end is {self.end}, must lie in 0..1")
        if self.decay == "exponential" and not self.end:
            raise ConfigError("optim.end is 0, which decay exponential never reaches")


@dataclass(frozen=True, slots=True, kw_only=True)
class AblateConfig:
    """Where the untrained bridge is another than the folder's; "" and 0: as the folder has it (`model/config.py`)."""

    resampler: Literal["", "perceiver", "transformer", "mlp"] = ""
    gate: Literal["", "scalar", "channel", "none"] = ""
    attends: Literal["", "last", "all_previous"] = ""
    interval: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    model: str  # a model folder, or "default"
    # keep: go on from the folder's bridge; start: from the untrained one, gates at zero
    bridge: Literal["keep", "start"] = "keep"
    # a folder of `python -m training.default_data`: an untrained bridge's resampler begins with what tells the things
    # in its pictures apart (`training/default/discriminants.py`); "": with a random projection
    discriminants: str = ""
    # a folder of `python -m training.contrastive`, whose encoder takes the place of the model's; "": the model's own
    vision: str = ""
    # what moves; everything else stays as it is, bit for bit. The paper fine-tunes bridge and vision
    trains: tuple[str, ...] = ("bridge",)
    # side of the encoder's square; its table of places is stretched. 0: the model's own
    image_size: int = 0
    ablate: AblateConfig = AblateConfig()
    # scratch: the folder's language model in shape alone, with random weights
    language_model: Literal["keep", "scratch"] = "keep"
    # text: the next token's loss; the others: stages of the default model
    objective: Literal["text", "alignment", "text_and_matching"] = "text"
    out: str
    steps: int
    sets: tuple[SetConfig, ...]
    optim: OptimConfig = OptimConfig()
    # all: gradients of all sets before each step (the paper); round_robin: one set a step, by turns (the ablation)
    accumulate: Literal["all", "round_robin"] = "all"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    activation_checkpointing: bool = False
    # tokens of one forward: a set's batch is packed into as many as it needs
    pack_tokens: int = 4096
    seed: int = 0
    checkpoint_steps: int = 500
    log_steps: int = 10

    def __post_init__(self) -> None:
        if not self.sets:
            raise ConfigError("sets is empty: there is nothing to learn from")
        names = [one.name for one in self.sets]
        if len(set(names)) != len(names):
            raise ConfigError(f"sets share a name: {', '.join(names)}")
        self._check_parts()

    def _check_parts(self) -> None:
        if not self.trains or set(self.trains) - set(PARTS) or len(set(self.trains)) != len(self.trains):
            raise ConfigError(f"trains is {list(self.trains)}, must be some of {', '.join(PARTS)}, each once")
        if self.objective == "alignment" and "language_model" in self.trains:
            raise ConfigError("objective alignment pulls images to the frozen language model: trains must not name it")
        if self.ablate != AblateConfig() and self.bridge != "start":
            raise ConfigError("ablate is another bridge than the folder's, and needs `bridge: start`")
        if self.discriminants and self.bridge != "start":
            raise ConfigError("discriminants are what an untrained bridge begins with, which needs `bridge: start`")
        if self.vision and self.bridge != "start":
            raise ConfigError("vision is another encoder than the bridge was trained on, and needs `bridge: start`")
        if self.language_model == "scratch" and "language_model" not in self.trains:
            raise ConfigError("language_model scratch knows nothing, and trains does not name language_model")
        for one in self.sets:
            if one.kind in MADE_SETS and ("vision" in self.trains or self.image_size or self.vision):
                raise ConfigError(
                    f"set {one.name}: kind {one.kind} shows the default model's features as they were cached: "
                    "neither `trains: [vision]` nor vision nor image_size can change them"
                )


def read_config(file: Path) -> TrainConfig:
    return parse_config(read_mapping(file))


def read_mapping(file: Path) -> dict[str, Any]:
    values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ConfigError(f"{file} does not hold a mapping")
    return values


def parse_config(values: dict[str, Any]) -> TrainConfig:
    listed = values.get("sets", ())
    sets = tuple(from_dict(SetConfig, entry, f"config.sets[{i}]") for i, entry in enumerate(listed))
    config: TrainConfig = from_dict(TrainConfig, {**values, "sets": sets})
    return config
