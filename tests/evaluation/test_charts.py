"""Charts: lengths are proportional, points are where their values say, and text cannot leave its element."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from lalia.evaluation.charts import Bar, Line, Point, Reference, bar_chart, line_chart, lines_chart, thin, ticks


def elements(svg, tag, css=None):
    found = ElementTree.fromstring(str(svg)).iter(tag)
    return [e for e in found if css is None or css in e.get("class", "").split()]


def test_bars_are_proportional_to_their_values():
    chart = bar_chart([Bar("a", 2.0, "2"), Bar("b", 8.0, "8"), Bar("c", 1.0, "1")], "test")
    assert [bar.get("width") for bar in elements(chart, "rect", "bar")] == ["25.00%", "100.00%", "12.50%"]


def test_text_is_escaped_once_and_parses():
    nasty = "</svg><script>alert('\"&')"
    chart = bar_chart([Bar(nasty, 1.0, nasty, nasty)], nasty)
    assert "<script" not in chart
    assert [e.text for e in elements(chart, "text")] == [nasty, nasty]
    lines = line_chart([Point(0, 0, nasty), Point(1, 1, nasty)], nasty, nasty, [Reference(0.5, nasty)])
    assert "<script" not in lines
    assert sum(e.text == nasty for e in elements(lines, "title")) == 3


def test_points_lie_on_the_scale_of_the_ticks():
    chart = line_chart([Point(0, 10, "first"), Point(30, 20, "middle"), Point(60, 40, "last")], "x", "y")

    def at(element, axis):
        return float(element.get(axis) or "nan")

    by_tick = {e.text: at(e, "y") - 4 for e in elements(chart, "text", "tick") if e.get("text-anchor") == "end"}
    hits = elements(chart, "circle", "hit")
    assert [at(hit, "cy") for hit in hits] == pytest.approx([by_tick["10"], by_tick["20"], by_tick["40"]])
    xs = [at(hit, "cx") for hit in hits]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert [e.text for e in elements(chart, "title")] == ["first", "middle", "last"]


def test_values_that_are_not_finite_are_left_out():
    chart = line_chart(
        [Point(0, math.nan, "a"), Point(1, 2.0, "b"), Point(2, math.inf, "c"), Point(3, 1.0, "d")], "x", "y"
    )
    assert [e.text for e in elements(chart, "title")] == ["b", "d"]
    assert "nan" not in chart and "inf" not in chart
    assert line_chart([Point(0, math.nan, "a")], "x", "y") == ""


def test_a_constant_line_is_drawn():
    chart = line_chart([Point(0, 3.0, "a"), Point(0, 3.0, "b")], "x", "y")
    assert len(elements(chart, "circle", "hit")) == 2


def test_thinning_keeps_the_mean_and_says_so():
    points = [Point(i, i % 7, f"p{i}") for i in range(1000)]
    fewer = thin(points, 100)
    assert len(fewer) == 100
    assert sum(p.y for p in fewer) / 100 == pytest.approx(sum(p.y for p in points) / 1000)
    assert "mean of 10 drawn" in fewer[0].title
    assert thin(points[:100], 100) == points[:100]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.93, 4.6), (0.001, 0.0013), (3, 3), (-2, 5), (0, 123456)])
def test_ticks_are_round_and_enclose_the_values(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    step = found[1] - found[0]
    assert float(f"{step:.0e}") == pytest.approx(step)
    assert f"{step:.0e}"[0] in "125"


def test_each_line_has_its_own_class_and_name():
    chart = lines_chart(
        [Line("a", [Point(0, 1, "p")]), Line("b", [Point(4, 2, "q"), Point(2, math.nan, "r")])], "x", "y"
    )
    groups = [e for e in ElementTree.fromstring(str(chart)) if e.get("class", "").startswith("line-")]
    assert [[t.text for t in group.iter("title")] for group in groups] == [["a: p"], ["b: q"]]
    assert lines_chart([Line("a", []), Line("b", [])], "x", "y") == ""
