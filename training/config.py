"""A training run is frozen data, read once from YAML: the model, the data sets, the optimizer and the schedule.

An unknown key raises a `ConfigError` that names its path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from model.config import ConfigError, from_dict
from model.unique_keys import load_yaml

# The kinds after "videos" are generated from the folder of `python -m training.default_data`: episodes, turned (episodes
# in generated domains) and alignment for the default model, sequences and captions for the ablations, taught_images for
# training/few_shot. named_clips, also for training/few_shot, are rendered and need no folder.
SetKind = Literal[
    "pairs",
    "documents",
    "videos",
    "episodes",
    "turned",
    "alignment",
    "sequences",
    "captions",
    "taught_images",
    "named_clips",
]
FEATURE_SETS = ("episodes", "turned", "alignment", "sequences", "captions", "taught_images")
GENERATED_SETS = (*FEATURE_SETS, "named_clips")
# the number format of forward passes; auto: bfloat16 on devices that compute it fast, otherwise float32
Precision = Literal["auto", "float32", "bfloat16"]
# their sequences have one image or video each
SINGLE_MEDIA_SETS = ("pairs", "videos")
# the parts that a run may train; new tokens' rows belong to the bridge
TRAINABLE_PARTS = ("bridge", "vision", "language_model")


# the least values of fields
SET_MINIMA = {
    "weight": 0,
    "batch_size": 1,
    "max_tokens": 1,
    "max_media": 1,
    "streams": 1,
    "window": 1,
    "min_media": 0,
    "max_frames": 1,
    "strangeness": 0,
    "noise": 0,
    "min_similarity": -1,
}
OPTIM_MINIMA = {
    "learning_rate": 0,
    "gate_rate": 0,
    "resampler_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "clip": 0,
    "muon_rate": 0,
}
RUN_MINIMA = {
    "kin": 0,
    "frame_scale": 0,
    "image_size": 0,
    "steps": 0,
    "pack_tokens": 1,
    "checkpoint_steps": 1,
    "log_steps": 1,
    "seed": 0,
}
# far above the sizes of encoders; position embeddings of the square of a size have to fit into memory
MAX_IMAGE_SIZE = 4096
# what fits into the integers of torch and itertools
MAX_WHOLE = 2**63 - 1
# updates by a larger rate overflow float32
MAX_RATE = 1e30


def check_minima(prefix: str, config: Any, minima: Mapping[str, float]) -> None:
    """Raise `ConfigError` for a field that is less than its minimum, is not finite, or has too many digits."""
    for name, least in minima.items():
        value = getattr(config, name)
        if isinstance(value, int) and abs(value) > MAX_WHOLE:
            raise ConfigError(f"{prefix}{name} has too many digits, must be at most {MAX_WHOLE}")
        if not math.isfinite(value):
            raise ConfigError(f"{prefix}{name} is {value}, must be finite")
        if value < least:
            raise ConfigError(f"{prefix}{name} is {value}, must be at least {least}")


def check_image_size(name: str, size: int) -> None:
    if size > MAX_IMAGE_SIZE:
        raise ConfigError(f"{name} is {size}, must be at most {MAX_IMAGE_SIZE}")


def check_not_empty(prefix: str, config: Any, names: Sequence[str]) -> None:
    """Raise `ConfigError` for a field that is an empty text."""
    for name in names:
        if not getattr(config, name).strip():
            raise ConfigError(f"{prefix}{name} is empty, must be a text")


def check_homes(prefix: str, config: Any, names: Sequence[str]) -> None:
    """Raise `ConfigError` for a path that begins with `~` and the name of an unknown user."""
    for name in names:
        try:
            Path(getattr(config, name)).expanduser()
        except RuntimeError:
            raise ConfigError(f"{prefix}{name} is {getattr(config, name)}, but there is no such user") from None


def check_betas(betas: tuple[float, float]) -> None:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(f"optim.betas is {list(betas)}, must be at least 0 and less than 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetConfig:
    """One data set of the mixture.

    `weight` is the paper's lambda; `batch_size` counts examples per step, over all processes.
    """

    name: str
    kind: SetKind
    shards: str  # a glob of tar files; the data folder of a generated set
    weight: float = 1.0
    batch_size: int = 8
    max_tokens: int = 256
    max_media: int = 5
    # the number of streams; each belongs to one process, so the order does not depend on the number of processes
    streams: int = 1
    # the number of consecutive records of a shard that are shuffled together
    window: int = 256
    # the probability that a document's text reads the next image instead of the last one
    p_next: float = 0.0
    # the probability that the shots of a sequence attend alone (training/forms.py)
    p_alone: float = 0.0
    # documents with fewer images are skipped, and images whose similarity to their sentence is lower
    min_media: int = 1
    min_similarity: float = 0.24
    # the maximum number of frames per clip, sampled at one frame per second; of a longer clip, consecutive ones are drawn
    max_frames: int = 8
    # for turned sets (`training/default/discriminants.py`), both relative to an image's length: the maximum length of a
    # domain's mean, and of the noise that each image gets, which makes two images of a label less similar
    strangeness: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_not_empty("sets.", self, ["name"])
        check_homes(f"set {self.name}: ", self, ["shards"])
        check_minima(f"set {self.name}: ", self, SET_MINIMA)
        if self.batch_size % self.streams:
            raise ConfigError(
                f"set {self.name}: batch_size {self.batch_size} is not a multiple of streams {self.streams}"
            )
        if not 0.0 <= self.p_next <= 1.0:
            raise ConfigError(f"set {self.name}: p_next is {self.p_next}, must be between 0 and 1")
        if not 0.0 <= self.p_alone <= 1.0:
            raise ConfigError(f"set {self.name}: p_alone is {self.p_alone}, must be between 0 and 1")
        if self.min_media > self.max_media:
            raise ConfigError(
                f"set {self.name}: min_media is {self.min_media}, must be at most max_media, which is {self.max_media}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    learning_rate: float = 1e-4
    # relative to `learning_rate`; gates are scalars that start at zero and may need larger steps than the matrices
    gate_rate: float = 1.0
    # relative to `learning_rate`; a resampler with a good initialisation (`model/zoo/bridge.py`) may need smaller steps
    resampler_rate: float = 1.0
    warmup_steps: int = 5000
    # constant (the paper's pre-training), or a decay to the share `end` of the learning rate, which it would have after the
    # run's last step: along half a cosine, linearly, or by the same factor per step (the paper's fine-tuning, to a tenth)
    decay: Literal["constant", "cosine", "linear", "exponential"] = "constant"
    end: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    # the maximum norm of the whole gradient; 0: off
    clip: float = 1.0
    # the optimizer of the layers' matrices: AdamW (the paper), or Muon at `muon_rate` times the learning rate
    matrices: Literal["adamw", "muon"] = "adamw"
    muon_rate: float = 1.0

    def __post_init__(self) -> None:
        check_minima("optim.", self, OPTIM_MINIMA)
        check_betas(self.betas)
        rate = self.learning_rate * max(1.0, self.gate_rate, self.resampler_rate, self.muon_rate)
        if rate > MAX_RATE:
            raise ConfigError(f"optim.learning_rate gives a rate of {rate:g}, must be at most {MAX_RATE:g}")
        if not 0.0 <= self.end <= 1.0:
            raise ConfigError(f"optim.end is {self.end}, must be between 0 and 1")
        if self.decay == "exponential" and not self.end:
            raise ConfigError("optim.end is 0, which an exponential decay never reaches")


@dataclass(frozen=True, slots=True, kw_only=True)
class AblateConfig:
    """Changes to the untrained bridge's configuration; "" and 0 keep the folder's value (`model/config.py`)."""

    resampler: Literal["", "perceiver", "transformer", "mlp"] = ""
    gate: Literal["", "scalar", "channel", "none"] = ""
    attends: Literal["", "last", "all_previous"] = ""
    interval: int = 0

    def __post_init__(self) -> None:
        check_minima("ablate.", self, {"interval": 0})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    model: str  # a model folder, or "default"
    # keep: continue with the folder's bridge; start: begin with an untrained bridge, its gates at zero
    bridge: Literal["keep", "start"] = "keep"
    # a folder of `python -m training.default_data`: an untrained bridge's resampler begins with the discriminants of its
    # images (`training/default/discriminants.py`); "": with a random projection
    discriminants: str = ""
    # coordinates of the kin of an image (`model/kin.py`) that an untrained bridge reads, or that are added to what a
    # trained bridge reads; the latter needs `discriminants`
    kin: int = 0
    # multiplies an untrained bridge's embeddings of frames, which are small compared with features and learn order slowly
    frame_scale: float = 1.0
    # a folder of `python -m training.contrastive`, whose encoder replaces the model's; "": keep the model's encoder
    vision: str = ""
    # the parts that are trained; everything else stays unchanged, bit for bit. The paper fine-tunes bridge and vision
    trains: tuple[str, ...] = ("bridge",)
    # the side of the encoder's square input; its position embeddings are interpolated. 0: keep the model's size
    image_size: int = 0
    ablate: AblateConfig = AblateConfig()
    # scratch: a language model of the same shape with random weights
    language_model: Literal["keep", "scratch"] = "keep"
    # text: the next-token loss; the others are stages of the default model
    objective: Literal["text", "alignment", "text_and_matching"] = "text"
    out: str
    # the name of the exported model; "": that of the folder `out`
    name: str = ""
    steps: int
    sets: tuple[SetConfig, ...]
    optim: OptimConfig = OptimConfig()
    # all: every step adds up the gradients of all sets (the paper); round_robin: one set per step (the ablation)
    accumulate: Literal["all", "round_robin"] = "all"
    # a resumed run with auto keeps the precision of its checkpoint (training/precision.py)
    precision: Precision = "auto"
    activation_checkpointing: bool = False
    # the maximum number of tokens per forward; a set's batch is packed into as many forwards as it needs
    pack_tokens: int = 4096
    seed: int = 0
    checkpoint_steps: int = 500
    log_steps: int = 10

    def __post_init__(self) -> None:
        check_minima("", self, RUN_MINIMA)
        check_not_empty("", self, ["model", "out"])
        check_homes("", self, ["model", "discriminants", "vision", "out"])
        check_image_size("image_size", self.image_size)
        if not self.sets:
            raise ConfigError("sets is empty, must list at least one data set")
        names = [data_set.name for data_set in self.sets]
        if len(set(names)) != len(names):
            raise ConfigError(f"sets must have different names: {', '.join(names)}")
        if self.model != "default" and Path(self.model).expanduser().resolve() == self.export_folder.resolve():
            raise ConfigError(
                f"the export to out/model would replace the initial model {self.model}: change out or model"
            )
        self._check_parts()

    @property
    def export_folder(self) -> Path:
        return Path(self.out).expanduser() / "model"

    @property
    def export_name(self) -> str:
        return self.name or Path(self.out).expanduser().resolve().name

    def warnings(self) -> Iterator[str]:
        """Yield warnings about settings that are valid but rarely useful."""
        if self.steps < self.optim.warmup_steps:
            yield (
                f"steps is {self.steps} and optim.warmup_steps is {self.optim.warmup_steps}: the run ends during warm-up, "
                f"at {self.steps / self.optim.warmup_steps:.0%} of the learning rate"
            )
        if all(data_set.kind in SINGLE_MEDIA_SETS for data_set in self.sets):
            yield (
                "no set has sequences of several images: the model may lose its few-shot ability; add a set of documents"
            )

    def _check_parts(self) -> None:
        if not self.trains or set(self.trains) - set(TRAINABLE_PARTS) or len(set(self.trains)) != len(self.trains):
            parts = ", ".join(TRAINABLE_PARTS)
            raise ConfigError(f"trains is {list(self.trains)}, must list one or more of {parts}, each once")
        closed = self.bridge == "start" and self.ablate.gate != "none"
        if closed and "vision" in self.trains and "bridge" not in self.trains:
            raise ConfigError(
                "`bridge: start` closes the gates, so the encoder gets no gradient: trains must list bridge"
            )
        if self.objective == "alignment" and "language_model" in self.trains:
            raise ConfigError("objective alignment needs a frozen language model: trains must not list language_model")
        if self.ablate != AblateConfig() and self.bridge != "start":
            raise ConfigError("ablate changes the untrained bridge and needs `bridge: start`")
        if self.discriminants and self.bridge != "start" and not self.kin:
            raise ConfigError("discriminants initialise what the bridge reads and need `bridge: start` or kin")
        if self.kin and self.bridge != "start" and not self.discriminants:
            raise ConfigError("kin is added to a trained bridge along the discriminants of a folder: set discriminants")
        if self.kin and self.vision:
            raise ConfigError("kin needs the classes of the model's own encoder, which vision replaces")
        if self.frame_scale != 1 and self.bridge != "start":
            raise ConfigError("frame_scale changes the untrained bridge and needs `bridge: start`")
        if self.vision and self.bridge != "start":
            raise ConfigError("vision replaces the encoder that the bridge was trained on and needs `bridge: start`")
        if self.language_model == "scratch" and "language_model" not in self.trains:
            raise ConfigError("language_model scratch has random weights: trains must list language_model")
        for data_set in self.sets:
            if data_set.kind in FEATURE_SETS and ("vision" in self.trains or self.image_size or self.vision):
                raise ConfigError(
                    f"set {data_set.name}: kind {data_set.kind} reads the default model's cached features, which cannot "
                    "be combined with `trains: [vision]`, vision or image_size"
                )


def read_config(file: Path) -> TrainConfig:
    return parse_config(read_mapping(file))


def read_mapping(file: Path) -> dict[str, Any]:
    try:
        values: Any = load_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {file}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must contain a YAML mapping")
    return values


def parse_config(values: dict[str, Any]) -> TrainConfig:
    config: TrainConfig = from_dict(TrainConfig, values)
    return config
