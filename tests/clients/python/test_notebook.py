"""Tests of the HTML that notebooks show: well formed, with escaped text, self-contained, and bounded in size."""

from __future__ import annotations

import base64
import io
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flamboyance_client import Classification, Evaluation, Preview, SupportSet, image, query, thumbnails
from flamboyance_client.chart import accuracy_chart, x, y
from flamboyance_client.previews import spread
from flamboyance_client.thumbnails import thumbnail

ATTACK = "</td><script>alert('1')</script><img src=x onerror=\"alert(2)\">&amp;"


class Page(HTMLParser):
    """The elements and the text of HTML. Raises for an element that is not closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag != "img":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def safe(html: str) -> Page:
    """Return the page, after checks that it runs nothing and fetches nothing."""
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag in {"div", "strong", "table", "tr", "td", "img"} | {
            "svg",
            "text",
            "line",
            "polyline",
            "circle",
            "title",
        }
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert "url(" not in (attributes.get("style") or "")
    return page


def picture(side: int = 400, file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(stream, file_format)
    return stream.getvalue()


def support_set(label: str, previews: tuple[Preview, ...], num_examples: int = 3) -> SupportSet:
    fields: dict[str, Any] = {"id": "ss_1", "version": 2, "name": label, "num_examples": num_examples}
    raw = {**fields, "label_counts": {label: num_examples}}
    return SupportSet(**fields, previews=previews, example_ids=tuple(map(str, range(1000))), raw=raw)


def classification(label: str, num_candidates: int = 2, **fields: Any) -> Classification:
    labels = [label, *(f"label {number}" for number in range(1, num_candidates))]
    candidates = [{"label": name, "probability": 0.75, "logprob": -1.0} for name in labels]
    parsed = Classification.parse({"label": label, "confidence": 0.75, "candidates": candidates})
    return Classification(label=label, confidence=0.75, candidates=parsed.candidates, **fields)


def evaluation(label: str) -> Evaluation:
    rows = [
        {"strategy": strategy, "k": k, "accuracy": mean, "accuracy_interval": [mean - 0.1, mean + 0.1], "queries": 8}
        for strategy, mean in (("random", 0.5), (label, 0.8))
        for k in (1, 4)
    ]
    return Evaluation.parse(
        {
            "id": "ev_1",
            "status": "completed",
            "progress": {"queries": 32, "queries_done": 32},
            "summary": rows,
            "baseline": {"label": label, "accuracy": 0.25},
            "recommendation": {
                "request": {"examples": {}},
                "accuracy": 0.8,
                "accuracy_interval": [0.7, 0.9],
                "reason": label,
            },
        }
    )


RECORDS = [
    support_set(ATTACK, (Preview(label=ATTACK, media=picture(20)),)),
    classification(ATTACK, query=query(picture(20), text=ATTACK)),
    evaluation(ATTACK),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_text_is_escaped(record: Any) -> None:
    page = safe(record._repr_html_())
    assert ATTACK[:30] in page.text


def test_a_support_set_shows_its_labels_and_thumbnails() -> None:
    previews = (Preview(label="cat", media=picture()), Preview(label="dog", media=picture(20)))
    page = safe(support_set("pets", previews, num_examples=5)._repr_html_())
    assert [attributes["alt"] for attributes in page.named("img")] == ["cat", "dog"]
    for expected in ("Support set pets", "ss_1", "pets: 5", "and 3 more examples"):
        assert expected in page.text


def test_the_html_of_a_large_set_is_bounded() -> None:
    previews = tuple(Preview(label="long " * 1000, media=picture()) for _ in range(100))
    html = support_set("large", previews, num_examples=100)._repr_html_()
    assert len(safe(html).named("img")) == 24
    assert len(html) < 24 * 25_000
    assert safe(html).text.count("long ") < 24 * 15
    labels = {f"label {number} {'long ' * 1000}": 1 for number in range(1000)}
    many = SupportSet(id="ss_1", version=1, raw={"label_counts": labels})._repr_html_()
    assert "and 980 more" in many
    assert len(many) < 4000
    assert len(classification("long " * 10_000, 100)._repr_html_()) < 10_000


def test_a_classification_shows_its_query_and_bars() -> None:
    page = safe(classification("cat", 30, query=picture())._repr_html_())
    assert len(page.named("img")) == 1
    widths = [style for attributes in page.named("div") if "width: 75.0%" in (style := attributes.get("style") or "")]
    assert len(widths) == 10
    for expected in ("cat (0.750)", "label 9", "and 20 more candidates"):
        assert expected in page.text
    assert len(page.named("tr")) == 10
    assert not safe(classification("cat")._repr_html_()).named("img")


@pytest.mark.parametrize("media", ["https://host/a.png", "img_1", "vid_1", Path("nowhere.png"), b"text"], ids=str)
def test_media_that_cannot_be_shown_have_a_placeholder(media: Any) -> None:
    page = safe(classification("cat", query=media)._repr_html_())
    assert "no image" in page.text
    assert not page.named("img")
    assert not safe(classification("cat", query=query(text="Which?"))._repr_html_()).named("img")


def test_an_evaluation_shows_accuracy_with_intervals_and_the_recommendation() -> None:
    page = safe(evaluation("rices_image")._repr_html_())
    assert len(page.named("svg")) == 1
    assert len(page.named("polyline")) == 2
    assert len(page.named("circle")) == 4
    for expected in ("0.800 (0.700 to 0.900)", "0.700 to 0.900", "rices_image", "0.250", "most common label"):
        assert expected in page.text
    zero = {"strategy": "first", "k": 0, "accuracy": 0.3, "accuracy_interval": [0.2, 0.4]}
    alone = safe(Evaluation.parse({"id": "ev_1", "status": "running", "summary": [zero]})._repr_html_())
    assert "no shots" in alone.text
    assert "first" not in alone.text
    without = Evaluation.parse({"id": "ev_1", "status": "completed", "recommendation": None, "note": "None is <good>."})
    assert "None is <good>." in safe(without._repr_html_()).text
    running = Evaluation(id="ev_1", status="running", raw={"progress": {"queries": 4, "queries_done": 1}})
    assert "running, 1 of 4 queries" in safe(running._repr_html_()).text
    late = Evaluation(id="ev_1", status="running", raw={"progress": {"queries": 4, "seconds_left": 130.4}})
    assert "of 4 queries, about 2 min left" in safe(late._repr_html_()).text


def test_points_of_a_chart_are_where_their_numbers_are() -> None:
    chart = accuracy_chart([("random", 1, 0.5, (0.25, 0.75)), ("random", 16, 1.0, (0.9, 1.0))], None)
    (line,) = chart.iter("polyline")
    shots = [1, 16]
    assert line.get("points") == f"{x(shots, 1):.1f},{y(0.5):.1f} {x(shots, 16):.1f},{y(1.0):.1f}"
    assert x(shots, 1) < x(shots, 16)
    assert y(1.0) < y(0.0)  # from the top
    assert y(0.5) - y(1.0) == pytest.approx((y(0.0) - y(1.0)) / 2)


def test_a_legend_of_many_long_names_is_in_the_chart_and_tells_its_curves_apart() -> None:
    names = [f"in_context, rices_image, shots alone, control {number}" for number in range(24)]
    chart = accuracy_chart([(name, 4, 0.5, (0.25, 0.75)) for name in names], ("cat", 0.5))
    width, height = (float(chart.get(side) or 0) for side in ("width", "height"))
    assert chart.get("viewBox") == f"0 0 {width:.0f} {height:.0f}"
    legend = {text.text: text for text in chart.iter("text")}
    for name in (*names, "most common label"):
        left, top = (float(legend[name].get(axis) or 0) for axis in ("x", "y"))
        assert left + 5 * len(name) < width  # a letter of 11 pixels is 5 wide on average
        assert top < height
    assert len({(line.get("stroke"), line.get("stroke-dasharray")) for line in chart.iter("polyline")}) == 24


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_thumbnail_is_small_and_keeps_the_shape(file_format: str) -> None:
    stream = io.BytesIO()
    Image.open(io.BytesIO(picture())).resize((600, 300)).save(stream, file_format)
    url = thumbnail(image(stream.getvalue())["image_url"]["url"])
    assert url is not None
    head, _, data = url.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (96, 48)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_thumbnail_is_upright(file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (600, 300), "red").save(stream, file_format, exif=exif)
    url = thumbnail(stream.getvalue())
    assert url is not None
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (48, 96)


def test_a_thumbnail_of_16_bits_is_not_white() -> None:
    stream = io.BytesIO()
    Image.new("I;16", (20, 20), 0x4000).save(stream, "PNG")
    url = thumbnail(stream.getvalue())
    assert url is not None
    red, _, _ = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB").getpixel((9, 9))  # type: ignore[misc]
    assert abs(red - 0x40) < 3


def test_without_pillow_a_small_file_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "find_spec", lambda name: None)
    small = picture(20)
    assert thumbnail(small) == f"data:image/png;base64,{base64.b64encode(small).decode()}"
    assert thumbnail(picture(400)) is None
    assert thumbnail(b"<script>alert(1)</script>") is None


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\nbroken", picture()[:200], b"GIF89a", b"\xff\xd8\xff"], ids=len)
def test_a_broken_file_has_no_thumbnail(data: bytes) -> None:
    assert thumbnail(data) is None


def test_an_image_of_very_many_pixels_has_no_thumbnail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["PIL.Image"], "MAX_IMAGE_PIXELS", 100)
    assert thumbnail(picture(20)) is None


def test_representations_are_short() -> None:
    for record in (support_set("pets", ()), classification("cat", 500), evaluation("rices_image")):
        assert len(repr(record)) < 300
    assert repr(classification("cat")) == "Classification(label='cat', confidence=0.75)"
    assert repr(evaluation("rices_image").recommendation) == "Recommendation(request={'examples': {}}, accuracy=0.8)"
    pets = "SupportSet(id='ss_1', version=2, name='pets', num_examples=3, status='pending')"
    assert repr(support_set("pets", ())) == pets


def test_previews_have_as_many_examples_of_each_label_as_possible() -> None:
    items = ["a1", "a2", "a3", "b1", "b2", "c1"]
    assert spread(items, lambda item: item[0], 4) == ["a1", "a2", "b1", "c1"]
    assert spread(items, lambda item: item[0], 2) == ["a1", "b1"]
    assert spread(items, lambda item: item[0], 9) == items
