"""Measures naming: known labels in held-out images, captions in a given style, and the perplexity of text.

Results are compared with those without the image, because a name that is merely likely must not count as recognised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

import torch

from evaluation.ranking import Branch, PagedTokens, Ranker, concatenate, encode_segments
from model.batch import NO_CACHE, MediaPages, whole_sequences
from model.flamingo import Flamingo
from model.prompt import PromptTokenizer
from model.reference import log_probs
from training.default.catalogue import Catalogue
from training.default.templates import Template, item

NAME, CAPTION = Template("This is a"), Template("Output:")
# a caption style, and the pattern of captions in that style
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
        """Draw held-out images (rows), each with `ways` candidate labels, of which the first is correct."""
        rows_by_label = self.catalogue.unseen_images
        names = sorted(rows_by_label)
        cases = []
        for number in range(count):
            rng = Random(f"{seed}/naming/{number}")
            label = rng.choice(names)
            wrong_labels = rng.sample([name for name in names if name != label], ways - 1)
            cases.append((rng.choice(rows_by_label[label]), [label, *wrong_labels]))
        return cases

    @torch.inference_mode()
    def is_named(self, row: int, labels: Sequence[str], *, caption: bool, blind: bool) -> bool:
        """Return whether the first label has the highest mean log-probability per token, as a name or in a caption."""
        template = CAPTION if caption else NAME
        page = -1 if blind else 0
        branches = []
        for label in labels:
            *query, answer, _ = item(row, template, f"a {label}" if caption else label)
            candidate = encode_segments([answer], self.tokenizer, page)
            branches.append(Branch(0, encode_segments(query, self.tokenizer, page), candidate))
        scores = Ranker(self.model, self._media([row])).scores([], branches)
        means = [score / len(branch.candidate.token_ids) for score, branch in zip(scores, branches, strict=True)]
        return means.index(max(means)) == 0

    @torch.inference_mode()
    def keeps_style(self, number: int, seed: int) -> bool:
        """Return whether the model captions a third image in the style of two captioned images."""
        rng = Random(f"{seed}/style/{number}")
        style, pattern = STYLES[number % len(STYLES)]
        labels = rng.sample(sorted(self.catalogue.unseen_images), 3)
        rows = [rng.choice(self.catalogue.unseen_images[label]) for label in labels]
        shots = [
            encode_segments(item(row, CAPTION, style.format(label=label)), self.tokenizer, page)
            for page, (row, label) in enumerate(zip(rows[:2], labels, strict=False))
        ]
        *query, _, _ = item(rows[2], CAPTION, "")
        prompt = concatenate([*shots, encode_segments(query, self.tokenizer, 2)])
        return re.fullmatch(pattern, self._generate(prompt, rows).strip()) is not None

    def _generate(self, prompt: PagedTokens, rows: Sequence[int]) -> str:
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
        return self.model.fresh_media(self.model.resampler(self.model.vision.with_kin(features)))


@torch.inference_mode()
def perplexity(model: Flamingo, token_ids: list[int]) -> float:
    """Return the perplexity of a text without media."""
    batch = whole_sequences([token_ids], [[-1] * len(token_ids)])
    media = MediaPages.zeros(model.config, 0, next(model.resampler.parameters()).dtype, "cpu")
    rows = model(batch, NO_CACHE, media).float().log_softmax(-1)[:-1]
    return float(rows.gather(1, torch.tensor(token_ids[1:])[:, None]).mean().neg().exp())
