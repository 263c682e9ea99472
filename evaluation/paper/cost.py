"""Measure the cost of an image or a video in a prompt, by its frames and its resolution; the last line is JSON.

`python -m evaluation.paper.cost` builds Flamingo-3B at tiny scale, with random weights and open gates. The engine answers
the same prompts with media of each size in turn. Visual tokens and bytes of a page are counted; the processor time of a
decode step and of the encoding is measured. The results are stored for `python -m evaluation.paper`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from evaluation.counts import at_least
from model.config import FlamingoConfig
from model.flamingo import Flamingo
from model.folder import load_folder
from model.footprint import page_bytes
from model.inference import prepare_for_inference
from model.presets.build import build
from model.presets.paper import PRESETS
from model.presets.scale import at_scale
from model.prompt import EncodedPrompt, PromptTokenizer
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.wire import Generate, MediaPixels, MediaWanted, Sampling, Token
from training.start import at_resolution
from training.stored_runs import write_run

FILE = Path(__file__).parent / "runs" / "cost.json"
PRESET = "flamingo-3b"
FRAMES = (1, 8, 30)
RESOLUTION_FACTORS = (1, 2)
NUM_MEDIA, TEXT_TOKENS, NEW_TOKENS = 5, 12, 24


@dataclass(frozen=True, slots=True)
class Size:
    """The frames of each media item of a prompt, and the factor on the encoder's resolution."""

    frames: int
    factor: int

    @property
    def name(self) -> str:
        name = f"{self.frames} frame{'s' * (self.frames > 1)}"
        return name if self.factor == 1 else f"{name}, {self.factor} x resolution"


class Served:
    """An engine at one resolution."""

    def __init__(self, model: Flamingo, tokenizer: PromptTokenizer) -> None:
        self.config = model.config
        self._media_token = tokenizer.media_token_id
        self._engine = Engine(prepare_for_inference(model), tokenizer, EngineConfig(max_frames_idle=64))
        self._count = 0

    def answer(self, frames: int) -> tuple[float, float]:
        """Answer a prompt of new media, and return the seconds to the first token and the median of a decode step.

        They are processor time, which other programs on the machine affect less than wall time.
        """
        self._engine.add(self._request())
        started, times = time.process_time(), []
        while self._engine.has_work():
            events = self._engine.step()
            times += [time.process_time() for event in events if isinstance(event, Token)]
            for event in events:
                if isinstance(event, MediaWanted):
                    self._engine.supply(self._pixels(event.digest, frames))
        steps = [after - before for before, after in pairwise(times)]
        return times[0] - started, median(steps)

    def _request(self) -> Generate:
        self._count += 1
        chunk = [self._media_token, *range(1, TEXT_TOKENS)]
        media = [f"{self._count}/{number}".encode().rjust(32) for number in range(NUM_MEDIA)]
        prompt = EncodedPrompt(
            token_ids=chunk * NUM_MEDIA,
            media_index=[number for number in range(NUM_MEDIA) for _ in chunk],
            media=media,
        )
        sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        return Generate(request_id=str(self._count), prompt=prompt, sampling=sampling)

    def _pixels(self, digest: bytes, frames: int) -> MediaPixels:
        side = self.config.vision.image_size
        shape = (frames, side, side, 3)
        pattern = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(self._count))
        return MediaPixels(digest=digest, shape=shape, data=pattern.numpy().tobytes())


def sizes() -> list[Size]:
    return [Size(frames, 1) for frames in FRAMES] + [Size(1, factor) for factor in RESOLUTION_FACTORS if factor > 1]


def count_page(model: Flamingo, frames: int) -> tuple[int, int]:
    """Return the visual tokens of a media item, and the bytes of its page, as the model computes them."""
    side = model.config.vision.image_size
    with torch.inference_mode():
        tokens = model.encode_media(torch.zeros(1, frames, 3, side, side))
        page = model.media_kv(tokens)
    return tokens.shape[1], page.numel() * page.element_size()


def measure(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        build(at_scale(PRESETS[PRESET], "tiny"), start, gate=0.5, dtype=torch.float32)
        model = load_folder(start, "cpu", torch.float32)
        tokenizer = PromptTokenizer.load(start, model.config.prompt)
        models = {factor: _enlarged(load_folder(start, "cpu", torch.float32), factor) for factor in RESOLUTION_FACTORS}
        counts = {size.name: count_page(models[size.factor], size.frames) for size in sizes()}
        engines = {factor: Served(models[factor], tokenizer) for factor in RESOLUTION_FACTORS}
        times = time_rounds(engines, rounds)
    return {"preset": PRESET, "published": published_pages(), "sizes": summarise(counts, times)}


def _enlarged(model: Flamingo, factor: int) -> Flamingo:
    return model if factor == 1 else at_resolution(model, factor * model.config.vision.image_size)


def time_rounds(engines: dict[int, Served], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Answer a prompt of each size in turn, after one warm-up round."""
    times: dict[str, list[tuple[float, float]]] = {size.name: [] for size in sizes()}
    for number in range(rounds + 1):
        for size in sizes():
            sample = engines[size.factor].answer(size.frames)
            if number:
                times[size.name].append(sample)
    return times


def summarise(
    counts: dict[str, tuple[int, int]], times: dict[str, list[tuple[float, float]]]
) -> dict[str, dict[str, Any]]:
    """Return the counts and times by size; ratios are to the first size, round by round."""
    base = next(iter(times.values()))
    rows = {}
    for name, samples in times.items():
        ratios = [ours[1] / theirs[1] for ours, theirs in zip(samples, base, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        rows[name] = {
            "visual_tokens": counts[name][0],
            "page_bytes": counts[name][1],
            "first_token_seconds": round(median(first for first, _ in samples), 4),
            "decode_seconds": round(median(step for _, step in samples), 5),
            "decode_ratio": round(median(ratios), 3),
            "decode_quartiles": [round(low, 3), round(high, 3)],
        }
    return rows


def published_pages() -> dict[str, dict[str, int]]:
    """Return the visual tokens and the bytes of a page of the paper's models at full scale, in bfloat16."""
    return {name: _page(config) for name, config in PRESETS.items()}


def _page(config: FlamingoConfig) -> dict[str, int]:
    return {"visual_tokens": config.resampler.num_latents, "page_bytes": page_bytes(config, torch.bfloat16)}


def format_rows(rows: dict[str, dict[str, Any]]) -> Sequence[str]:
    return [f"{name}: {json.dumps(row)}" for name, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.paper.cost", description=__doc__)
    parser.add_argument("--rounds", type=at_least(2), default=15, help="rounds of prompts (default: 15)")
    parser.add_argument("--threads", type=at_least(1), default=1, help="torch threads (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.rounds)
    settings = {"rounds": options.rounds, "media": NUM_MEDIA, "text_tokens": TEXT_TOKENS, "new_tokens": NEW_TOKENS}
    write_run(FILE, settings, result)
    print("\n".join(format_rows(result["sizes"])))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
