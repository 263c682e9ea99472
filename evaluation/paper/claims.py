"""The paper's claims, each with the command that tests it, the measured value, and the comparison of the signs.

A sign is the same as the paper's or another one if the interval over the seeds excludes zero; else the row is undecided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evaluation.paper.evidence import ALL_PREVIOUS, CLIPS, LAST, Evidence, change
from training.ablations.ablation import BASE, read_ablation
from training.ablations.table import verdict
from training.default.episodes import MAX_IMAGES
from training.few_shot.images import SHOTS
from training.few_shot.motions import FAMILIES
from training.paired import SeedValues

MISSING = "missing"
ABLATIONS = "`python -m training.ablations`"
SPEED = "`python -m training.ablations --speed`"
FEW_SHOT = "`python -m training.few_shot`"
COST = "`python -m evaluation.paper.cost`"
CHANCE_OF_TWO = 50.0
CLIP_SHOTS = 4
# two times count as the same if they differ by at most this share
FLAT = 0.1


@dataclass(frozen=True, slots=True)
class Claim:
    text: str
    published: str
    command: str
    measured: str
    sign: str


def claims(evidence: Evidence) -> list[Claim]:
    return [
        *_ablations(evidence),
        *_speed(evidence),
        *_default_model(evidence),
        *_shots(evidence),
        *_gates(evidence),
        *_clips(evidence),
        *_cost(evidence),
    ]


def _claim(
    text: str, published: str, command: str, measured: SeedValues | None, expected: float, unit: str = " points"
) -> Claim:
    if measured is None:
        return Claim(text, published, command, MISSING, MISSING)
    return Claim(text, published, command, measured.text() + unit, measured.compare(expected))


def _ablations(evidence: Evidence) -> Iterator[Claim]:
    for name in evidence.ablations.results:
        ablation = read_ablation(name)
        if name != BASE and ablation.paper is not None:
            measured = evidence.ablations.change(name)
            yield Claim(
                f"Score: {ablation.description}",
                f"{ablation.paper.change:+.1f} points",
                ABLATIONS,
                f"{measured.text()} points" if measured else MISSING,
                verdict(ablation, measured),
            )


def _speed(evidence: Evidence) -> Iterator[Claim]:
    seconds = evidence.published["step_seconds"]
    name = "interval-4"
    published = f"{seconds[name] / seconds[BASE]:.2f} ({seconds[name]} s, base {seconds[BASE]} s)"
    text = f"Step time relative to the base: {read_ablation(name).description}"
    if name not in evidence.speed:
        yield Claim(text, published, SPEED, MISSING, MISSING)
        return
    row = evidence.speed[name]
    low, high = row["quartiles"]
    sign = "same" if high < 1.0 else "other" if low > 1.0 else "undecided"
    yield Claim(text, published, SPEED, f"{row['ratio']:.2f}, quartiles {low:.2f} to {high:.2f}", sign)


def _default_model(evidence: Evidence) -> Iterator[Claim]:
    """Compare the most shots with none, and with as many as the training's sequences had."""
    shots = evidence.published["shots"]
    scores, most = shots["scores"], max(map(int, evidence.shots), default=max(SHOTS))
    for low in (0, 8):
        text = f"Default model: {most} shots instead of {low}, trained on at most {MAX_IMAGES} images per sequence"
        published = f"{scores[max(SHOTS)] - scores[low]:+.1f} ({shots['source']})"
        measured = paired_by_query(evidence.shots, str(most), str(low)) if evidence.shots else None
        yield _claim(text, published, "`python -m evaluation.paper.shots`", measured, +1)


def paired_by_query(answers: Mapping[str, str], name: str, base: str) -> SeedValues:
    """Return the differences of the same queries, in points."""
    pairs = zip(answers[name], answers[base], strict=True)
    return SeedValues(tuple(100.0 * (int(value) - int(other)) for value, other in pairs))


def _shots(evidence: Evidence) -> Iterator[Claim]:
    shots = evidence.published["shots"]
    scores, limit = shots["scores"], evidence.published["max_media"]
    by_shots = {num_shots: evidence.shares(LAST, str(num_shots)) for num_shots in SHOTS}
    few = limit - 1
    for low in (0, few):
        text = f"{max(SHOTS)} shots instead of {low}, trained on at most {limit} images per sequence"
        published = f"{scores[max(SHOTS)] - scores[low]:+.1f} ({shots['source']})"
        yield _claim(text, published, FEW_SHOT, change(by_shots[max(SHOTS)], by_shots[low]), +1)
    paper = read_ablation("all-previous").paper
    assert paper is not None
    for num_shots, published in ((few, f"{paper.change:+.1f} points"), (max(SHOTS), "worse, no figure")):
        text = f"{num_shots} shots: text reads all previous images instead of the last one"
        measured = change(evidence.shares(ALL_PREVIOUS, str(num_shots)), by_shots[num_shots])
        yield _claim(text, published, FEW_SHOT, measured, -1)


def _gates(evidence: Evidence) -> Iterator[Claim]:
    for name, command in ((BASE, ABLATIONS), (LAST, FEW_SHOT), (CLIPS, FEW_SHOT)):
        measured = [last_gate(gates) - first_gate(gates) for gates in evidence.gates(name).values()]
        text = f"Openness of the last layer's attention gate minus the first's, run `{name}`"
        openness = SeedValues(tuple(100 * value for value in measured)) if measured else None
        yield _claim(text, "grows with depth, no figure", command, openness, +1, " % of an open gate")


def attention_gates(gates: Mapping[str, Any]) -> dict[int, list[float]]:
    """Return the openness of the attention gates over training by layer."""
    names = {name: int(name.split(".")[1]) for name in gates["values"] if name.endswith("attn_gate")}
    return {layer: gates["values"][name] for name, layer in sorted(names.items(), key=lambda item: item[1])}


def first_gate(gates: Mapping[str, Any]) -> float:
    return next(iter(attention_gates(gates).values()))[-1]


def last_gate(gates: Mapping[str, Any]) -> float:
    return list(attention_gates(gates).values())[-1][-1]


def _clips(evidence: Evidence) -> Iterator[Claim]:
    frames = evidence.published["frames"]
    served, trained = frames["served"], frames["trained"]
    for family in FAMILIES:
        shares = clip_shares(evidence, family)
        text = f"Videos, {family}: {served} frames after training with {trained}, above chance"
        yield _claim(text, "works, no figure", FEW_SHOT, change(shares[f"{served} frames"], CHANCE_OF_TWO), +1)
    for family in FAMILIES:
        shares = clip_shares(evidence, family)
        text = f"Videos, {family}: {served} frames instead of 1"
        yield _claim(text, "helps, no figure", FEW_SHOT, change(shares[f"{served} frames"], shares["1 frame"]), +1)


def clip_shares(evidence: Evidence, family: str) -> dict[str, dict[int, float]]:
    """Return the percentages of a family by frames and seed; without runs, each is empty."""
    conditions = ("8 frames", "30 frames", "1 frame", "8 frames, shuffled", "30 frames, shuffled")
    return {condition: evidence.shares(CLIPS, family, f"{condition}, {CLIP_SHOTS} shots") for condition in conditions}


def _cost(evidence: Evidence) -> Iterator[Claim]:
    tokens = evidence.published["visual_tokens"]
    texts = (
        "Visual tokens, for any number of frames and resolution",
        "Bytes of a page, for any number of frames and resolution",
    )
    sizes = evidence.cost.values()
    for text, key in zip(texts, ("visual_tokens", "page_bytes"), strict=True):
        published = f"{tokens} for any" if key == "visual_tokens" else "the same, no figure"
        counts = sorted({row[key] for row in sizes})
        sign = MISSING if not counts else "same" if len(counts) == 1 else "other"
        yield Claim(text, published, COST, ", ".join(map(str, counts)) or MISSING, sign)
    text = "Time of a decode step with other media, relative to images"
    if not sizes:
        yield Claim(text, "the same, no figure", COST, MISSING, MISSING)
        return
    low = min(row["decode_quartiles"][0] for row in sizes)
    high = max(row["decode_quartiles"][1] for row in sizes)
    sign = "same" if low >= 1 - FLAT and high <= 1 + FLAT else "undecided"
    yield Claim(text, "the same, no figure", COST, f"quartiles from {low:.2f} to {high:.2f}", sign)
