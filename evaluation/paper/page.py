"""Writes the page docs/paper.md from the finished runs alone; every number on it comes from a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from evaluation.intervals import Share
from evaluation.paper import shots
from evaluation.paper.claims import CHANCE_OF_TWO, CLIP_SHOTS, claims, clip_shares
from evaluation.paper.cost import NUM_MEDIA
from evaluation.paper.evidence import ALL_PREVIOUS, CLIPS, LAST, SEEDS, Evidence, values
from training.ablations import data as ablation_data
from training.ablations.run import Scale
from training.ablations.small import small_config
from training.ablations.table import format_table, state_of_base
from training.default.episodes import MAX_IMAGES
from training.few_shot import clips
from training.few_shot.episode import MAX_MEDIA
from training.few_shot.images import SHOTS, WAYS
from training.few_shot.motions import FAMILIES
from training.few_shot.run import SUBJECTS
from training.paired import CONFIDENCE, SeedValues

INTRODUCTION = """\
# The paper, measured

`python -m evaluation.paper` writes this page and its pictures from finished runs. Each run is a JSON file in
`training/ablations/runs`, `training/few_shot/runs` or `evaluation/paper/runs`. The commands below train or measure the
runs that have no file yet.

The models are small. Except for the default model and in [Cost](#cost), each has a decoder of {layers} layers, {dim}
numbers wide, that is trained for minutes on a CPU. Therefore only the sign of a change is compared with the paper's.

A sign is *same* or *other* only if the {confidence:.0%} interval of the change excludes zero. Otherwise the row is
*undecided*, which says nothing about the paper. The interval is Student's, of the mean over the seeds {seeds}; a seed
changes the initial bridge, the order of the data, and the queries. In rows of the default model it is of the mean over the
queries, and rows of times have quartiles instead.
"""
ABLATION_NOTE = """\
`python -m training.ablations`: {steps} steps, {queries} queries, seeds {seeds}. A bridge learns to name the {kinds}
most frequent categories of the default model's data, from sequences of {media} images and from single captions. Then
it has to name held-out images after {shots} shots ([how](training.md#ablations)). A row near chance has not learned
within this number of steps: its sign says that it learns later, not how good it becomes. `--speed` measures the
processor time of a step relative to a step of the base; the steps of the two alternate.
"""
DEFAULT_NOTE = """\
`python -m evaluation.paper.shots`: the default model has to write the novel word of an image. The shots show {ways}
held-out labels, one of which is the label of the image ({ways} candidates, chance {chance:.0f}%). The model was trained
with at most {media} images per sequence. With fewer than {ways} shots, the label of the query is not always among them.
Brackets are Wilson's {confidence:.0%} intervals over the queries.
"""
CURVE_NOTE = """\
`python -m training.few_shot images images-all-previous`: {steps} steps, {queries} queries, seeds {seeds}. A decoder was
first trained on generated texts to repeat words of its text. A bridge is then trained on sequences of {media} images,
which give new words to a few labels, so that the decoder repeats the words of similar images. The model has to write the
word of an image of a held-out label, after shots of {ways} held-out labels ({ways} candidates, chance {chance:.0f}%).
With fewer than {ways} shots, the label of the query is not always among them. In `{all_previous}`, text reads all
previous images.
"""
CLIP_NOTE = """\
`python -m training.few_shot clips`: {steps} steps, {queries} queries, seeds {seeds}. Each clip belongs to one of two
classes: a direction of motion or its reverse, two colours in one order or in the other, or two numbers of flashes. A
bridge and a small encoder are trained on sequences of {media} clips of {trained} frames. They have to name the class of
a clip after {shots} shots (chance {chance:.0f}%). For {served} frames, the embeddings of the {trained} frames are
interpolated. A motion and its reverse have the same frames, so shuffled frames should reduce direction and order to chance,
but not the count. The single frame is a random one of the clip.
"""
COST_NOTE = """\
`python -m evaluation.paper.cost`: Flamingo-3B at tiny scale, with random weights, answers prompts with {media} media of
each size in turn. Times are processor times of one thread. The time to the first token includes the encoding of the media,
which takes longer with more frames and a higher resolution; the decode steps after it do not. Brackets are quartiles.
"""


def write_page(evidence: Evidence) -> str:
    return "\n".join(
        [
            _introduction(),
            *_summary(evidence),
            *_missing(evidence),
            *_ablations(evidence),
            *_curve(evidence),
            *_gates(),
            *_videos(evidence),
            *_cost(evidence),
        ]
    )


def _introduction() -> str:
    decoder = small_config(clips.VISION, 1).language_model
    return INTRODUCTION.format(layers=decoder.num_layers, dim=decoder.dim, confidence=CONFIDENCE, seeds=_seeds())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _summary(evidence: Evidence) -> list[str]:
    rows = claims(evidence)
    counts = Counter(row.sign for row in rows)
    totals = ", ".join(f"{count} {sign}" for sign, count in sorted(counts.items()))
    head = ("the paper's claim", "paper", "command", "measured here", "sign")
    cells = [(row.text, row.published, row.command, row.measured, f"**{row.sign}**") for row in rows]
    return ["## Claims\n", *_table(head, cells), f"\n{len(rows)} claims: {totals}.\n"]


def _missing(evidence: Evidence) -> list[str]:
    missing = evidence.missing()
    return ["## Missing runs\n", *(f"- {run}" for run in missing), ""] if missing else []


def _ablations(evidence: Evidence) -> list[str]:
    scale = Scale()
    note = ABLATION_NOTE.format(
        steps=scale.steps,
        queries=scale.queries,
        seeds=_seeds(),
        kinds=ablation_data.NUM_KINDS,
        media=ablation_data.SHOTS + 1,
        shots=ablation_data.SHOTS,
    )
    state = " ".join(state_of_base(evidence.ablations))
    return ["## Ablations\n", note, format_table(evidence.ablations), f"\n{state}\n"]


def _seeds() -> str:
    return ", ".join(map(str, SEEDS))


def _cell(measured: SeedValues | None) -> str:
    return measured.text(sign="") if measured else "missing"


def _curve(evidence: Evidence) -> list[str]:
    scale = SUBJECTS[LAST].scale
    note = CURVE_NOTE.format(
        steps=scale.steps,
        queries=scale.queries,
        seeds=_seeds(),
        media=MAX_MEDIA,
        ways=WAYS,
        chance=100 / WAYS,
        all_previous=ALL_PREVIOUS,
    )
    head = ("shots", *map(str, SHOTS))
    rows = [
        (f"`{name}`", *(_cell(values(evidence.shares(name, str(count)))) for count in SHOTS))
        for name in (LAST, ALL_PREVIOUS)
    ]
    picture = "![accuracy by shots](paper/curve.svg)\n"
    return [
        "## More shots than in training\n",
        DEFAULT_NOTE.format(media=MAX_IMAGES, ways=shots.WAYS, chance=100 / shots.WAYS, confidence=CONFIDENCE),
        *_table(("shots", *evidence.shots), [("default model", *map(_share, evidence.shots.values()))]),
        "",
        note,
        *_table(head, rows),
        "",
        picture,
    ]


def _share(digits: str) -> str:
    measured = Share(digits.count("1"), len(digits))
    low, high = measured.interval()
    return f"{100 * measured.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _gates() -> list[str]:
    return [
        "## Gates\n",
        "The openness |tanh| of each attention gate during training, seed 0.\n",
        "![gates](paper/gates.svg)\n",
    ]


def _videos(evidence: Evidence) -> list[str]:
    scale = SUBJECTS[CLIPS].scale
    rows = []
    for family in FAMILIES:
        shares = clip_shares(evidence, family)
        rows.append((family, *(_cell(values(shares[condition])) for condition in clips.CONDITIONS)))
    note = CLIP_NOTE.format(
        steps=scale.steps,
        queries=scale.queries,
        seeds=_seeds(),
        media=MAX_MEDIA,
        shots=CLIP_SHOTS,
        chance=CHANCE_OF_TWO,
        trained=clips.TRAINED_FRAMES,
        served=clips.SERVED_FRAMES,
    )
    picture = "![accuracy by frames](paper/clips.svg)\n"
    return ["## Videos\n", note, *_table(("family", *clips.CONDITIONS), rows), "", picture]


def _cost(evidence: Evidence) -> list[str]:
    head = (
        "media",
        "visual tokens",
        "bytes of a page",
        "first token, s",
        "decode step, ms",
        "relative to the first row",
    )
    rows = [
        (
            name,
            str(row["visual_tokens"]),
            f"{row['page_bytes']:,}",
            f"{row['first_token_seconds']:.3f}",
            f"{1000 * row['decode_seconds']:.2f}",
            f"{row['decode_ratio']:.2f} [{row['decode_quartiles'][0]:.2f}, {row['decode_quartiles'][1]:.2f}]",
        )
        for name, row in evidence.cost.items()
    ]
    return ["## Cost\n", COST_NOTE.format(media=NUM_MEDIA), *_table(head, rows), ""]
