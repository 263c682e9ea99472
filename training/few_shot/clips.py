"""Episodes of clips: two classes of one family, each with its name, which the bridge learns from the episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import VisionConfig
from model.prompt import PromptTokenizer
from model.vision import normalise
from training.few_shot.episode import MAX_MEDIA, Question, Shot, ask, prepare
from training.few_shot.language import WORDS
from training.few_shot.motions import FAMILIES, MOTIONS, SIZE, Clip, Family, Motion, draw_clip, draw_pair
from training.mixture import PreparedExample

TRAINED_FRAMES, SERVED_FRAMES = 8, 30
QUERY_SEED = 29
VISION = VisionConfig(
    architecture="clip_vit",
    image_size=SIZE,
    patch_size=8,
    feature_dim=64,
    num_patches=16,
    num_layers=1,
    num_heads=4,
    ffn_dim=128,
    activation="quick_gelu",
    # the background is black, so that its patches contain only their position
    mean=(0.0, 0.0, 0.0),
    std=(0.25, 0.25, 0.25),
    resize="squash",
)

Frames = NDArray[np.uint8]
Sampler = Callable[[Clip, Random], Frames]


def all_frames(num_frames: int) -> Sampler:
    return lambda clip, rng: clip.frames(num_frames)


def shuffled_frames(num_frames: int) -> Sampler:
    """Return a sampler of the same frames in random order, which removes only the order of a motion."""

    def sample(clip: Clip, rng: Random) -> Frames:
        return clip.frames(num_frames)[rng.sample(range(num_frames), num_frames)]

    return sample


def random_frame(num_frames: int) -> Sampler:
    """Return a sampler of one random frame; the first frame would reveal where a path begins."""

    def sample(clip: Clip, rng: Random) -> Frames:
        number = rng.randrange(num_frames)
        return clip.frames(num_frames)[number : number + 1]

    return sample


CONDITIONS: dict[str, Sampler] = {
    "8 frames": all_frames(TRAINED_FRAMES),
    "30 frames": all_frames(SERVED_FRAMES),
    "1 frame": random_frame(TRAINED_FRAMES),
    "8 frames, shuffled": shuffled_frames(TRAINED_FRAMES),
    "30 frames, shuffled": shuffled_frames(SERVED_FRAMES),
}


class NamedClips:
    """The n-th episode has `MAX_MEDIA` clips of two classes, each with the name of its class."""

    def __init__(self, tokenizer: PromptTokenizer, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed

    def __call__(self, number: int) -> PreparedExample:
        rng = Random(f"{self._seed}/clips/{number}")
        pair = draw_pair(rng.choice(FAMILIES), rng)
        media, shots = {}, []
        for position in range(MAX_MEDIA):
            motion = rng.choice(pair)
            digest = f"{number}/{position}".encode()
            media[digest] = pixels(draw_clip(motion, rng).frames(TRAINED_FRAMES))
            shots.append(Shot(digest, name_of(motion), True))
        return prepare(f"clips/{number}", shots, media, self._tokenizer)


def name_of(motion: Motion) -> str:
    """Return the name of a class: a word that the decoder has learned to write."""
    return WORDS[MOTIONS.index(motion)]


def pixels(frames: Frames) -> Tensor:  # [F, h, w, 3] -> [F, 3, h, w]
    return normalise(torch.from_numpy(frames.copy()), VISION)


def draw_questions(
    tokenizer: PromptTokenizer, family: Family, sampler: Sampler, count: int, seed: int, num_shots: int
) -> Iterator[Question]:
    """Yield questions after shots that show both classes equally often; the clips are the same for every sampler."""
    for number in range(count):
        rng = Random(f"{QUERY_SEED}/{seed}/{family}/{number}")
        pair = draw_pair(family, rng)
        words = [name_of(motion) for motion in pair]
        choices = rng.sample([0, 1] * (num_shots // 2), num_shots)
        clips = [(draw_clip(pair[choice], rng), words[choice]) for choice in [*choices, rng.randrange(2)]]
        frame_rng = Random(f"frames/{seed}/{family}/{number}")
        digests = [f"{family}/{number}/{position}".encode() for position in range(len(clips))]
        media = {digest: pixels(sampler(clip, frame_rng)) for digest, (clip, _) in zip(digests, clips, strict=True)}
        pairs = [(digest, word) for digest, (_, word) in zip(digests, clips, strict=True)]
        yield ask(f"{family}/{number}", pairs[:-1], pairs[-1], words, media, tokenizer)
