"""The HTML that notebooks show for records: self-contained, without scripts, in the colours of the notebook's theme.

Elements are built as a tree, whose serializer escapes all text and attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from flamboyance_client.chart import COLOURS, Point, accuracy_chart, shots_text

MAX_PREVIEWS = 24
MAX_BARS = 10
MAX_TEXT = 60
MAX_TITLE = 500

# a label, and an image as a data URL
Preview = tuple[str, str | None]


def support_set(title: str, facts: Sequence[tuple[str, str]], previews: Sequence[Preview], num_examples: int) -> str:
    """Return a table of facts and a gallery of examples with their labels."""
    root = _root(title)
    _table(root, [[name, value] for name, value in facts])
    gallery = SubElement(root, "div", style="display: flex; flex-wrap: wrap; gap: 8px; margin-top: 6px")
    for label, url in previews[:MAX_PREVIEWS]:
        _figure(gallery, label, url)
    hidden = num_examples - len(previews[:MAX_PREVIEWS])
    if previews and hidden > 0:
        SubElement(root, "div", style="opacity: 0.7").text = f"and {hidden} more examples"
    return _html(root)


def classification(title: str, query: Preview | None, candidates: Sequence[tuple[str, float]]) -> str:
    """Return the query's image, and the most probable labels with bars of their probabilities, from 0 to 1."""
    root = _root(title)
    row = SubElement(root, "div", style="display: flex; gap: 16px; align-items: flex-start; margin-top: 6px")
    if query is not None:
        _figure(row, *query)
    table = SubElement(row, "table", style="border-collapse: collapse")
    for label, probability in candidates[:MAX_BARS]:
        cells = SubElement(table, "tr", style="background: none")
        SubElement(cells, "td", style="text-align: right; padding: 1px 8px", title=label[:MAX_TITLE]).text = short(
            label
        )
        track = SubElement(SubElement(cells, "td", style="padding: 1px"), "div", style="width: 200px")
        width = round(100 * min(max(probability, 0.0), 1.0), 1)
        SubElement(track, "div", style=f"background: {COLOURS[0]}; height: 12px; width: {width}%")
        SubElement(cells, "td", style="padding: 1px 8px; text-align: right").text = f"{probability:.3f}"
    if len(candidates) > MAX_BARS:
        SubElement(root, "div", style="opacity: 0.7").text = f"and {len(candidates) - MAX_BARS} more candidates"
    return _html(root)


def evaluation(title: str, points: Sequence[Point], baseline: tuple[str, float] | None, advice: str) -> str:
    """Return a chart and a table of the accuracy by method and number of shots, and advice in words."""
    root = _root(title)
    if advice:
        SubElement(root, "div").text = advice
    if points:
        root.append(accuracy_chart(points, baseline))
        head = ["method", "shots", "accuracy", "95% interval"]
        _table(
            root,
            [
                head,
                *(
                    [name, shots_text(k), f"{mean:.3f}", f"{low:.3f} to {high:.3f}"]
                    for name, k, mean, (low, high) in points
                ),
            ],
        )
    if baseline is not None:
        SubElement(root, "div").text = f"always answering {short(baseline[0])!r}: {baseline[1]:.3f}"
    return _html(root)


def _root(title: str) -> Element:
    root = Element("div", style="font-family: sans-serif; font-size: 13px")
    SubElement(SubElement(root, "div"), "strong").text = title
    return root


def _table(parent: Element, rows: Sequence[Sequence[str]]) -> None:
    table = SubElement(parent, "table", style="border-collapse: collapse; margin-top: 6px")
    for row in rows:
        cells = SubElement(table, "tr", style="background: none")
        for text in row:
            SubElement(cells, "td", style="padding: 1px 12px 1px 0; text-align: left").text = text


def _figure(parent: Element, label: str, url: str | None) -> None:
    figure = SubElement(
        parent, "div", style="width: 96px; text-align: center; overflow-wrap: anywhere", title=label[:MAX_TITLE]
    )
    box = "width: 96px; height: 96px; object-fit: contain"
    if url is None:
        SubElement(
            figure, "div", style=f"{box}; border: 1px dashed; box-sizing: border-box; line-height: 94px"
        ).text = "no image"
    else:
        SubElement(figure, "img", style=box, src=url, alt=short(label))
    SubElement(figure, "div").text = short(label)


def short(text: str) -> str:
    """Return a text of at most `MAX_TEXT` characters."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _html(root: Element) -> str:
    return tostring(root, encoding="unicode", method="html")
