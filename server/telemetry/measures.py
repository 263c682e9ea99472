"""The engine's counters, gauges and histograms for the metrics: names, help texts, and the data of heartbeats."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

# gauges and counters: the help text, and whether it is a counter
ENGINE_METRICS = {
    "kv_cache_usage_perc": ("Used fraction of the blocks of the text cache, from 0 to 1", False),
    "media_slots": ("Media pages that the media cache holds", False),
    "media_slots_in_use": ("Media pages that running requests use or that are pinned", False),
    "kv_cache_pinned_bytes": ("Bytes of keys and values of shots of pinned support sets", False),
    "media_slots_pinned": ("Media pages that are never evicted", False),
    "media_page_bytes": ("Bytes of a media page: its keys and values for all gated layers", False),
    "media_host_bytes": ("Bytes of visual tokens in host memory", False),
    "media_host_hits": ("Media pages computed from visual tokens in host memory, without the encoder", True),
    "media_evictions": ("Media pages reused for another media item", True),
    "media_single_flight_joins": ("Media that a request found already requested for another one", True),
    "step_threads": ("Threads of a step on a CPU: fewer while other programs use their processors", False),
    "num_preemptions": ("Sequences that released their blocks and were queued again", True),
    "spec_decode_num_draft_tokens": ("Tokens that were proposed and verified by a step", True),
    "spec_decode_num_accepted_tokens": ("Proposed tokens that the model would have generated", True),
}
# the kinds of a step: its rows decode, compute prompts, or both; without rows, it only encodes media
STEP_KINDS = ("decode", "prompt", "mixed", "encode")


@dataclass(frozen=True, slots=True)
class EngineHistogram:
    """A histogram of the engine: its help text, the upper bounds of its buckets, and the values of its label, if any."""

    help: str
    bounds: tuple[float, ...]
    label: str = ""
    values: tuple[str, ...] = ("",)


STEP_SECONDS, STEP_TOKENS, STEP_FRAMES = "step_seconds", "iteration_tokens", "encoder_batch_size"
ENGINE_HISTOGRAMS = {
    STEP_SECONDS: EngineHistogram(
        "Time of a step of the engine",
        (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
        "kind",
        STEP_KINDS,
    ),
    STEP_TOKENS: EngineHistogram("Tokens per step", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)),
    STEP_FRAMES: EngineHistogram("Frames that the vision encoder has in one batch", (1, 2, 4, 8, 16, 32, 64, 128, 256)),
}


@dataclass(slots=True)
class Buckets:
    """Counts of observations per bucket, the last one without an upper bound, and their sum."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Measures:
    """The engine's histograms, by name and value of the label."""

    def __init__(self) -> None:
        self._buckets = {
            (name, value): Buckets(histogram.bounds)
            for name, histogram in ENGINE_HISTOGRAMS.items()
            for value in histogram.values
        }

    def note_step(self, counts: Iterable[int], num_proposed: int, num_frames: int, seconds: float) -> None:
        """Note a step whose rows compute `counts` tokens each, and `num_proposed` together."""
        counts = list(counts)
        if not counts and not num_frames:
            return
        self._buckets[STEP_SECONDS, kind_of_step(counts)].observe(seconds)
        if counts:
            self._buckets[STEP_TOKENS, ""].observe(sum(counts) + num_proposed)
        if num_frames:
            self._buckets[STEP_FRAMES, ""].observe(num_frames)

    def snapshot(self) -> dict[str, dict[str, list[float]]]:
        """Return, by name and value of the label, the counts of the buckets and the sum, for a heartbeat."""
        snapshot: dict[str, dict[str, list[float]]] = {}
        for (name, value), buckets in self._buckets.items():
            snapshot.setdefault(name, {})[value] = [*buckets.counts, buckets.total]
        return snapshot


def kind_of_step(counts: list[int]) -> str:
    """Return the kind of a step, by the number of tokens of each row: a row of one token decodes."""
    num_decoding = counts.count(1)
    if not counts:
        return "encode"
    return "decode" if num_decoding == len(counts) else "mixed" if num_decoding else "prompt"
