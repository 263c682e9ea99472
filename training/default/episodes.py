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
from training.default.discriminants import Domains
from training.default.templates import ANSWERS, CAPTIONS, KIND_QUESTION, YES_NO_QUESTION, Template, item
from training.default.views import random_view
from training.default.words import vocabularies
from training.examples import Example, Limits, tokenize
from training.mixture import PreparedExample

MAX_IMAGES = 5  # as in the paper
# maximum of novel words or categories in a sequence; fewer than its images, so that at least one is taught and then asked
MAX_WAYS = 4
POOL_LABELS, POOL_IMAGES, POOL_CLASSES = 10, 4, 4
LIMITS = Limits(max_tokens=320, max_media=MAX_IMAGES)


@dataclass(frozen=True, slots=True)
class Pool:
    """The images of a step, by label and by category.

    Half of the labels belong to one category, so that distinguishing them requires the image.
    """

    images: dict[str, list[int]]
    categories: dict[str, list[int]]
    classes: dict[str, list[int]]  # artificial images of the encoder's classes


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

    With `domains`, sequences teach novel words only, and every step moves the images to another generated domain. The model
    can then not learn the images' names, only which images are alike, in any direction.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tokenizer: PromptTokenizer,
        seed: int,
        per_pool: int,
        domains: Domains | None = None,
    ) -> None:
        self.catalogue = catalogue
        self._tokenizer, self._seed, self._per_pool, self._domains = tokenizer, seed, per_pool, domains
        self._vocabularies = vocabularies(tokenizer)
        self._step, self._views = -1, dict[int, Tensor]()
        self._kinds: dict[str, set[str]] = {}
        for label, rows in catalogue.labels.items():
            self._kinds.setdefault(catalogue.records[rows[0]].category, set()).add(label)

    def __call__(self, number: int) -> PreparedExample:
        step = number // self._per_pool
        pool = self.pool(Random(f"{self._seed}/pool/{step}"))
        rng = Random(f"{self._seed}/sequence/{number}")
        makers = [(maker, share) for maker, share in MAKERS if maker in NOVEL_MAKERS or self._domains is None]
        make = rng.choices([maker for maker, _ in makers], [share for _, share in makers])[0]
        example = build_example(f"{make.__name__}/{number}", make(self, pool, rng))
        tokens = tokenize(example, self._tokenizer, LIMITS, rng)
        return PreparedExample(tokens, {media: self._view(row_of(media), step) for media in tokens.media})

    def words(self, count: int, rng: Random) -> list[str]:
        """Draw words whose meaning does not help: either invented words or common words."""
        return rng.sample(rng.choice(self._vocabularies), count)

    def _view(self, row: int, step: int) -> Tensor:
        """Return an image's features as all sequences of the step show them; the next step shows another view."""
        if step != self._step:
            self._step, self._views = step, {}
        if row not in self._views:
            self._views[row] = self._compute_view(row, step)
        return self._views[row]

    def _compute_view(self, row: int, step: int) -> Tensor:
        features = random_view(self.catalogue.features(row), Random(f"{self._seed}/view/{step}/{row}"))
        return features if self._domains is None else self._domains.move(features, self._seed, step, row)

    def pool(self, rng: Random) -> Pool:
        labels = self.catalogue.labels
        kind = rng.choice(sorted(kind for kind, members in self._kinds.items() if len(members) >= POOL_LABELS // 2))
        same_kind = rng.sample(sorted(self._kinds[kind]), POOL_LABELS // 2)
        rest = rng.sample(sorted(labels.keys() - set(same_kind)), POOL_LABELS - len(same_kind))
        images = {name: rng.sample(labels[name], min(POOL_IMAGES, len(labels[name]))) for name in same_kind + rest}
        categories: dict[str, list[int]] = {}
        for name in rng.sample(sorted(self.catalogue.categories), 4):
            categories[name] = rng.sample(self.catalogue.categories[name], 3)
        class_images = self.catalogue.class_images
        names = rng.sample(sorted(class_images), min(POOL_CLASSES, len(class_images)))
        return Pool(images, categories, {name: rng.sample(class_images[name], 2) for name in names})


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
    """Draw up to `MAX_IMAGES` images of the labels in `names`, in random order.

    Returns for each its row, its name, and whether the name occurred before.
    """
    rows = [(row, names[label]) for label in names for row in images[label]]
    rng.shuffle(rows)
    seen_names: set[str] = set()
    shots = []
    for row, name in rows[:MAX_IMAGES]:
        shots.append((row, name, name in seen_names))
        seen_names.add(name)
    return shots


def _assign_words(images: dict[str, list[int]], words: list[str], rng: Random) -> list[Item]:
    labels = rng.sample(sorted(images), len(words))
    template = rng.choice(ANSWERS)
    shots = draw_images(dict(zip(labels, words, strict=True)), images, rng)
    return [Item(row, word, is_known, template) for row, word, is_known in shots]


def novel_words(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    return _assign_words(pool.images, self.words(rng.randint(2, MAX_WAYS), rng), rng)


def novel_categories(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """Assign words to categories, whose images usually have different labels."""
    return _assign_words(pool.categories, self.words(rng.randint(2, MAX_WAYS), rng), rng)


def real_names(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """Use real names, each for several images: the first from the image alone, the others from the prompt as well."""
    labels = rng.sample(sorted(pool.images), rng.randint(2, MAX_WAYS))
    template = rng.choice(ANSWERS)
    shots = draw_images({label: label for label in labels}, pool.images, rng)
    return [Item(row, name, True, template) for row, name, _ in shots]


def naming(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """Use real names, each for one image."""
    images = pool.images | pool.classes
    labels = rng.sample(sorted(images), MAX_IMAGES)
    template = rng.choice(ANSWERS)
    return [Item(rng.choice(images[label]), label, True, template) for label in labels]


def captions(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """Use one caption style per sequence: the first caption sets it, and the others are targets."""
    style, template = rng.choice(CAPTIONS), rng.choice((Template("Output:"), Template(""), Template("Caption:", "\n")))
    items = []
    for i, label in enumerate(rng.sample(sorted(pool.images), MAX_IMAGES)):
        row = rng.choice(pool.images[label])
        record = self.catalogue.records[row]
        tag = record.tags[0] if record.tags else record.category
        text = style.format(label=label, style=record.style, category=record.category, tag=tag)
        items.append(Item(row, text, i > 0, template, is_name=False))
    return items


def kinds(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    names = sorted(pool.categories)
    rows = rng.sample([(row, name) for name in names for row in pool.categories[name]], MAX_IMAGES)
    template = Template(KIND_QUESTION) if rng.random() < 0.5 else Template("Category:")
    return [Item(row, name, True, template) for row, name in rows]


def yes_no(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    items = []
    labels = sorted(pool.images)
    for label in rng.sample(labels, MAX_IMAGES):
        question_label = label if rng.random() < 0.5 else rng.choice(labels)
        template = Template(YES_NO_QUESTION.format(label=question_label))
        answer = "yes" if question_label == label else "no"
        items.append(Item(rng.choice(pool.images[label]), answer, True, template, is_name=False))
    return items


# the kinds of sequences that need no real name, and so remain valid in generated domains
NOVEL_MAKERS = (novel_words, novel_categories)
# each kind's share of a step's sequences
MAKERS: tuple[tuple[Maker, float], ...] = (
    (novel_words, 0.32),
    (novel_categories, 0.14),
    (real_names, 0.08),
    (naming, 0.20),
    (captions, 0.16),
    (kinds, 0.05),
    (yes_no, 0.05),
)
