"""Templates of an image's text: prompts before an answer, and caption styles; many, so that the model prefers none.

The server's few-shot requests use the first template, which is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.prompt import EndOfChunk, Media, Segment, Text
from training.default.catalogue import row_digest


@dataclass(frozen=True, slots=True)
class Template:
    """The text `<image>{prompt} answer{end}`; an empty end is the end of the chunk."""

    prompt: str
    end: str = ""


ANSWERS = (
    Template("Output:"),
    Template("Output:"),
    Template(""),
    Template("", "."),
    Template(":", "\n"),
    Template("This is a"),
    Template("This is a", ".\n"),
    Template("A picture of a"),
    Template("Label:"),
    Template("Name:", "\n"),
    Template("Category:"),
    Template("Question: What is this? Answer:"),
    Template("Question: Which is it? Answer:", "\n"),
    Template("It is called", "."),
)
CAPTIONS = (
    "a {label}",
    "{style} of a {label}",
    "{label} ({category})",
    "I see a {label}.",
    "{label}, {tag}",
    "Here is {style}: {label}.",
    "kind: {category}; name: {label}",
    "[{label}]",
    '"{label}"',
    "{label}!",
)
KIND_QUESTION = "Question: What kind of thing is this? Answer:"
YES_NO_QUESTION = "Question: Is this a {label}? Answer:"


def item(row: int, template: Template, answer: str) -> tuple[Segment, ...]:
    """Return the segments of one image and its text; the answer and the end are the last two."""
    before = (Text(template.prompt),) if template.prompt else ()
    end = Text(template.end) if template.end else EndOfChunk()
    return (Media(row_digest(row)), *before, Text(f" {answer}"), end)
