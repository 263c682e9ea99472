"""The comparing itself: where the frozen decoder looks a name up, it shall find the images that are like the one at hand.

In front of a name, some heads of a language model look at the names before it, above all its induction heads (Olsson et
al., 2022): they find what followed when the same stood there, and say it again. Here an image stands there. What they ask
shall find the names whose images are as alike as the features' discriminants have it; no label is needed for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch, MediaPages, whole_sequences
from model.config import ConfigError
from model.flamingo import Flamingo
from model.language_model import LanguageModel, Layer, StepContext
from model.tokenizer import PromptTokenizer
from training.batch import TrainingBatch
from training.bridge import BridgeLoss
from training.default.discriminants import Discriminants
from training.default.episodes import LIMITS, Item, as_example
from training.default.similarity import cosines, similarity_loss, wanted_of
from training.default.states import media_states
from training.default.templates import ANSWERS
from training.default.words import vocabularies
from training.examples import Tokens, tokenize

EACH, TOGETHER, SAID = 1.0, 2.0, 2.0  # beside a target's loss; the first two in a sequence, and again across them
TEMPERATURE = 0.05  # the sharper, the less of what is said is the frozen model's own liking for a word
# of the probe: so many sequences, of so many words; a head counts with so much of its attention on the names before
COUNT, NUM_WORDS, SEED = 16, 5, 0
LEAST = 0.25
NEVER, FAINTEST = -1e9, 1e-6

Heads = Mapping[int, Tensor]  # layer -> numbers of its heads


class TextAndMatchingLoss(BridgeLoss):
    """The text's, the similarities' (`training/default/similarity.py`), and the comparing's: each head by itself, and all
    of them by their mean score, for what one can not tell apart, another shall. And what is said in the end: a word is
    as likely as the images that it named are alike, and no word by itself.

    For sets whose media are cached features. `prompt` shows one image (`one_image`); by `sequences` heads are found
    (`probe`)."""

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
            raise ConfigError("objective text_and_matching reads queries and keys as they are: no ALiBi decoder")
        self.heads = name_heads(flamingo.language_model, sequences)
        if not self.heads:
            raise ConfigError("objective text_and_matching: no head of this language model looks at the names before")

    def forward(self, batch: TrainingBatch) -> Tensor:
        model = self.flamingo
        tokens = self.visual_tokens(batch.media)  # [M, R, D]
        media = model.fresh_media(tokens)
        states = media_states(model, media, self.prompt)
        x, scores = read(model, batch, media, self.heads)
        logits = model.language_model.logits(x[batch.batch.last_token])
        text = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
        alike = similarity_loss(batch, self.discriminants, tokens.mean(1), states)
        return text + alike + batch.num_targets * self._unlike(batch, x, scores)

    def _unlike(self, batch: TrainingBatch, x: Tensor, scores: Tensor) -> Tensor:
        """How far from the images' likeness what is looked up is, and what is said."""
        pages = pages_of(batch)
        wanted, seen = self._wanted(batch, pages), names_before(batch)
        choices = torch.stack([seen, names_nearer_the_start(batch, pages)])
        each = mismatch(scores[:, None], wanted, choices).mean(0)
        together = mismatch(scores.mean(0), wanted, choices)
        words = batch.batch.token_ids[batch.names]
        said = self.flamingo.language_model.logits_of(x[batch.names - 1], words)
        return (EACH * each + TOGETHER * together).sum() + SAID * mismatch(*by_word(said, wanted, seen, words), seen)

    def _wanted(self, batch: TrainingBatch, pages: Tensor) -> Tensor:
        """[N, N]: the log-odds with which the images of two names are alike."""
        return cosines(wanted_of(batch, self.discriminants))[pages][:, pages] / TEMPERATURE


def read(model: Flamingo, batch: TrainingBatch, media: MediaPages, heads: Heads) -> tuple[Tensor, Tensor]:
    """[T, D] behind the decoder, and the scores [heads, N, N] of each name for what is asked in front of each."""
    decoder, packed = model.language_model, batch.batch
    step = decoder.step_context(packed, media.pages.dtype)
    scores = []

    def look(number: int, layer: Layer, x: Tensor) -> None:
        if number in heads:
            query = query_and_key(layer, x, step, batch.names - 1)[0]
            key = query_and_key(layer, x, step, batch.names)[1]
            scores.append(scores_of(query[:, heads[number]], key[:, heads[number]]))

    return run(model, packed, media, step, look), torch.cat(scores)


def run(
    model: Flamingo, batch: Batch, media: MediaPages, step: StepContext, look: Callable[[int, Layer, Tensor], None]
) -> Tensor:
    """[T, D] behind the decoder, as `Flamingo.forward`; `look` is shown what each layer reads."""
    x = model.language_model.embed_tokens(batch)
    for i, gated, layer in model.layers():
        if gated is not None:
            x = gated(x, media.layer(i), batch.media_slot)
        assert isinstance(layer, Layer)
        look(i, layer, x)
        x = layer(x, step, None)
    return x


def query_and_key(layer: Layer, x: Tensor, step: StepContext, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of some rows of what the layer reads [T, D]: [N, H, K] each, a group's key repeated for each of its queries."""
    if step.cos is not None and step.sin is not None:
        step = step._replace(cos=step.cos[rows], sin=step.sin[rows])
    query, key, _ = layer.attention.project(layer.attention_norm(x[rows]), step)
    return query, key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def scores_of(query: Tensor, key: Tensor) -> Tensor:  # [.., N, H, K] each -> [.., H, N, N]
    return torch.einsum("...qhk,...nhk->...hqn", query.float(), key.float()) * query.shape[-1] ** -0.5


def names_before(batch: TrainingBatch) -> Tensor:
    """[N, N]: whether the second of two names stands before the first one in the same sequence."""
    sequence = torch.bucketize(batch.names, batch.batch.query_starts.long(), right=True)
    return (sequence[:, None] == sequence) & (batch.names[:, None] > batch.names)


def names_nearer_the_start(batch: TrainingBatch, pages: Tensor) -> Tensor:
    """[N, N]: whether the second of two names is another image's and stands at an earlier place than the first one, of any
    sequence: many more comparisons than a sequence has, of the same queries and keys."""
    place = batch.batch.positions[batch.names]
    return (place[:, None] > place) & (pages[:, None] != pages)


def pages_of(batch: TrainingBatch) -> Tensor:  # [N], the image of each name
    assert batch.batch.media_slot is not None
    return batch.batch.media_slot[batch.names].long()


def mismatch(scores: Tensor, wanted: Tensor, seen: Tensor) -> Tensor:
    """The mean divergence of where queries look among the names that they have `seen` [.., N, N], as `scores` [.., N, N]
    have it, from `wanted` [N, N] (log-odds both): [..]. A query with no choice does not count."""
    found = scores.masked_fill(~seen, NEVER).log_softmax(-1)
    target = wanted.masked_fill(~seen, NEVER).log_softmax(-1)
    apart = (target.exp() * (target - found)).sum(-1)  # [.., N]
    chooses = (seen.sum(-1) > 1).float()
    return (apart * chooses).sum(-1) / chooses.sum(-1).clamp(min=1.0)


def probe(tokenizer: PromptTokenizer) -> list[Tokens]:
    """Sequences of names that have all stood there before, in every form of a prompt."""
    rng, known = Random(SEED), vocabularies(tokenizer)
    made = []
    for number in range(COUNT):
        words = rng.sample(known[number % 2], NUM_WORDS)
        template = rng.choice(ANSWERS)
        shown = [Item(0, word, True, template) for word in [*words, *rng.choices(words, k=NUM_WORDS)]]
        made.append(tokenize(as_example(f"probe {number}", shown), tokenizer, LIMITS, rng))
    return made


def by_word(said: Tensor, wanted: Tensor, seen: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds of names [N, N] each, where names of a word [N] share alike what is said of it, and what is wanted."""
    same = (words[:, None] == words).float()
    shared = (seen.float() @ same).clamp(min=1.0).log()
    of_word = wanted.masked_fill(~seen, NEVER).softmax(-1) @ same
    return said - shared, of_word.clamp(min=FAINTEST).log() - shared


@torch.no_grad()
def name_heads(decoder: LanguageModel, sequences: Sequence[Tokens]) -> dict[int, Tensor]:
    """Who looks at the names before, where one is to be said: by their text alone, no media read and no gated layer run."""
    ids = [one.token_ids for one in sequences]
    batch = whole_sequences(ids, [[-1] * len(one) for one in ids], decoder.embed.weight.device)
    x = decoder.embed_tokens(batch).to(decoder.embed.weight.dtype)
    step = decoder.step_context(batch, x.dtype)
    found = {}
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        share = _looks_at_names(layer, x, step, batch.query_starts.tolist(), sequences)
        if len(heads := (share > LEAST).nonzero().squeeze(1)):
            found[i] = heads
        x = layer(x, step, None)
    return found


def _looks_at_names(
    layer: Layer, x: Tensor, step: StepContext, starts: Sequence[int], sequences: Sequence[Tokens]
) -> Tensor:
    """[H]: the mean attention that lies on names, of the places in front of the second half of them."""
    shares = []
    for first, one in zip(starts, sequences, strict=False):
        rows = torch.arange(first, first + len(one.token_ids), device=x.device)
        scores = scores_of(*query_and_key(layer, x, step, rows))  # [H, T, T]
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        attention = scores.masked_fill(later, float("-inf")).softmax(-1)
        asked = torch.tensor(one.names[len(one.names) // 2 :], device=x.device) - 1
        shares.append(attention[:, asked][:, :, list(one.names)].sum(-1).mean(-1))
    return torch.stack(shares).mean(0)
