"""The alignment stage trains the media token's state after a few layers to resemble the states of the label's text.

Two contrastive losses pull an image's state after the first gated layers to its label's state among all labels' states, and
to the states of other images of the label. Only the first layers of the language model run. Minutes of this stage save most
of the time until the model learns words from its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import whole_sequences
from model.flamingo import Flamingo
from model.prompt import PromptTokenizer
from training.batch import TrainingBatch
from training.bridge import BridgeLoss
from training.default.catalogue import Catalogue, row_digest
from training.default.discriminants import Discriminants
from training.default.similarity import similarity_loss
from training.default.states import NUM_LAYERS, PREFIX, early_states, media_states
from training.examples import Tokens
from training.mixture import PreparedExample

TEMPERATURE = 0.07
# share of the pairs, if the catalogue has images of classes: a larger share makes the names of drawings worse
CLASS_SHARE = 0.25


class AlignmentPairs:
    """The n-th image, followed by its label's number in place of a token; images 2k and 2k + 1 share a label."""

    def __init__(self, catalogue: Catalogue, tokenizer: PromptTokenizer, seed: int) -> None:
        self.catalogue, self._seed = catalogue, seed
        self.labels = sorted(catalogue.named)
        self._prefix = [*tokenizer.encode_plain(PREFIX), tokenizer.media_token_id]

    def __call__(self, number: int) -> PreparedExample:
        rng = Random(f"{self._seed}/label/{number // 2}")
        classes = self.catalogue.class_images
        images = classes if classes and rng.random() < CLASS_SHARE else self.catalogue.labels
        label = rng.choice(sorted(images))
        pair = rng.sample(images[label], 2)
        media = row_digest(pair[number % 2])
        num_before = len(self._prefix) - 1
        tokens = Tokens(
            token_ids=[*self._prefix, self.labels.index(label)],
            media_index=[-1] * num_before + [0, 0],
            target=[False] * len(self._prefix) + [True],
            media=[media],
        )
        return PreparedExample(tokens, {media: self.catalogue.features(pair[number % 2])})


class AlignmentLoss(BridgeLoss):
    """The alignment stage's loss, for batches of `AlignmentPairs`; the labels' states are computed once."""

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
        batch = replace(batch, media=self.features(batch.media))
        tokens = self.visual_tokens(batch.media)
        media = self.flamingo.fresh_media(tokens)
        states = early_states(self.flamingo, batch.batch, media)[batch.batch.last_token].float()
        images = F.normalize((states - self.mean) / self.scale, dim=-1)  # [W, D]
        to_text = F.cross_entropy(images @ self.texts.T / TEMPERATURE, batch.targets, reduction="sum")
        # the states' scale is trained too, since later layers were trained on it
        distance = F.smooth_l1_loss(
            (states - self.mean) / self.scale, self.texts[batch.targets] * states.shape[1] ** 0.5
        )
        text = to_text + _image_to_image_loss(images, batch.targets) + 2.0 * distance * len(states)
        image_states = media_states(self.flamingo, media, self.prompt)
        return text + similarity_loss(batch, self.discriminants, tokens.mean(1), image_states)


def _image_to_image_loss(images: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of finding the other images of an image's label among all images of the batch."""
    same_label = (labels[:, None] == labels).fill_diagonal_(False)
    diagonal = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_probs = (images @ images.T / TEMPERATURE).masked_fill(diagonal, float("-inf")).log_softmax(-1)
    means = log_probs.masked_fill(~same_label, 0.0).sum(-1) / same_label.sum(-1).clamp(min=1)
    return -means.sum()


@torch.no_grad()
def _label_states(model: Flamingo, label_ids: Sequence[Sequence[int]]) -> Tensor:
    """Return the frozen model's states [L, D] at the labels' last tokens, without media or gated layers."""
    decoder = model.language_model
    states = []
    for first in range(0, len(label_ids), 64):
        ids = [list(label) for label in label_ids[first : first + 64]]
        batch = whole_sequences(ids, [[-1] * len(label) for label in ids], decoder.embed.weight.device)
        x = F.embedding(batch.token_ids, decoder.embed.weight)  # labels contain no new token
        context = decoder.step_context(batch, x.dtype)
        for layer in list(decoder.layers)[:NUM_LAYERS]:
            x = layer(x, context, None)
        states.append(x[batch.query_starts[1:].long() - 1].float())
    return torch.cat(states)


def encode_labels(labels: Sequence[str], tokenizer: PromptTokenizer) -> list[list[int]]:
    return [tokenizer.encode_plain(f"{PREFIX}{label}") for label in labels]
