from xml.etree import ElementTree

import pytest

from loadtest.bench.chart import Line, Panel, draw, nice_ticks

SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def places(picture: str) -> list[tuple[float, float]]:
    """Where the circles are: of the first line's points, and before them in the legend."""
    circles = ElementTree.fromstring(picture).iter(f"{SVG}circle")
    return [(float(circle.get("cx", "")), float(circle.get("cy", ""))) for circle in circles][1:]


def panel(*points: tuple[float, float], name: str = "zipf") -> Panel:
    return Panel("text", "adapters", "requests/s", [Line(name, points)])


def test_equal_factors_are_equally_far_apart_and_zero_is_at_the_bottom() -> None:
    (x0, y0), (x1, y1), (x2, y2) = places(draw("t", [panel((1, 0), (4, 50), (16, 100))]))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y1 < y0


def test_title_axes_marks_and_legend_are_in_the_picture_on_white() -> None:
    first = Panel("text", "adapters", "requests/s", [Line("zipf", [(1, 3), (64, 9)])], mark=(32, "32 slots"))
    second = panel((2, 1), (8, 2), name="uniform & more")
    picture = draw("Throughput <measured>", [first, second])
    words = texts(picture)
    for word in ("Throughput <measured>", "adapters", "requests/s", "32 slots", "zipf", "uniform & more", "1", "64"):
        assert word in words
    assert words.count("zipf") == 1
    background = next(ElementTree.fromstring(picture).iter(f"{SVG}rect"))
    assert (background.get("fill"), background.get("width")) == ("#ffffff", "880")


def test_lines_differ_in_more_than_colour() -> None:
    lines = [Line(str(number), [(1, number + 1), (2, number + 2)]) for number in range(4)]
    root = ElementTree.fromstring(draw("t", [Panel("p", "x", "y", lines)]))
    drawn = [path for path in root.iter(f"{SVG}path") if path.get("stroke-width") == "2"]
    looks = {(path.get("stroke"), path.get("stroke-dasharray")) for path in drawn}
    assert len(looks) == 4 == len({dashes for _, dashes in looks}) == len({colour for colour, _ in looks})


def test_labels_that_would_run_into_each_other_are_left_out() -> None:
    words = texts(draw("t", [panel((1, 1), (32, 1), (33, 1), (1024, 1))]))
    assert "32" in words and "33" not in words and "1024" in words
    assert "33" in texts(draw("t", [panel((32, 1), (33, 1))]))


def test_a_single_point_is_a_picture_and_no_point_is_none() -> None:
    assert len(places(draw("t", [panel((8, 5))]))) == 1
    with pytest.raises(ValueError, match="no point"):
        draw("t", [panel()])


@pytest.mark.parametrize(
    "highest, ticks", [(0, [0, 1]), (1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (930, [0, 200, 400, 600, 800, 1000])]
)
def test_ticks_are_round_and_reach_the_highest_value(highest: float, ticks: list[float]) -> None:
    assert nice_ticks(highest) == pytest.approx(ticks)
