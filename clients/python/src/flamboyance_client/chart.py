"""A chart of accuracy by number of shots, one line per method and strategy, as an SVG element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from xml.etree.ElementTree import Element, SubElement

# a name, a number of shots or None for all examples, an accuracy and its interval
Point = tuple[str, int | None, float, tuple[float, float]]

# readable on light and dark backgrounds, and told apart by readers with colour blindness
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d")
WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 40, 190, 12, 36
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Lines of different names are shifted, so that their intervals do not cover each other.
SHIFT = 4.0
CAP = 3.0
# The legend is right of the plot: pixels of a line of it, of its sample of the curve, and of a letter, rounded up.
LEGEND_LINE, LEGEND_SAMPLE, LETTER = 16, 28, 6
# Curves that have the same colour differ in their dashes.
DASHES = ("none", "6 3", "2 3", "8 3 2 3")
BASELINE = "most common label"

Scale = Callable[[float], float]


def accuracy_chart(points: Sequence[Point], baseline: tuple[str, float] | None) -> Element:
    """Return the chart. The numbers of shots are equally spaced; the accuracy is shown from 0 to 1 with its intervals."""
    names = list(dict.fromkeys(name for name, *_ in points))
    width, height = _size([*names, *([] if baseline is None else [BASELINE])])
    box = f"0 0 {width} {height}"
    svg = Element("svg", viewBox=box, width=str(width), height=str(height), role="img", fill="currentColor")
    svg.set("font-size", "11")
    svg.set("aria-label", "accuracy by number of shots and method")
    shots = sorted({k for _, k, _, _ in points}, key=_order)
    _axes(svg, shots)
    for index, name in enumerate(names):
        shift = SHIFT * (index - (len(names) - 1) / 2)
        colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
        curve = sorted((point for point in points if point[0] == name), key=lambda point: _order(point[1]))
        _curve(svg, [(x(shots, k) + shift, mean, interval) for _, k, mean, interval in curve], colour, dashes)
        _legend(svg, index, name, colour, dashes=dashes)
    if baseline is not None:
        _line(svg, (LEFT, y(baseline[1])), (WIDTH - RIGHT, y(baseline[1])), "currentColor", dashes="4 3")
        _legend(svg, len(names), BASELINE, "currentColor", dashes="4 3")
    return svg


def _size(names: Sequence[str]) -> tuple[int, int]:
    """Return the width and height of the chart, which grow with its legend."""
    longest = max(map(len, names), default=0)
    return max(WIDTH, WIDTH - RIGHT + LEGEND_SAMPLE + LETTER * longest), max(HEIGHT, TOP + LEGEND_LINE * len(names))


def shots_text(k: int | None) -> str:
    """Return a number of shots as text; without a prompt, a query is compared with all examples."""
    return "all" if k is None else str(k)


def _order(k: int | None) -> float:
    return inf if k is None else k


def x(shots: Sequence[int | None], k: int | None) -> float:
    """Return the position of a number of shots, in the middle of an equal share of the width."""
    return LEFT + (shots.index(k) + 0.5) * (WIDTH - LEFT - RIGHT) / len(shots)


def y(accuracy: float) -> float:
    return TOP + (1 - accuracy) * (HEIGHT - TOP - BOTTOM)


def _axes(svg: Element, shots: Sequence[int | None]) -> None:
    for tick in TICKS:
        _line(svg, (LEFT, y(tick)), (WIDTH - RIGHT, y(tick)), "currentColor", opacity="0.2")
        _text(svg, LEFT - 6, y(tick) + 4, f"{tick:g}", anchor="end")
    for k in shots:
        _text(svg, x(shots, k), HEIGHT - BOTTOM + 16, shots_text(k), anchor="middle")
    _text(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "shots", anchor="middle")


def _curve(svg: Element, points: Sequence[tuple[float, float, tuple[float, float]]], colour: str, dashes: str) -> None:
    path = " ".join(f"{left:.1f},{y(mean):.1f}" for left, mean, _ in points)
    line = SubElement(svg, "polyline", points=path, fill="none", stroke=colour)
    line.set("stroke-width", "1.5")
    line.set("stroke-dasharray", dashes)
    for left, mean, (low, high) in points:
        _line(svg, (left, y(low)), (left, y(high)), colour)
        for end in (low, high):
            _line(svg, (left - CAP, y(end)), (left + CAP, y(end)), colour)
        dot = SubElement(svg, "circle", cx=f"{left:.1f}", cy=f"{y(mean):.1f}", r="3", fill=colour)
        SubElement(dot, "title").text = f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _legend(svg: Element, index: int, name: str, colour: str, *, dashes: str = "none") -> None:
    left, top = WIDTH - RIGHT + 8, TOP + 5 + LEGEND_LINE * index
    _line(svg, (left, top), (left + 14, top), colour, dashes=dashes)
    _text(svg, WIDTH - RIGHT + LEGEND_SAMPLE, top + 4, name)


def _line(
    svg: Element,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    *,
    opacity: str = "1",
    dashes: str = "none",
) -> None:
    (x1, y1), (x2, y2) = start, end
    line = SubElement(svg, "line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", stroke=colour)
    line.set("stroke-opacity", opacity)
    line.set("stroke-dasharray", dashes)


def _text(svg: Element, left: float, top: float, text: str, *, anchor: str = "start") -> None:
    element = SubElement(svg, "text", x=f"{left:.1f}", y=f"{top:.1f}")
    element.set("text-anchor", anchor)
    element.text = text
