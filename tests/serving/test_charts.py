"""Check the charts: places on the axes, texts, marks, and SVG that every parser reads."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from xml.etree.ElementTree import Element

import pytest

from iisan_fast.serving.report.charts import BOTTOM, LEFT, RIGHT, TOP, Bar, Series, bar_chart, line_chart, nice_ticks

LABELS = ("epoch", "loss")


def parsed(markup: str) -> Element:
    return ElementTree.fromstring(str(markup))


def of_class(svg: Element, kind: str) -> list[Element]:
    return [part for part in svg.iter() if kind in part.get("class", "").split()]


def texts(svg: Element, kind: str) -> list[str]:
    return [part.text for part in of_class(svg, kind)]


def lines(values: list[float], marked: int | None = None, first: int = 1) -> Element:
    xs = list(range(first, first + len(values)))
    return parsed(line_chart("Loss", xs, [Series("loss", values)], LABELS, str, marked))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3.65, 6.37, [3, 4, 5, 6, 7]),
        (0, 0.0421, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
        (0, 123456, [0, 25000, 50000, 75000, 100000, 125000]),
        (5, 5, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
        (0, 0, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]),
        (-2, 2, [-2, -1, 0, 1, 2]),
    ],
)
def test_ticks_are_round_and_hold_all_values(low, high, expected):
    ticks = nice_ticks(low, high)
    assert ticks == pytest.approx(expected) or (low == high and ticks[0] <= low <= ticks[-1] and len(ticks) <= 7)
    assert ticks[0] <= low and ticks[-1] >= high


def test_ticks_of_what_is_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        nice_ticks(0, float("nan"))


def test_a_line_joins_its_points_from_left_to_right_and_higher_values_are_higher():
    svg = lines([4.0, 2.0, 3.0])
    (line,) = of_class(svg, "line-1")
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert points == [(LEFT + 8, TOP), ((LEFT + RIGHT) / 2, BOTTOM), (RIGHT - 8, (TOP + BOTTOM) / 2)]
    assert texts(svg, "label") == ["loss", "epoch"]
    assert [part.find("title").text for part in of_class(svg, "dot")] == [
        "loss, epoch 1: 4.0",
        "loss, epoch 2: 2.0",
        "loss, epoch 3: 3.0",
    ]


def test_the_marked_point_has_a_line_and_its_number():
    svg = lines([4.0, 2.0, 3.0], marked=2)
    (mark,) = of_class(svg, "mark")
    (dot,) = of_class(svg, "best")
    assert mark.get("x1") == mark.get("x2") == dot.get("cx") == str((LEFT + RIGHT) / 2)
    assert texts(svg, "note") == ["best: 2"]
    assert not of_class(lines([4.0, 2.0], marked=9), "mark")


def test_one_point_is_drawn_in_the_middle():
    svg = lines([4.0], marked=1)
    assert of_class(svg, "dot")[0].get("cx") == str((LEFT + RIGHT) / 2)


def test_a_long_line_is_thinned_and_keeps_its_ends_and_its_mark():
    svg = lines([float(number % 7) for number in range(5000)], marked=2345)
    (line,) = of_class(svg, "line-1")
    points = line.get("points").split()
    assert len(points) < 500 and points[0].startswith(f"{LEFT + 8}") and points[-1].startswith(f"{RIGHT - 8}")
    assert len(of_class(svg, "dot")) == 1
    labels = texts(svg, "tick")
    assert "1" in labels and "5,000" in labels


@pytest.mark.parametrize(
    ("count", "expected"), [(5, ["1", "2", "3", "4", "5"]), (16, ["1", "4", "6", "8", "10", "12", "14", "16"])]
)
def test_x_labels_are_whole_numbers_with_room_between_them(count, expected):
    svg = lines([float(number) for number in range(count)])
    below = [part.text for part in of_class(svg, "tick") if part.get("text-anchor") == "middle"]
    assert below == expected


def test_two_lines_have_a_legend():
    svg = parsed(line_chart("a", [1, 2], [Series("HR", [1, 2]), Series("NDCG", [0, 1])], LABELS, str))
    assert sorted(texts(svg, "legend")) == ["HR", "NDCG"]
    assert not texts(lines([1.0, 2.0]), "legend")


def test_bars_start_at_zero_and_carry_their_intervals():
    svg = parsed(bar_chart("a", [Bar("4", 0.5, 0.25, 0.75, "half"), Bar("5", 1.0)], LABELS, str, 1.0, (0.5, "all")))
    half, whole = of_class(svg, "bar")
    height = BOTTOM - TOP
    assert float(half.get("y")) == TOP + height / 2 and float(half.get("height")) == height / 2
    assert float(whole.get("y")) == TOP and float(whole.get("height")) == height
    (interval,) = of_class(svg, "interval")
    assert f",{TOP + height * 0.25}h8" in interval.get("d") and f"V{TOP + height * 0.75}m" in interval.get("d")
    level = of_class(svg, "level")[0]
    assert float(level.get("y1")) == TOP + height / 2 and texts(svg, "legend") == ["all"]
    assert [part.text for part in svg.iter("title")] == ["half", "5: 1.0"]


def test_bars_of_nothing_stand_on_the_axis():
    svg = parsed(bar_chart("a", [Bar("4", 0.0), Bar("5", 0.0)], LABELS, str))
    assert [part.get("height") for part in of_class(svg, "bar")] == ["0.5", "0.5"]


def test_many_bars_leave_labels_out_that_would_overlap():
    svg = parsed(bar_chart("a", [Bar(str(number), 0.5) for number in range(60)], LABELS, str))
    below = [part.text for part in of_class(svg, "tick") if part.get("text-anchor") == "middle"]
    assert below[0] == "0" and len(below) < 25 and len(of_class(svg, "bar")) == 60


def test_texts_are_data():
    nasty = '</svg><script>alert("1")</script>\x00\u202e'
    svg = parsed(bar_chart(nasty, [Bar(nasty, 1.0, note=nasty)], (nasty, nasty), str, None, (0.5, nasty)))
    assert {part.tag for part in svg.iter()} == {"svg", "g", "rect", "text", "title", "line"}
    assert svg.get("aria-label").endswith("\\x00\\u202e")


def test_charts_of_nothing_are_refused():
    with pytest.raises(ValueError, match="expected bars"):
        bar_chart("a", [], LABELS, str)
    with pytest.raises(ValueError, match="one value for each of 2"):
        line_chart("a", [1, 2], [Series("loss", [1.0])], LABELS, str)
