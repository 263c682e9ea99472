"""Benchmarks as data: a YAML file in `sets` has the prompts, splits, metric, shots and published figures of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

SETS = Path(__file__).with_name("sets")

Wording = Literal["paper", "openflamingo"]
SelectionName = Literal["random", "rices"]
Patterns = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class UnknownBenchmark(ValueError):
    pass


class Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompt(Data):
    """The words of a prompt, and the kind of answer: a text, which is cut at the next prompt, or scored candidates."""

    shot: str
    separator: str = ""
    max_tokens: int = 20
    cut: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    normalisation: Literal["sum", "mean"] = "sum"
    # number of examples without media in a prompt with no shots
    zero_shot_examples: int

    def trim(self, text: str) -> str:
        """Return an answer without the next prompt, which a model may have begun to write after it."""
        for end in self.cut:
            text = text.partition(end)[0]
        for mark in self.remove:
            text = text.replace(mark, "")
        return text.strip()


class Prompts(Data):
    paper: Prompt
    openflamingo: Prompt | None  # None: OpenFlamingo does not evaluate the set


class Published(Data):
    """Figures by number of shots. `split` is None where the source does not state it."""

    model: str
    selection: SelectionName
    split: str | None
    source: str
    figures: Mapping[int, float]


class Benchmark(Data):
    """A set of queries with the protocol of its evaluation. `generate` writes answers, `rank` scores candidates."""

    name: str
    title: str
    task: Literal["generate", "rank"]
    metric: str
    reader: str
    media_name: str = "{}"
    missing_media: Literal["refuse", "count"]
    paper_split: str
    split: str
    support_split: str | None
    support_examples: int = 2048
    support_per_label: int | None = None
    # the files of a split, by their role, as alternative patterns of names; `subset` names rows of a file
    splits: Mapping[str, Mapping[str, Patterns]]
    shots: tuple[int, ...]
    selections: tuple[SelectionName, ...]
    orders: int = 1
    # the names of the fields of a row of official results: of its id and answer, or of id, probability and label
    submission: tuple[str, str] | tuple[str, str, str] = ("id", "answer")
    prompts: Prompts
    note: str = ""
    published: tuple[Published, ...] = Field(default=())

    def prompt(self, wording: Wording) -> Prompt:
        """Return the prompt in a wording; raises ValueError for a set that OpenFlamingo does not evaluate."""
        if (prompt := getattr(self.prompts, wording)) is None:
            raise ValueError(f"{self.title} has no wording of OpenFlamingo, which does not evaluate it")
        return prompt


def names() -> list[str]:
    return sorted(path.stem for path in SETS.glob("*.yaml"))


def load(name: str) -> Benchmark:
    """Load a benchmark; raises UnknownBenchmark for another name, and ValueError for data with an unknown key."""
    if name not in names():
        raise UnknownBenchmark(f"unknown benchmark {name!r}: the benchmarks are {', '.join(names())}")
    return parse(name, (SETS / f"{name}.yaml").read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Benchmark:
    try:
        return Benchmark.model_validate({**yaml.safe_load(text), "name": name})
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{name}.yaml: {details}") from None
