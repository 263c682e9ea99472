"""The engine's limits: blocks, media slots, and the budgets of a step in tokens and frames."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The limits of an engine."""

    block_size: int = 16
    num_blocks: int = 2048
    num_media_slots: int = 256
    host_media_bytes: int = 256 << 20  # of visual tokens in host memory
    max_sequences: int = 64  # that run at the same time
    max_tokens_per_step: int = 512
    max_frames_per_step: int = 2  # in a step with rows
    max_frames_idle: int = 16  # in a step without rows
    max_kept_frames: int = 256  # whose features wait for later pieces of their media item
    max_model_len: int = 2048
    max_light_tokens: int = 256  # the largest need of a light request
    step_seconds: float = inf  # the longest that a step should take
    speculative_tokens: int = 0  # the most proposed tokens of a decoding sequence in a step
    reports_encoding: bool = False  # how many frames each step encodes for a request, for traces
    # where possible, a step is launched while the one before it runs; pages that are encoded next to rows are read from the
    # next step on
    overlaps: bool = False

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


# The limits that fit a kind of device, where the settings name no others. Each request that shares a prompt computes the
# rest after its last full block again: expensive on a CPU, where small blocks cost nothing. A GPU reads large blocks
# faster, and computes many tokens and frames in the time of a few; it works while the host does, and encodes media next to
# a forward.
DEVICE_LIMITS = {
    "cpu": EngineConfig(block_size=4),
    "cuda": EngineConfig(
        block_size=16,
        max_sequences=256,
        max_tokens_per_step=2048,
        max_frames_per_step=16,
        max_frames_idle=64,
        overlaps=True,
    ),
}
