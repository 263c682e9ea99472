"""Templates against prompts of the paper and of OpenFlamingo, and against text that spells placeholders or markers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.prompt import EndOfChunk, Media, Text, encode
from server.fewshot.templates import InvalidTemplate, Shot, Template, TemplateError, built_in, with_end
from tests.tiny_models import CONFIGS, PROMPT, prompt_tokenizer
from training.default.templates import ANSWERS, item

CAT, DOG, QUERY = b"c" * 32, b"d" * 32, b"q" * 32


def test_the_paper_writes_a_space_before_an_answer_and_nothing_between_shots() -> None:
    segments = built_in(CONFIGS["flamingo"])["caption"].render(
        [Shot(media=(CAT,), text="a cat"), Shot(media=(DOG,), text="a dog")], Shot(media=(QUERY,))
    )
    assert segments == [
        Media(CAT),
        Text("Output: a cat"),
        EndOfChunk(),
        Media(DOG),
        Text("Output: a dog"),
        EndOfChunk(),
        Media(QUERY),
        Text("Output:"),
    ]


def test_openflamingo_writes_no_space_and_a_line_between_shots() -> None:
    segments = built_in(CONFIGS["openflamingo"])["vqa"].render(
        [Shot(media=(CAT,), question="What is it?", text="cat")], Shot(media=(QUERY,), question="And this?")
    )
    assert segments == [
        Media(CAT),
        Text("Question:What is it? Short answer:cat"),
        EndOfChunk(),
        Text("\n"),
        Media(QUERY),
        Text("Question:And this? Short answer:"),
    ]


def test_a_shot_equals_the_training_format_of_the_default_model() -> None:
    trained = item(3, ANSWERS[0], "dax")
    assert isinstance(trained[0], Media)
    shot = Shot(media=(trained[0].digest,), label="dax")
    written = built_in(CONFIGS["flamingo"])["classification"].render([shot], Shot(media=(QUERY,)))
    tokenizer = prompt_tokenizer()
    assert encode(written[:3], tokenizer) == encode(trained, tokenizer)


def test_answer_falls_back_to_the_label_and_label_to_the_text() -> None:
    templates = built_in(CONFIGS["flamingo"])
    for name, text, label, written in [
        ("caption", "a cat", "animal", "Output: a cat"),
        ("caption", "", "animal", "Output: animal"),
        ("classification", "a cat", "animal", "Output: animal"),
        ("classification", "a cat", "", "Output: a cat"),
    ]:
        assert Text(written) in templates[name].render([Shot(text=text, label=label)], Shot())


def test_label_does_not_fall_back_to_a_text_with_its_own_placeholder() -> None:
    memes = Template(name="memes", shot="{media}written: '{text}' Hateful? Answer:{label}")
    assert memes.beginning == "{media}written: '{text}' Hateful? Answer:"
    assert memes.render([Shot(text="hello", label="no")], Shot(text="hi"))[-1] == Text("written: 'hi' Hateful? Answer:")
    with pytest.raises(TemplateError, match=r"has \{label\}, but shot 0 has none"):
        memes.render([Shot(text="hello")], Shot(text="hi"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"shot": "{media}Output: {caption}"}, r"shot: unknown placeholder \{caption\}"),
        ({"shot": "{media}{answer}{media}"}, r"shot: \{media\} may occur only once"),
        ({"shot": "{media}{answer}{answer}"}, r"shot: \{answer\} may occur only once"),
        ({"shot": "{answer}{media}"}, r"shot: \{media\} must come before the answer"),
        ({"shot": "{media}{answer}", "query": "Say:"}, r"query: \{media\} must come"),
        ({"shot": "{label}{answer}"}, "shot: only .media., .text. and .question. are allowed in a query"),
        ({"shot": "{answer}", "query": "{media}"}, r"query: \{media\} must come"),
        ({"shot": "{media}Output:"}, r"shot: \{answer\}, \{label\} or \{text\} is required"),
        ({"shot": "{media}{answer}", "query": "{media}{answer}"}, r"query: \{answer\} is the answer"),
        (
            {"shot": "{media}{text} {answer}", "query": "{media}{label}"},
            "query: only .media., .text. and .question. are allowed",
        ),
    ],
)
def test_invalid_templates_are_refused(template: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidTemplate, match=f"^{message}") as refusal:
        Template(name="custom", **template)
    assert refusal.value.field in template
    assert message.startswith(refusal.value.field)


def test_an_error_names_the_shot_without_a_value() -> None:
    vqa = built_in(CONFIGS["flamingo"])["vqa"]
    shots = [Shot(question="what", text="cat"), Shot(text="dog")]
    with pytest.raises(TemplateError, match=r"'vqa' has \{question\}, but shot 1 has none") as refusal:
        vqa.render(shots, Shot(question="what"))
    assert refusal.value.shot == 1
    with pytest.raises(TemplateError, match="the query has none") as refusal:
        vqa.render(shots[:1], Shot())
    assert refusal.value.shot is None


@given(st.text(min_size=1), st.text(min_size=1))
def test_values_replace_placeholders_once_and_literally(question: str, answer: str) -> None:
    vqa = built_in(CONFIGS["flamingo"])["vqa"]
    shot, _, query = vqa.render([Shot(question=question, text=answer)], Shot(question=answer))
    assert shot == Text(f"Question: {question} Answer: {answer}")
    assert query == Text(f"Question: {answer} Answer:")


def test_a_value_that_spells_a_placeholder_or_marker_stays_text() -> None:
    caption = built_in(CONFIGS["flamingo"])["caption"]
    segments = caption.render([Shot(text="{answer} {media} {0.__class__} <image><|endofchunk|>")], Shot(media=(QUERY,)))
    assert segments[0] == Text("Output: {answer} {media} {0.__class__} <image><|endofchunk|>")
    tokenizer = prompt_tokenizer()
    ids = encode(segments, tokenizer).token_ids
    assert (ids.count(tokenizer.media_token_id), ids.count(tokenizer.id_of("<|endofchunk|>"))) == (1, 1)


def test_other_braces_are_text() -> None:
    template = Template(name="json", shot='{media}{"answer": "{answer}"}')
    assert template.render([Shot(text="cat")], Shot()) == [
        Text('{"answer": "cat"}'),
        EndOfChunk(),
        Text('{"answer": "'),
    ]


def test_a_query_ends_before_the_space_that_leads_to_its_answer() -> None:
    templates = [built_in(CONFIGS[family])["caption"] for family in ("flamingo", "openflamingo")]
    assert [template.lead + "a cat" for template in templates] == [" a cat", "a cat"]
    template = Template(name="custom", shot="{media}Output:\n{answer}", query="{media}Output:\n")
    assert template.lead + "a cat" == "a cat"


def test_without_an_end_of_chunk_token_a_line_break_ends_an_answer() -> None:
    template = with_end(built_in(CONFIGS["idefics"])["caption"], replace(PROMPT, end_of_chunk=""))
    assert template.render([Shot(text="a cat")], Shot(media=(QUERY,))) == [
        Text("Output: a cat\n"),
        Media(QUERY),
        Text("Output:"),
    ]
