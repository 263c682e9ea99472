"""Episodes are sequences that teach a model to learn from its prompt; the n-th episode depends on its number alone.

The sequences of a step draw from one small pool of images, so each image is encoded once and shown in many prompts, as in
serving. Novel words are targets only after the prompt has taught them; real names, categories, captions and answers are
always targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from torch import Tensor

from model.prompt import PromptTokenizer, Segment
from training.default.catalogue import Catalogue, row_of
from training.default.discriminants import Discriminants, random_domain
from training.default.templates import ANSWERS, CAPTIONS, KIND_QUESTION, YES_NO_QUESTION, Template, item
from training.default.views import random_view
from training.default.words import vocabularies
from training.examples import Example, Limits, tokenize
from training.mixture import PreparedExample

MAX_SHOTS = 10
POOL_LABELS, POOL_IMAGES = 10, 4
LIMITS = Limits(max_tokens=320, max_media=MAX_SHOTS)


@dataclass(frozen=True, slots=True)
class Pool:
    """The images of a step, by label and by category.

    Half of the labels belong to one category, so that distinguishing them requires the image.
    """

    images: dict[str, list[int]]
    categories: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a sequence with its text."""

    row: int
    answer: str
    is_learned: bool
    template: Template
    is_name: bool = True  # whether the answer names the image, rather than being a caption or yes or no


Maker = Callable[["Episodes", Pool, Random], list[Item]]


class Episodes:
    """`Episodes(...)(n)` is the n-th sequence.

    With `discriminants`, sequences teach novel words only, and every step moves the images to another generated domain
    (`random_domain`). The model can then not learn the images' names, only which images are alike, in any direction.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tokenizer: PromptTokenizer,
        seed: int,
        per_pool: int,
        discriminants: Discriminants | None = None,
        strangeness: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        self.catalogue = catalogue
        self._tokenizer, self._seed, self._per_pool = tokenizer, seed, per_pool
        self._discriminants, self._strangeness, self._noise = discriminants, strangeness, noise
        self._vocabularies = vocabularies(tokenizer)
        self._kinds: dict[str, set[str]] = {}
        for label, rows in catalogue.labels.items():
            self._kinds.setdefault(catalogue.records[rows[0]].category, set()).add(label)

    def __call__(self, number: int) -> PreparedExample:
        step = number // self._per_pool
        pool = self.pool(Random(f"{self._seed}/pool/{step}"))
        rng = Random(f"{self._seed}/sequence/{number}")
        makers = [(maker, share) for maker, share in MAKERS if maker in NOVEL_MAKERS or self._discriminants is None]
        make = rng.choices([maker for maker, _ in makers], [share for _, share in makers])[0]
        example = build_example(f"{make.__name__}/{number}", make(self, pool, rng))
        tokens = tokenize(example, self._tokenizer, LIMITS, rng)
        return PreparedExample(tokens, {media: self._view(row_of(media), step) for media in tokens.media})

    def words(self, count: int, rng: Random) -> list[str]:
        """Draw words without a meaning that helps: all of them invented, or all of them common words."""
        return rng.sample(rng.choice(self._vocabularies), count)

    def _view(self, row: int, step: int) -> Tensor:
        """Return an image's features as all sequences of the step show them; the next step shows another view."""
        features = random_view(self.catalogue.features(row), Random(f"{self._seed}/view/{step}/{row}"))
        if self._discriminants is None:
            return features
        domain_seed = Random(f"{self._seed}/domain/{step}").getrandbits(63)
        domain = random_domain(len(self._discriminants.directions), self._strangeness, self._noise, domain_seed)
        noise_seed = Random(f"{self._seed}/noise/{step}/{row}").getrandbits(63)
        return self._discriminants.move_to_domain(features.float(), domain, noise_seed)

    def pool(self, rng: Random) -> Pool:
        labels = self.catalogue.labels
        kind = rng.choice(sorted(kind for kind, members in self._kinds.items() if len(members) >= POOL_LABELS // 2))
        same_kind = rng.sample(sorted(self._kinds[kind]), POOL_LABELS // 2)
        rest = rng.sample(sorted(labels.keys() - set(same_kind)), POOL_LABELS - len(same_kind))
        images = {name: rng.sample(labels[name], min(POOL_IMAGES, len(labels[name]))) for name in same_kind + rest}
        categories: dict[str, list[int]] = {}
        for name in rng.sample(sorted(self.catalogue.categories), 4):
            categories[name] = rng.sample(self.catalogue.categories[name], 3)
        return Pool(images, categories)


def build_example(name: str, items: list[Item]) -> Example:
    segments: list[Segment] = []
    answers: set[int] = set()
    names: set[int] = set()
    for entry in items:
        segments += item(entry.row, entry.template, entry.answer)
        names |= {len(segments) - 2} if entry.is_name else set()
        if entry.is_learned:
            answers |= {len(segments) - 2, len(segments) - 1}
    return Example(name=name, segments=tuple(segments), answers=frozenset(answers), names=frozenset(names))


def draw_images(names: dict[str, str], images: dict[str, list[int]], rng: Random) -> list[tuple[int, str, bool]]:
    """Draw up to `MAX_SHOTS` images of the labels in `names`, in random order.

    Returns for each its row, its name, and whether the name occurred before.
    """
    rows = [(row, names[label]) for label in names for row in images[label]]
    rng.shuffle(rows)
    seen_names: set[str] = set()
    shots = []
    for row, name in rows[:MAX_SHOTS]:
        shots.append((row, name, name in seen_names))
        seen_names.add(name)
    return shots


def _assign_words(images: dict[str, list[int]], words: list[str], rng: Random) -> list[Item]:
    labels = rng.sample(sorted(images), len(words))
    template = rng.choice(ANSWERS)
    shots = draw_images(dict(zip(labels, words, strict=True)), images, rng)
    return [Item(row, word, is_known, template) for row, word, is_known in shots]


def novel_words(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    return _assign_words(pool.images, self.words(rng.randint(2, 5), rng), rng)


def novel_categories(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """Assign words to categories, whose images have different labels as a rule."""
    return _assign_words(pool.categories, self.words(rng.randint(2, 4), rng), rng)


def real_names(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """Use real names, each for several images: the first from the image alone, the others from the prompt as well."""
    labels = rng.sample(sorted(pool.images), rng.randint(2, 4))
    template = rng.choice(ANSWERS)
    shots = draw_images({label: label for label in labels}, pool.images, rng)
    return [Item(row, name, True, template) for row, name, _ in shots]


def naming(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """Use real names, each for one image."""
    labels = rng.sample(sorted(pool.images), 7)
    template = rng.choice(ANSWERS)
    return [Item(rng.choice(pool.images[label]), label, True, template) for label in labels]


def captions(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """Use one caption style per sequence: the first caption sets it, and the others are targets."""
    style, template = rng.choice(CAPTIONS), rng.choice((Template("Output:"), Template(""), Template("Caption:", "\n")))
    items = []
    for i, label in enumerate(rng.sample(sorted(pool.images), 5)):
        row = rng.choice(pool.images[label])
        record = self.catalogue.records[row]
        tag = record.tags[0] if record.tags else record.category
        text = style.format(label=label, style=record.style, category=record.category, tag=tag)
        items.append(Item(row, text, i > 0, template, is_name=False))
    return items


def kinds(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    names = sorted(pool.categories)
    rows = rng.sample([(row, name) for name in names for row in pool.categories[name]], 7)
    template = Template(KIND_QUESTION) if rng.random() < 0.5 else Template("Category:")
    return [Item(row, name, True, template) for row, name in rows]


def yes_no(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    items = []
    labels = sorted(pool.images)
    for label in rng.sample(labels, 6):
        question_label = label if rng.random() < 0.5 else rng.choice(labels)
        template = Template(YES_NO_QUESTION.format(label=question_label))
        answer = "yes" if question_label == label else "no"
        items.append(Item(rng.choice(pool.images[label]), answer, True, template, is_name=False))
    return items


# the kinds of sequences that need no real name, and so remain valid in generated domains
NOVEL_MAKERS = (novel_words, novel_categories)
# each kind's share of a step's sequences
MAKERS: tuple[tuple[Maker, float], ...] = (
    (novel_words, 0.38),
    (novel_categories, 0.18),
    (real_names, 0.08),
    (naming, 0.14),
    (captions, 0.12),
    (kinds, 0.05),
    (yes_no, 0.05),
)
