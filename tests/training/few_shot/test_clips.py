"""Tests of the clips: what a frame, a set of frames and their order say about a class."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from tests.training.few_shot.language import language_tokenizer
from training.few_shot.clips import CONDITIONS, SERVED_FRAMES, TRAINED_FRAMES, NamedClips, draw_questions, name_of
from training.few_shot.episode import MAX_MEDIA
from training.few_shot.language import WORDS
from training.few_shot.motions import FAMILIES, MOTIONS, SLOTS, Clip, Family, Motion, draw_clip, draw_pair


def reversed_motion(clip: Clip) -> Clip:
    """Return the clip of the other class with everything else equal."""
    first, second = clip.motion.variant
    variant = (first, 1 - second) if clip.motion.family == "direction" else (second, first)
    return Clip(
        motion=Motion(clip.motion.family, variant),
        colour=clip.colour,
        side=clip.side,
        start=clip.start,
        length=clip.length,
        visible=clip.visible,
    )


@pytest.mark.parametrize("family", ["direction", "order"])
@pytest.mark.parametrize("num_frames", [TRAINED_FRAMES, SERVED_FRAMES])
def test_a_motion_and_its_reverse_have_the_same_frames_in_another_order(family: Family, num_frames: int) -> None:
    """Otherwise a single frame, or their set, would give the class away, and the controls would not fall to chance."""
    rng = Random(1)
    for _ in range(20):
        clip = draw_clip(draw_pair(family, rng)[0], rng)
        frames, other = clip.frames(num_frames), reversed_motion(clip).frames(num_frames)
        assert sorted(frame.tobytes() for frame in frames) == sorted(frame.tobytes() for frame in other)
        assert not np.array_equal(frames, other)


def test_a_pair_is_a_motion_and_its_reverse() -> None:
    rng = Random(0)
    for _ in range(20):
        first, second = draw_pair("direction", rng)
        assert first.variant[0] == second.variant[0]
        assert {first.variant[1], second.variant[1]} == {0, 1}
        first, second = draw_pair("order", rng)
        assert first.variant == second.variant[::-1]
        first, second = draw_pair("count", rng)
        assert first != second


def test_flashes_are_as_many_as_the_class_says_at_any_number_of_frames() -> None:
    rng = Random(2)
    for number in range(40):
        clip = draw_clip(Motion("count", (1 + number % 4,)), rng)
        for num_frames in (TRAINED_FRAMES, SERVED_FRAMES):
            frames = clip.frames(num_frames)
            is_on = [bool(frame.any()) for frame in frames]
            starts = sum(on and not before for on, before in zip(is_on, [False, *is_on], strict=False))
            assert starts == clip.motion.variant[0]
        assert max(clip.visible) < SLOTS


def test_shapes_stay_inside_the_frame() -> None:
    rng = Random(3)
    for number in range(60):
        clip = draw_clip(draw_pair(FAMILIES[number % 2], rng)[0], rng)
        sizes = {int(frame.any(-1).sum()) for frame in clip.frames(TRAINED_FRAMES)}
        assert sizes == {clip.side**2}


def test_names_of_classes_differ() -> None:
    names = {name_of(motion) for motion in MOTIONS}
    assert len(names) == len(MOTIONS) == 4 + 12 + 4
    assert names <= set(WORDS)


def test_an_episode_targets_the_names_of_two_classes() -> None:
    tokenizer = language_tokenizer()
    make = NamedClips(tokenizer, seed=0)
    for number in range(30):
        tokens = make(number).tokens
        assert tokens.target == [False, True, False] * MAX_MEDIA
        names = {tokenizer.token(token).removeprefix("Ġ") for token in tokens.token_ids[1::3]}
        assert 1 <= len(names) <= 2
        assert names <= set(WORDS)
        assert all(frames.shape[:2] == (TRAINED_FRAMES, 3) for frames in make(number).media.values())


@pytest.mark.parametrize("condition", CONDITIONS)
def test_questions_show_both_classes_equally_often_under_each_condition(condition: str) -> None:
    tokenizer = language_tokenizer()
    sampler = CONDITIONS[condition]
    plain = list(draw_questions(tokenizer, "order", CONDITIONS["8 frames"], 5, 0, 4))
    questions = list(draw_questions(tokenizer, "order", sampler, 5, 0, 4))
    for question, same in zip(questions, plain, strict=True):
        assert question.example.tokens.token_ids == same.example.tokens.token_ids
        words = question.example.tokens.token_ids[1::3]
        assert sorted(words[:4].count(word) for word in question.candidates) == [2, 2]
        assert words[4] == question.candidates[question.correct]
        count = {len(frames) for frames in question.example.media.values()}
        assert count == {int(condition.split()[0])}
