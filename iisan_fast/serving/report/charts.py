"""Draw line and bar charts as SVG. The page's style sheet gives the colours, so a chart fits light and dark pages."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

from markupsafe import Markup

from ...printable import printable

WIDTH, HEIGHT = 400, 232  # of a drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 46, 388, 34, 192  # of the plot inside the drawing
TICK_STEPS = (1, 2, 2.5, 5, 10)
LETTER = 6.5  # the width of a character, about
WIDE_LETTERS = frozenset("@MWmw%")
MOST_TICKS = 5  # of the y axis
MOST_X_LABELS = 9
MOST_DOTS = 60  # points of a line that get a dot
MOST_POINTS = 400  # of a line; more would not be seen

Form = Callable[[float], str]


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    values: Sequence[float]  # one for each x


class Bar(NamedTuple):
    """A bar of a chart, with its interval."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""  # shown while the pointer is on the bar


class Axis(NamedTuple):
    """A linear map from values to places in the drawing."""

    low: float
    high: float
    start: float  # the place of `low`
    end: float  # the place of `high`

    def __call__(self, value: float) -> float:
        """Return the place of a value, rounded to a tenth."""
        span = (self.high - self.low) or 1.0
        return round(self.start + (value - self.low) / span * (self.end - self.start), 1)


def line_chart(
    title: str,
    xs: Sequence[int],
    series: Sequence[Series],
    labels: tuple[str, str],
    form: Form,
    marked: int | None = None,
) -> Markup:
    """Return the SVG of one or two lines over ascending whole numbers.

    title: read out in place of the drawing. labels: of the x and the y axis. form: writes a y value. marked: an x to
    mark by an upright line, and by its number. Raises ValueError for a series without values, or of another length.
    """
    if not xs or any(len(line.values) != len(xs) for line in series):
        raise ValueError(f"{title}: expected one value for each of {len(xs)} points of every line")
    values = [value for line in series for value in line.values]
    ticks = nice_ticks(min(values), max(values))
    y = Axis(ticks[0], ticks[-1], BOTTOM, TOP)
    x = Axis(xs[0], xs[-1], LEFT + 8, RIGHT - 8) if len(xs) > 1 else Axis(xs[0] - 1, xs[0] + 1, LEFT, RIGHT)
    svg = _drawing(title)
    _y_axis(svg, y, ticks, labels[1], form)
    _x_axis(svg, [(x(tick), f"{tick:,}") for tick in _whole_ticks(xs)], labels[0])
    if marked in xs:
        _mark(svg, x(marked), f"best: {marked:,}")
    for number, line in enumerate(series, start=1):
        _line(svg, line, number, xs, x, y, form, marked)
    if len(series) > 1:
        _legend(svg, [(f"line line-{number}", line.name) for number, line in enumerate(series, start=1)])
    return _markup(svg)


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    labels: tuple[str, str],
    form: Form,
    top: float | None = None,
    level: tuple[float, str] | None = None,
) -> Markup:
    """Return the SVG of bars from 0, each with the interval that it has.

    title: read out in place of the drawing. labels: of the x and the y axis. form: writes a y value. top: the end of
    the y axis; None takes it from the bars. level: a value that a broken line marks over all bars, and its name. Raises
    ValueError without bars.
    """
    if not bars:
        raise ValueError(f"{title}: expected bars, found none")
    highest = max(bar.value if bar.high is None else bar.high for bar in bars)
    ticks = nice_ticks(0.0, max(highest, level[0] if level else 0.0) if top is None else top)
    y = Axis(ticks[0], ticks[-1], BOTTOM, TOP)
    room = (RIGHT - LEFT) / len(bars)
    centres = [round(LEFT + (number + 0.5) * room, 1) for number in range(len(bars))]
    svg = _drawing(title)
    _y_axis(svg, y, ticks, labels[1], form)
    step = math.ceil(sum(_width(bar.label) + LETTER for bar in bars) / (RIGHT - LEFT))
    shown = [(centre, bar.label) for centre, bar in zip(centres, bars)]
    _x_axis(svg, shown[::step], labels[0])
    for centre, bar in zip(centres, bars):
        _bar(svg, bar, centre, min(44.0, 0.62 * room), y, form)
    if level is not None:
        _part(svg, "line", "level", x1=LEFT, x2=RIGHT, y1=y(level[0]), y2=y(level[0]))
        _legend(svg, [("level", level[1])])
    return _markup(svg)


def nice_ticks(low: float, high: float) -> list[float]:
    """Return 2 to 7 round numbers at equal distances, the first not above `low` and the last not below `high`.

    Raises ValueError for numbers that are not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"expected finite numbers for an axis, found {low} and {high}")
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = 0.1 * abs(low) or 0.5
        low -= room
        high += room
    rough = (high - low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in TICK_STEPS if factor * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _whole_ticks(xs: Sequence[int]) -> list[int]:
    """Return at most `MOST_X_LABELS` whole numbers of an x axis, at equal distances."""
    span = xs[-1] - xs[0]
    if span < MOST_X_LABELS:
        return list(xs)
    step = next(
        factor * 10**power
        for power in range(12)
        for factor in (1, 2, 5)
        if span / (factor * 10**power) < MOST_X_LABELS - 1
    )
    rounded = range(-(-xs[0] // step) * step, xs[-1] + 1, step)
    return [xs[0], *(tick for tick in rounded if tick - xs[0] > step / 2)]


def _drawing(title: str) -> Element:
    """Return an empty drawing."""
    name = printable(title)
    svg = Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": name, "class": "chart"})
    return svg


def _y_axis(svg: Element, y: Axis, ticks: Sequence[float], label: str, form: Form) -> None:
    """Draw the grid with its values, and the label over it."""
    for tick in ticks:
        _part(svg, "line", "axis" if tick == ticks[0] else "grid", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick))
        _text(svg, LEFT - 6, y(tick) + 3.5, form(tick), "tick", "end")
    _text(svg, 2, 14, label, "label")


def _x_axis(svg: Element, ticks: Sequence[tuple[float, str]], label: str) -> None:
    """Write the values under the x axis, and its label below them."""
    for place, text in ticks:
        _text(svg, place, BOTTOM + 16, text, "tick", "middle")
    _text(svg, RIGHT, HEIGHT - 6, label, "label", "end")


def _mark(svg: Element, place: float, text: str) -> None:
    """Draw an upright line with its text beside it."""
    _part(svg, "line", "mark", x1=place, x2=place, y1=TOP - 4, y2=BOTTOM)
    on_the_right = place < (LEFT + RIGHT) / 2
    _text(svg, place + (5 if on_the_right else -5), TOP + 5, text, "note", "start" if on_the_right else "end")


def _line(
    svg: Element, line: Series, number: int, xs: Sequence[int], x: Axis, y: Axis, form: Form, marked: int | None
) -> None:
    """Draw a line, with a dot that names its value on each point if they are few, and on the marked one."""
    every = math.ceil(len(xs) / MOST_POINTS)
    points = list(zip(xs, line.values))
    drawn = [point for place, point in enumerate(points) if place % every == 0 or place == len(points) - 1]
    path = " ".join(f"{x(at)},{y(value)}" for at, value in drawn)
    _part(svg, "polyline", f"line line-{number}", points=path)
    for at, value in points:
        if len(points) > MOST_DOTS and at != marked:
            continue
        kind = f"dot dot-{number} best" if at == marked else f"dot dot-{number}"
        dot = _part(svg, "circle", kind, cx=x(at), cy=y(value), r=4 if at == marked else 2.5)
        _note(dot, f"{line.name}, epoch {at:,}: {form(value)}")


def _bar(svg: Element, bar: Bar, centre: float, width: float, y: Axis, form: Form) -> None:
    """Draw a bar with its interval; its note appears under the pointer."""
    group = ElementTree.SubElement(svg, "g")
    _note(group, bar.note or f"{bar.label}: {form(bar.value)}")
    height = round(y(0.0) - y(bar.value), 1)
    _part(
        group,
        "rect",
        "bar",
        x=round(centre - width / 2, 1),
        y=y(bar.value),
        width=round(width, 1),
        height=max(height, 0.5),
        rx=2,
    )
    if bar.low is not None and bar.high is not None:
        low, high = y(bar.low), y(bar.high)
        _part(group, "path", "interval", d=f"M{centre - 4},{high}h8m-4,0V{low}m-4,0h8")


def _legend(svg: Element, lines: Sequence[tuple[str, str]]) -> None:
    """Write the names of lines on the right over the plot, each behind a piece of its line. lines: class and name."""
    place: float = RIGHT
    for kind, name in reversed(lines):
        _text(svg, place, 14, name, "legend", "end")
        place -= _width(name) + 5
        _part(svg, "line", kind, x1=place - 16, x2=place, y1=10.5, y2=10.5)
        place -= 30


def _width(text: str) -> float:
    """Return about how wide a text is, rather too much."""
    return sum(
        2 * LETTER if letter in WIDE_LETTERS else 1.35 * LETTER if letter.isupper() else LETTER for letter in text
    )


def _part(parent: Element, tag: str, kind: str, **attributes: object) -> Element:
    """Add an element of a class to another one."""
    values = {name: str(value) for name, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, {"class": kind, **values})


def _text(parent: Element, x: float, y: float, text: str, kind: str, anchor: str = "start") -> None:
    """Write text at a place. anchor: the part of the text at x, of start, middle and end."""
    part = _part(parent, "text", kind, x=round(x, 1), y=round(y, 1))
    part.set("text-anchor", anchor)
    part.text = printable(text)


def _note(parent: Element, text: str) -> None:
    """Give an element a text that appears under the pointer."""
    ElementTree.SubElement(parent, "title").text = printable(text)


def _markup(svg: Element) -> Markup:
    """Return the drawing as text that a page takes as it is."""
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
