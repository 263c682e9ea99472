"""The engine's limits: blocks, media slots, and the budgets of a step in tokens and frames."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The limits of an engine.

    `max_tokens_per_step` bounds one forward. `max_frames_per_step` bounds the frames encoded in a step next to sequences,
    and `max_frames_idle` those in a step without any; the features of `max_kept_frames` wait for later pieces. A request is
    light while it has had, and is known to want, no more than `max_light_tokens` of work. `step_seconds` is the longest
    that a step should take.
    """

    block_size: int = 16
    num_blocks: int = 2048
    num_media_slots: int = 256
    host_media_bytes: int = 256 << 20
    max_sequences: int = 64
    max_tokens_per_step: int = 512
    max_frames_per_step: int = 2
    max_frames_idle: int = 16
    max_kept_frames: int = 256
    max_model_len: int = 2048
    max_light_tokens: int = 256
    step_seconds: float = inf

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "num_media_slots", "max_sequences", "max_tokens_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine {name} is {getattr(self, name)}, must be at least 1")
        max_tokens = self.num_blocks * self.block_size
        if max_tokens < self.max_model_len:
            raise ValueError(
                f"{self.num_blocks} blocks of {self.block_size} tokens hold {max_tokens} tokens, "
                f"fewer than max_model_len {self.max_model_len}"
            )
