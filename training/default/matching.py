"""The matching loss trains the comparison of images: heads that look up names should find the names of similar images.

Before a name, some heads of a language model attend to earlier names, above all its induction heads (Olsson et al., 2022):
they find what followed an earlier occurrence of the current tokens, and repeat it. Here the current tokens end with an
image. The loss trains the heads' queries and keys to match names in proportion to the similarity of their images'
discriminants, which needs no label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch, MediaPages, whole_sequences
from model.config import ConfigError
from model.flamingo import Flamingo
from model.language_model import LanguageModel, Layer, StepContext
from model.prompt import PromptTokenizer
from training.batch import TrainingBatch
from training.bridge import BridgeLoss
from training.default.discriminants import Discriminants
from training.default.episodes import LIMITS, Item, build_example
from training.default.similarity import cosines, similarity_loss, target_discriminants
from training.default.states import media_states
from training.default.templates import ANSWERS
from training.default.words import vocabularies
from training.examples import Tokens, tokenize

# relative to a target's loss; the first two apply within sequences and again across them
HEAD_WEIGHT, MEAN_HEAD_WEIGHT, WORD_WEIGHT = 1.0, 2.0, 2.0
TEMPERATURE = 0.05  # a lower temperature reduces the frozen model's own preference for some words
# the probe's size, and the minimum share of a head's attention on earlier names for the head to count
NUM_SEQUENCES, NUM_WORDS, SEED = 16, 5, 0
MIN_ATTENTION = 0.25
MASKED, MIN_PROBABILITY = -1e9, 1e-6

Heads = Mapping[int, Tensor]  # layer -> indices of its heads


class TextAndMatchingLoss(BridgeLoss):
    """The sum of the text loss, the similarity loss (`training/default/similarity.py`) and the matching loss.

    The matching loss has three parts: each head by itself; all heads by their mean score, because one head may distinguish
    what another cannot; and the predicted word, whose probability should follow the similarity of the images that it named
    rather than the word's own frequency.

    It accepts sets whose media are cached features. `prompt` shows one image (`single_image_prompt`), and `sequences` find
    the heads (`probe_sequences`). Raises ConfigError for a decoder with ALiBi or without such heads.
    """

    def __init__(
        self,
        flamingo: Flamingo,
        prompt: Sequence[int],
        discriminants: Discriminants,
        sequences: Sequence[Tokens],
    ) -> None:
        super().__init__(flamingo)
        self.prompt, self.discriminants = prompt, discriminants
        if flamingo.config.language_model.position == "alibi":
            raise ConfigError("objective text_and_matching does not support a language model with ALiBi positions")
        self.heads = find_name_heads(flamingo.language_model, sequences)
        if not self.heads:
            raise ConfigError("objective text_and_matching: no head of this language model attends to earlier names")

    def forward(self, batch: TrainingBatch) -> Tensor:
        model, batch = self.flamingo, replace(batch, media=self.features(batch.media))
        tokens = self.visual_tokens(batch.media)  # [M, R, D]
        media = model.fresh_media(tokens)
        states = media_states(model, media, self.prompt)
        x, scores = forward_with_scores(model, batch, media, self.heads)
        logits = model.language_model.logits(x[batch.batch.last_token])
        text = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
        similarity = similarity_loss(batch, self.discriminants, tokens.mean(1), states)
        return text + similarity + batch.num_targets * self._matching_loss(batch, x, scores)

    def _matching_loss(self, batch: TrainingBatch, x: Tensor, scores: Tensor) -> Tensor:
        """Return the divergence of the heads' attention and of the predicted words from the images' similarity."""
        pages = name_pages(batch)
        target, visible = self._target_log_odds(batch, pages), earlier_names_in_sequence(batch)
        choices = torch.stack([visible, earlier_names_in_batch(batch, pages)])
        per_head = mismatch(scores[:, None], target, choices).mean(0)
        mean_head = mismatch(scores.mean(0), target, choices)
        words = batch.batch.token_ids[batch.names]
        logits = self.flamingo.language_model.logits_of(x[batch.names - 1], words)
        word = mismatch(*log_odds_by_word(logits, target, visible, words), visible)
        return (HEAD_WEIGHT * per_head + MEAN_HEAD_WEIGHT * mean_head).sum() + WORD_WEIGHT * word

    def _target_log_odds(self, batch: TrainingBatch, pages: Tensor) -> Tensor:
        """Return the log-odds [N, N] with which one name's query should find another: their images' similarity."""
        return cosines(target_discriminants(batch, self.discriminants))[pages][:, pages] / TEMPERATURE


def forward_with_scores(
    model: Flamingo, batch: TrainingBatch, media: MediaPages, heads: Heads
) -> tuple[Tensor, Tensor]:
    """Return the states [T, D] after the decoder, and the heads' attention scores [heads, N, N] between names.

    The query of a name is that of the token before it, the key that of its first token.
    """
    decoder, packed = model.language_model, batch.batch
    context = decoder.step_context(packed, media.pages.dtype)
    seen = decoder.step_context(replace(packed, positions=packed.seen_positions), media.pages.dtype)
    scores = []

    def observe(number: int, layer: Layer, x: Tensor) -> None:
        if number in heads:
            query = query_and_key(layer, x, context, batch.names - 1)[0]
            key = query_and_key(layer, x, seen, batch.names)[1]
            scores.append(attention_scores(query[:, heads[number]], key[:, heads[number]]))

    return run_decoder(model, packed, media, context, observe), torch.cat(scores)


def run_decoder(
    model: Flamingo,
    batch: Batch,
    media: MediaPages,
    context: StepContext,
    observe: Callable[[int, Layer, Tensor], None],
) -> Tensor:
    """Return the states [T, D] after the decoder, as in `Flamingo.forward`; `observe` receives each layer's input."""
    x = model.language_model.embed_tokens(batch)
    for i, gated, layer in model.layers():
        if gated is not None:
            x = gated(x, media.layer(i), batch.media_slot)
        assert isinstance(layer, Layer)
        observe(i, layer, x)
        x = layer(x, context, None)
    return x


def query_and_key(layer: Layer, x: Tensor, context: StepContext, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys [N, H, K] of `rows` of a layer's input [T, D]; a group's key is repeated per query head."""
    if context.cos is not None and context.sin is not None:
        context = context._replace(cos=context.cos[rows], sin=context.sin[rows])
    query, key, _ = layer.attention.project(layer.attention_norm(x[rows]), context)
    return query, key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def attention_scores(query: Tensor, key: Tensor) -> Tensor:  # [.., N, H, K] each -> [.., H, N, N]
    return torch.einsum("...qhk,...nhk->...hqn", query.float(), key.float()) * query.shape[-1] ** -0.5


def earlier_names_in_sequence(batch: TrainingBatch) -> Tensor:
    """Return a mask [N, N] that is true where the first name's query reads the second name, in the same sequence."""
    sequence = torch.bucketize(batch.names, batch.batch.query_starts.long(), right=True)
    is_earlier = (sequence[:, None] == sequence) & (batch.names[:, None] > batch.names)
    if batch.batch.spans is None:
        return is_earlier
    spans = batch.batch.spans[batch.names]
    return is_earlier & ((spans == 0) | ((spans[:, None] < 0) & (spans > 0)))


def earlier_names_in_batch(batch: TrainingBatch, pages: Tensor) -> Tensor:
    """Return a mask [N, N] that is true where the second name belongs to another image and has a smaller position.

    The names may be in different sequences, which gives many more comparisons of the same queries and keys.
    """
    positions, seen = batch.batch.positions[batch.names], batch.batch.seen_positions[batch.names]
    return (positions[:, None] > seen) & (pages[:, None] != pages)


def name_pages(batch: TrainingBatch) -> Tensor:  # [N], the image of each name
    assert batch.batch.media_slot is not None
    return batch.batch.media_slot[batch.names].long()


def mismatch(scores: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Return the mean divergence [..] of the distribution over `visible` names from the target distribution.

    `scores` [.., N, N] and `target` [N, N] are log-odds of each query's choice, `visible` [.., N, N] masks the choices. A
    query with fewer than two choices does not count.
    """
    log_probs = scores.masked_fill(~visible, MASKED).log_softmax(-1)
    target_log_probs = target.masked_fill(~visible, MASKED).log_softmax(-1)
    divergence = (target_log_probs.exp() * (target_log_probs - log_probs)).sum(-1)  # [.., N]
    has_choice = (visible.sum(-1) > 1).float()
    return (divergence * has_choice).sum(-1) / has_choice.sum(-1).clamp(min=1.0)


def probe_sequences(tokenizer: PromptTokenizer) -> list[Tokens]:
    """Return sequences whose second half repeats names of the first, in every form of a prompt."""
    rng, words_by_kind = Random(SEED), vocabularies(tokenizer)
    limits = replace(LIMITS, max_media=2 * NUM_WORDS)
    sequences = []
    for number in range(NUM_SEQUENCES):
        words = rng.sample(words_by_kind[number % 2], NUM_WORDS)
        template = rng.choice(ANSWERS)
        items = [Item(0, word, True, template) for word in [*words, *rng.choices(words, k=NUM_WORDS)]]
        sequences.append(tokenize(build_example(f"probe {number}", items), tokenizer, limits, rng))
    return sequences


def log_odds_by_word(logits: Tensor, target: Tensor, visible: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return predicted and target log-odds [N, N] of names, with a word's share divided equally among its names.

    `logits` and `target` are [N, N], `words` [N] holds each name's word.
    """
    same_word = (words[:, None] == words).float()
    log_num_names = (visible.float() @ same_word).clamp(min=1.0).log()
    word_target = target.masked_fill(~visible, MASKED).softmax(-1) @ same_word
    return logits - log_num_names, word_target.clamp(min=MIN_PROBABILITY).log() - log_num_names


@torch.no_grad()
def find_name_heads(decoder: LanguageModel, sequences: Sequence[Tokens]) -> dict[int, Tensor]:
    """Return the heads by layer that attend to earlier names before a name, on text alone: no media, no gated layers."""
    ids = [sequence.token_ids for sequence in sequences]
    batch = whole_sequences(ids, [[-1] * len(sequence) for sequence in ids], decoder.embed.weight.device)
    x = decoder.embed_tokens(batch).to(decoder.embed.weight.dtype)
    context = decoder.step_context(batch, x.dtype)
    heads = {}
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        attention = _attention_on_names(layer, x, context, batch.query_starts.tolist(), sequences)
        if len(indices := (attention > MIN_ATTENTION).nonzero().squeeze(1)):
            heads[i] = indices
        x = layer(x, context, None)
    return heads


def _attention_on_names(
    layer: Layer, x: Tensor, context: StepContext, starts: Sequence[int], sequences: Sequence[Tokens]
) -> Tensor:
    """Return each head's mean attention [H] on names, at the positions before the second half of the names."""
    shares = []
    for first, sequence in zip(starts, sequences, strict=False):
        rows = torch.arange(first, first + len(sequence.token_ids), device=x.device)
        scores = attention_scores(*query_and_key(layer, x, context, rows))  # [H, T, T]
        is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        attention = scores.masked_fill(is_later, float("-inf")).softmax(-1)
        queries = torch.tensor(sequence.names[len(sequence.names) // 2 :], device=x.device) - 1
        shares.append(attention[:, queries][:, :, list(sequence.names)].sum(-1).mean(-1))
    return torch.stack(shares).mean(0)
