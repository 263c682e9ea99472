"""Metrics of ranked candidates: NDCG of VisDial, and mWAP of RareAct."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score, ndcg_score


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float:
    """Return the NDCG of the first ranks, as many as there are relevant candidates (VisDial challenge, `NDCG`)."""
    num_relevant = sum(value != 0 for value in relevance)
    return float(ndcg_score([relevance], [scores], k=num_relevant, ignore_ties=True)) if num_relevant else 0.0


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip of RareAct with its annotation for one action, and the scores of all actions by verb and noun."""

    video: str
    action: tuple[str, str]
    annotation: int
    scores: dict[tuple[str, str], float]


def average_precisions(clips: Sequence[Clip]) -> dict[tuple[str, str], float]:
    """Return the weighted average precision of each action with a positive clip; their mean is mWAP.

    As in `compute_score.py` of github.com/antoine77340/RareAct: the positive clips of other actions are negatives, too.
    Within the positives, the hard negatives and the others, all clips of one video together have the weight of one clip.
    """
    return {
        action: _average_precision(action, clips)
        for action in dict.fromkeys(c.action for c in clips if c.annotation == 1)
    }


def _average_precision(action: tuple[str, str], clips: Sequence[Clip]) -> float:
    groups: dict[str, list[Clip]] = {"positive": [], "negative": [], "hard": []}
    for clip in clips:
        if (kind := _kind(action, clip)) is not None:
            groups[kind].append(clip)
    videos = {kind: Counter(clip.video for clip in group) for kind, group in groups.items()}
    members = [(kind, clip) for kind, group in groups.items() for clip in group]
    return float(
        average_precision_score(
            np.array([kind == "positive" for kind, _ in members]),
            np.array([clip.scores[action] for _, clip in members]),
            sample_weight=np.array([1 / videos[kind][clip.video] for kind, clip in members]),
        )
    )


def _kind(action: tuple[str, str], clip: Clip) -> str | None:
    if clip.action == action:
        return {0: "negative", 1: "positive"}.get(clip.annotation, "hard")
    if clip.annotation != 1:
        return None
    shares_a_word = clip.action[0] == action[0] or clip.action[1] == action[1]
    return "hard" if shares_a_word else "negative"
