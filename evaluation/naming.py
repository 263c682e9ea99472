"""Beyond taught words: names of known things in images never seen, captions of a set style, and text with no image.

Each beside what the same model says blind, for a name that is merely likely must not count as seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

import torch

from evaluation.binding import joined
from evaluation.ranking import Branch, Piece, Ranker
from model.batch import NO_CACHE, MediaPages, whole_sequences
from model.flamingo import Flamingo
from model.prompt import Segment
from model.reference import log_probs
from model.tokenizer import PromptTokenizer
from training.default.catalogue import Catalogue
from training.default.templates import Template, item
from training.examples import encode_segment

NAME, CAPTION = Template("This is a"), Template("Output:")
# a caption's style, and what an answer in it looks like
STYLES = (
    ("[{label}]", r"\[[^\]]+\]"),
    ('"{label}"', r'"[^"]+"'),
    ("I see a {label}.", r"I see an? [^.]+\."),
    ("{label}!", r"[^!]+!"),
    ("kind: thing; name: {label}", r"kind: [^;]+; name: .+"),
    ("** {label} **", r"\*\* .+ \*\*"),
)
MAX_ANSWER = 24


class Naming:
    def __init__(self, model: Flamingo, tokenizer: PromptTokenizer, catalogue: Catalogue) -> None:
        self.model, self.tokenizer, self.catalogue = model, tokenizer, catalogue
        self._dtype = next(model.resampler.parameters()).dtype

    def cases(self, count: int, ways: int, seed: int) -> list[tuple[int, list[str]]]:
        """An unseen image, and labels of which the first is its own."""
        labels = self.catalogue.unseen_images
        names = sorted(labels)
        out = []
        for number in range(count):
            rng = Random(f"{seed}/naming/{number}")
            label = rng.choice(names)
            others = rng.sample([name for name in names if name != label], ways - 1)
            out.append((rng.choice(labels[label]), [label, *others]))
        return out

    @torch.inference_mode()
    def is_named(self, row: int, labels: Sequence[str], *, caption: bool, blind: bool) -> bool:
        """By the mean log-probability of a token; a caption says more than the name."""
        template = CAPTION if caption else NAME
        page = -1 if blind else 0
        branches = []
        for label in labels:
            *query, answer, _ = item(row, template, f"a {label}" if caption else label)
            branches.append(Branch(0, self._piece(query, page), self._piece([answer], page)))
        scores = Ranker(self.model, self._media([row])).scores(Piece([], []), branches)
        means = [score / len(branch.candidate.token_ids) for score, branch in zip(scores, branches, strict=True)]
        return means.index(max(means)) == 0

    @torch.inference_mode()
    def keeps_style(self, number: int, seed: int) -> bool:
        """Two captions in a style, a third image: is the model's answer written like them?"""
        rng = Random(f"{seed}/style/{number}")
        style, pattern = STYLES[number % len(STYLES)]
        labels = rng.sample(sorted(self.catalogue.unseen_images), 3)
        rows = [rng.choice(self.catalogue.unseen_images[label]) for label in labels]
        shots = [
            self._piece(item(row, CAPTION, style.format(label=label)), page)
            for page, (row, label) in enumerate(zip(rows[:2], labels, strict=False))
        ]
        *query, _, _ = item(rows[2], CAPTION, "")
        prompt = joined([*shots, self._piece(query, 2)])
        return re.fullmatch(pattern, self._continued(prompt, rows).strip()) is not None

    def _continued(self, prompt: Piece, rows: Sequence[int]) -> str:
        media = self._media(rows)
        ids, pages = list(prompt.token_ids), list(prompt.pages)
        for _ in range(MAX_ANSWER):
            row = log_probs(self.model, ids, pages, media)[-1]
            row[list(self.tokenizer.suppressed_ids)] = -torch.inf
            best = int(row.argmax())
            if best in self.tokenizer.eos_ids:
                break
            ids.append(best)
            pages.append(pages[-1])
        return self.tokenizer.decode(ids[len(prompt.token_ids) :])

    def _media(self, rows: Sequence[int]) -> MediaPages:
        features = torch.stack([self.catalogue.features(row) for row in rows]).to(self._dtype)
        return self.model.fresh_media(self.model.resampler(features))

    def _piece(self, segments: Sequence[Segment], page: int) -> Piece:
        ids = [token for segment in segments for token in encode_segment(segment, self.tokenizer)]
        return Piece(ids, [page] * len(ids))


@torch.inference_mode()
def perplexity(model: Flamingo, token_ids: list[int]) -> float:
    """Of a text with no media in it."""
    batch = whole_sequences([token_ids], [[-1] * len(token_ids)])
    media = MediaPages.zeros(model.config, 0, next(model.resampler.parameters()).dtype, "cpu")
    rows = model(batch, NO_CACHE, media).float().log_softmax(-1)[:-1]
    return float(rows.gather(1, torch.tensor(token_ids[1:])[:, None]).mean().neg().exp())
