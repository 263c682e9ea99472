"""Before the whole language model is run: what the media token holds after a few layers shall be like the text's names.

An image's state behind the first gated layers is pulled to the state of its own label among all labels', and to that of
another image of the label; minutes of this save most of the time that binding would take to appear.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import whole_sequences
from model.flamingo import Flamingo
from model.tokenizer import PromptTokenizer
from training.batch import TrainingBatch
from training.bridge import BridgeLoss
from training.default.catalogue import Catalogue, digest
from training.default.discriminants import Discriminants
from training.default.similarity import similarity_loss
from training.default.states import BEFORE, DEPTH, early_states, media_states
from training.examples import Tokens
from training.mixture import Prepared

TEMPERATURE = 0.07


class Alignments:
    """The n-th image with the number of its label in the place of the token behind it; neighbours share a label."""

    def __init__(self, catalogue: Catalogue, tokenizer: PromptTokenizer, seed: int) -> None:
        self.catalogue, self._seed = catalogue, seed
        self.labels = sorted(catalogue.labels)
        self._prefix = [*tokenizer.encode_plain(BEFORE), tokenizer.media_token_id]

    def __call__(self, number: int) -> Prepared:
        label = Random(f"{self._seed}/label/{number // 2}").randrange(len(self.labels))
        pair = Random(f"{self._seed}/images/{number // 2}").sample(self.catalogue.labels[self.labels[label]], 2)
        media = digest(pair[number % 2])
        before = len(self._prefix) - 1
        tokens = Tokens(
            token_ids=[*self._prefix, label],
            media_index=[-1] * before + [0, 0],
            target=[False] * len(self._prefix) + [True],
            media=[media],
        )
        return Prepared(tokens, {media: self.catalogue.features(pair[number % 2])})


class AlignmentLoss(BridgeLoss):
    mean: Tensor
    scale: Tensor
    texts: Tensor

    def __init__(
        self,
        flamingo: Flamingo,
        label_ids: Sequence[Sequence[int]],
        prompt: Sequence[int],
        discriminants: Discriminants,
    ) -> None:
        super().__init__(flamingo)
        self.prompt, self.discriminants = prompt, discriminants
        texts = _label_states(flamingo, label_ids)  # [L, D]
        mean, scale = texts.mean(0), texts.std(0)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("texts", F.normalize((texts - mean) / scale, dim=-1), persistent=False)

    def forward(self, batch: TrainingBatch) -> Tensor:
        tokens = self.visual_tokens(batch.media)
        media = self.flamingo.fresh_media(tokens)
        states = early_states(self.flamingo, batch.batch, media)[batch.batch.last_token].float()
        images = F.normalize((states - self.mean) / self.scale, dim=-1)  # [W, D]
        to_text = F.cross_entropy(images @ self.texts.T / TEMPERATURE, batch.targets, reduction="sum")
        # the scale of the states too: later layers were trained on it
        near = F.smooth_l1_loss((states - self.mean) / self.scale, self.texts[batch.targets] * states.shape[1] ** 0.5)
        text = to_text + _to_each_other(images, batch.targets) + 2.0 * near * len(states)
        one_each = media_states(self.flamingo, media, self.prompt)
        return text + similarity_loss(batch, self.discriminants, tokens.mean(1), one_each)


def _to_each_other(images: Tensor, labels: Tensor) -> Tensor:
    """Each image to the others of its label, among all images of the batch."""
    alike = (labels[:, None] == labels).fill_diagonal_(False)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    scores = (images @ images.T / TEMPERATURE).masked_fill(itself, float("-inf")).log_softmax(-1)
    found = scores.masked_fill(~alike, 0.0).sum(-1) / alike.sum(-1).clamp(min=1)
    return -found.sum()


@torch.no_grad()
def _label_states(model: Flamingo, label_ids: Sequence[Sequence[int]]) -> Tensor:
    """The frozen model's state at each label's last token, no media read and no gated layer run."""
    decoder = model.language_model
    states = []
    for first in range(0, len(label_ids), 64):
        ids = [list(one) for one in label_ids[first : first + 64]]
        batch = whole_sequences(ids, [[-1] * len(one) for one in ids], decoder.embed.weight.device)
        x = F.embedding(batch.token_ids, decoder.embed.weight)  # names hold no new token
        step = decoder.step_context(batch, x.dtype)
        for layer in list(decoder.layers)[:DEPTH]:
            x = layer(x, step, None)
        states.append(x[batch.query_starts[1:].long() - 1].float())
    return torch.cat(states)


def label_ids(labels: Sequence[str], tokenizer: PromptTokenizer) -> list[list[int]]:
    return [tokenizer.encode_plain(f"{BEFORE}{label}") for label in labels]
