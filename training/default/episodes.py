"""Sequences that teach a model to learn from its prompt: made from their number alone, so any run can go on with them.

The sequences of a step draw from one small pool of images: each is encoded once and shown in many prompts, as in serving.
Novel words are learned only where the prompt has taught them; real names, categories, captions and answers always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from torch import Tensor

from model.prompt import Segment
from model.tokenizer import PromptTokenizer
from training.default.catalogue import Catalogue, row_of
from training.default.discriminants import Discriminants, random_domain
from training.default.templates import ANSWERS, CAPTIONS, KIND_QUESTION, YES_NO_QUESTION, Template, item
from training.default.views import view
from training.default.words import vocabularies
from training.examples import Example, Limits, tokenize
from training.mixture import Prepared

MAX_SHOTS = 10
POOL_LABELS, POOL_IMAGES = 10, 4
LIMITS = Limits(max_tokens=320, max_media=MAX_SHOTS)


@dataclass(frozen=True, slots=True)
class Pool:
    """Images of a step, by label; half of the labels are of one kind, so that telling them apart takes looking."""

    images: dict[str, list[int]]
    categories: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Item:
    row: int
    answer: str
    is_learned: bool
    template: Template
    is_name: bool = True  # whether the answer says what the image is, whatever was asked and in whatever style


Maker = Callable[["Episodes", Pool, Random], list[Item]]


class Episodes:
    """`Episodes(...)(n)`: the n-th sequence.

    `turned`: novel words alone, and the pictures in another made-up domain at every step (`random_domain`). What an image
    is called can then not be learned, only which are alike, whatever sets them apart.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tokenizer: PromptTokenizer,
        seed: int,
        per_pool: int,
        turned: Discriminants | None = None,
        strangeness: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        self.catalogue = catalogue
        self._tokenizer, self._seed, self._per_pool = tokenizer, seed, per_pool
        self._turned, self._strangeness, self._noise = turned, strangeness, noise
        self._vocabularies = vocabularies(tokenizer)
        self._kinds: dict[str, set[str]] = {}
        for label, rows in catalogue.labels.items():
            self._kinds.setdefault(catalogue.records[rows[0]].category, set()).add(label)

    def __call__(self, number: int) -> Prepared:
        step = number // self._per_pool
        pool = self.pool(Random(f"{self._seed}/pool/{step}"))
        rng = Random(f"{self._seed}/sequence/{number}")
        makers = [(maker, share) for maker, share in MAKERS if maker in NOVEL or self._turned is None]
        make = rng.choices([maker for maker, _ in makers], [share for _, share in makers])[0]
        example = as_example(f"{make.__name__}/{number}", make(self, pool, rng))
        tokens = tokenize(example, self._tokenizer, LIMITS, rng)
        return Prepared(tokens, {media: self._view(row_of(media), step) for media in tokens.media})

    def words(self, count: int, rng: Random) -> list[str]:
        """That say nothing of what they are made to name: all of them made up, or all of them common."""
        return rng.sample(rng.choice(self._vocabularies), count)

    def _view(self, row: int, step: int) -> Tensor:
        """The same for all sequences of a step, another in the next."""
        features = view(self.catalogue.features(row), Random(f"{self._seed}/view/{step}/{row}"))
        if self._turned is None:
            return features
        number = Random(f"{self._seed}/domain/{step}").getrandbits(63)
        domain = random_domain(len(self._turned.directions), self._strangeness, self._noise, number)
        return self._turned.moved(features.float(), domain, Random(f"{self._seed}/noise/{step}/{row}").getrandbits(63))

    def pool(self, rng: Random) -> Pool:
        labels = self.catalogue.labels
        kind = rng.choice(sorted(kind for kind, members in self._kinds.items() if len(members) >= POOL_LABELS // 2))
        alike = rng.sample(sorted(self._kinds[kind]), POOL_LABELS // 2)
        others = rng.sample(sorted(labels.keys() - set(alike)), POOL_LABELS - len(alike))
        images = {name: rng.sample(labels[name], min(POOL_IMAGES, len(labels[name]))) for name in alike + others}
        categories: dict[str, list[int]] = {}
        for name in rng.sample(sorted(self.catalogue.categories), 4):
            categories[name] = rng.sample(self.catalogue.categories[name], 3)
        return Pool(images, categories)


def as_example(name: str, items: list[Item]) -> Example:
    segments: list[Segment] = []
    answers: set[int] = set()
    names: set[int] = set()
    for one in items:
        segments += item(one.row, one.template, one.answer)
        names |= {len(segments) - 2} if one.is_name else set()
        if one.is_learned:
            answers |= {len(segments) - 2, len(segments) - 1}
    return Example(name=name, segments=tuple(segments), answers=frozenset(answers), names=frozenset(names))


def draw(names: dict[str, str], images: dict[str, list[int]], rng: Random) -> list[tuple[int, str, bool]]:
    """Up to `MAX_SHOTS` images of the named things in random order: row, name, whether the name stood there before."""
    rows = [(row, names[thing]) for thing in names for row in images[thing]]
    rng.shuffle(rows)
    seen: set[str] = set()
    out = []
    for row, name in rows[:MAX_SHOTS]:
        out.append((row, name, name in seen))
        seen.add(name)
    return out


def _named(images: dict[str, list[int]], words: list[str], rng: Random) -> list[Item]:
    things = rng.sample(sorted(images), len(words))
    template = rng.choice(ANSWERS)
    drawn = draw(dict(zip(things, words, strict=True)), images, rng)
    return [Item(row, word, known, template) for row, word, known in drawn]


def novel_words(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    return _named(pool.images, self.words(rng.randint(2, 5), rng), rng)


def novel_categories(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """A word for a kind of thing, every image another thing of that kind."""
    return _named(pool.categories, self.words(rng.randint(2, 4), rng), rng)


def real_names(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """Real names, each of several images: the first from sight, the others from the prompt as well."""
    things = rng.sample(sorted(pool.images), rng.randint(2, 4))
    template = rng.choice(ANSWERS)
    return [Item(row, name, True, template) for row, name, _ in draw({t: t for t in things}, pool.images, rng)]


def naming(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """One image of each of several things."""
    things = rng.sample(sorted(pool.images), 7)
    template = rng.choice(ANSWERS)
    return [Item(rng.choice(pool.images[thing]), thing, True, template) for thing in things]


def captions(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    """One style a sequence: the first caption sets it, the others are learned."""
    style, template = rng.choice(CAPTIONS), rng.choice((Template("Output:"), Template(""), Template("Caption:", "\n")))
    items = []
    for place, thing in enumerate(rng.sample(sorted(pool.images), 5)):
        row = rng.choice(pool.images[thing])
        record = self.catalogue.records[row]
        tag = record.tags[0] if record.tags else record.category
        text = style.format(label=thing, style=record.style, category=record.category, tag=tag)
        items.append(Item(row, text, place > 0, template, is_name=False))
    return items


def kinds(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    names = sorted(pool.categories)
    rows = rng.sample([(row, name) for name in names for row in pool.categories[name]], 7)
    template = Template(KIND_QUESTION) if rng.random() < 0.5 else Template("Category:")
    return [Item(row, name, True, template) for row, name in rows]


def yes_no(self: Episodes, pool: Pool, rng: Random) -> list[Item]:
    items = []
    things = sorted(pool.images)
    for thing in rng.sample(things, 6):
        asked = thing if rng.random() < 0.5 else rng.choice(things)
        template = Template(YES_NO_QUESTION.format(label=asked))
        answer = "yes" if asked == thing else "no"
        items.append(Item(rng.choice(pool.images[thing]), answer, True, template, is_name=False))
    return items


# what no direction's meaning helps with
NOVEL = (novel_words, novel_categories)
# shares of a step's sequences
MAKERS: tuple[tuple[Maker, float], ...] = (
    (novel_words, 0.38),
    (novel_categories, 0.18),
    (real_names, 0.08),
    (naming, 0.14),
    (captions, 0.12),
    (kinds, 0.05),
    (yes_no, 0.05),
)
