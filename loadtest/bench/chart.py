"""Line charts as SVG, without a library: panels side by side, a logarithmic x axis, a y axis from zero, one legend.

Lines differ in colour (Okabe and Ito's, which colour-blind eyes tell apart), mark and dashes. The background is white
whatever page the picture stands on.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

PANEL_WIDTH, PANEL_HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 68, 18, 40, 48  # around a panel's axes
HEAD = 76  # title and legend
MIN_TICK_GAP = 26  # pixels between two labels of the x axis
NUM_Y_TICKS = 5
INK, GRID = "#222222", "#dddddd"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKS = ("circle", "square", "diamond", "triangle")

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line: its name in the legend, and its points by rising x, which is above 0."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `mark` is an x that gets a line of its own, with words beside it."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    mark: tuple[float, str] | None = None


def draw(title: str, panels: Sequence[Panel], *, columns: int = 2) -> str:
    """The whole picture, as a file's text. Lines of one name look alike in all panels. Raises: ValueError for no point."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    columns = min(columns, len(panels))
    width = columns * PANEL_WIDTH
    height = HEAD + math.ceil(len(panels) / columns) * PANEL_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(width / 2, 26, title, size=min(16, int(1.6 * width / len(title))), anchor="middle", weight="bold"),
        *_legend(names, width),
    ]
    for number, panel in enumerate(panels):
        x, y = number % columns * PANEL_WIDTH, HEAD + number // columns * PANEL_HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel, names), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def nice_ticks(highest: float) -> list[float]:
    """Round numbers from 0 to the first that is not below the highest value: steps of 1, 2 or 5 times a power of ten."""
    if not highest > 0:
        return [0.0, 1.0]
    rough = highest / NUM_Y_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(highest / step - 1e-9) + 1)]


def _panel(panel: Panel, names: Sequence[str]) -> Iterator[str]:
    points = [point for line in panel.lines for point in line.points]
    if not points:
        raise ValueError(f"the panel {panel.title!r} has no point")
    xs = sorted({x for x, _ in points})
    ticks = nice_ticks(max(y for _, y in points))
    first, last = math.log(xs[0]), math.log(xs[-1])
    inner_width, inner_height = PANEL_WIDTH - LEFT - RIGHT, PANEL_HEIGHT - TOP - BOTTOM
    bottom = TOP + inner_height

    def place(x: float, y: float) -> Point:
        share = (math.log(x) - first) / (last - first) if last > first else 0.5
        return LEFT + share * inner_width, bottom - y / ticks[-1] * inner_height

    yield _text(LEFT, TOP - 14, panel.title, size=13, weight="bold")
    for tick in ticks:
        y = place(xs[0], tick)[1]
        yield f'<path d="M{LEFT} {y:.1f}h{inner_width}" stroke="{INK if not tick else GRID}"/>'
        yield _text(LEFT - 8, y + 4, f"{tick:g}", anchor="end")
    for tick in _spread_out(xs, [place(x, 0)[0] for x in xs]):
        x = place(tick, 0)[0]
        yield f'<path d="M{x:.1f} {bottom}v5" stroke="{INK}"/>'
        yield _text(x, bottom + 18, f"{tick:g}", anchor="middle")
    yield _text(LEFT + inner_width / 2, bottom + 38, panel.x_label, anchor="middle")
    yield (
        f'<text transform="translate(16 {TOP + inner_height / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(panel.y_label)}</text>"
    )
    if panel.mark is not None and xs[0] <= panel.mark[0] <= xs[-1]:
        x = place(panel.mark[0], 0)[0]
        yield f'<path d="M{x:.1f} {TOP}v{inner_height}" stroke="#888888" stroke-dasharray="1 3"/>'
        yield _text(x - 4, TOP + 11, panel.mark[1], size=11, anchor="end", colour="#666666")
    for line in panel.lines:
        number, places = names.index(line.name), [place(*point) for point in line.points]
        yield from _line(places, number)
        for at in places:
            yield _mark(*at, number)


def _spread_out(values: Sequence[float], places: Sequence[float]) -> list[float]:
    """Those of the values whose labels do not run into the one before; the last one always."""
    kept = [0]
    for index in range(1, len(values)):
        if places[index] - places[kept[-1]] >= MIN_TICK_GAP:
            kept.append(index)
    if kept[-1] != len(values) - 1:
        kept[-1:] = [len(values) - 1] if len(kept) > 1 else [0, len(values) - 1]
    return [values[index] for index in kept]


def _line(places: Sequence[Point], number: int) -> Iterator[str]:
    dashes = DASHES[number % len(DASHES)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    yield f'<path d="M{path}" fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"{dashed}/>'


def _mark(x: float, y: float, number: int) -> str:
    look = f'fill="{COLOURS[number % len(COLOURS)]}" stroke="#ffffff"'
    match MARKS[number % len(MARKS)]:
        case "circle":
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {look}/>'
        case "square":
            return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" {look}/>'
        case "diamond":
            return f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z" {look}/>'
        case _:
            return f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" {look}/>'


def _legend(names: Sequence[str], width: float) -> Iterator[str]:
    lengths = [52 + 7 * len(name) for name in names]
    x = (width - sum(lengths)) / 2
    for number, (name, length) in enumerate(zip(names, lengths, strict=True)):
        yield from _line([(x, 52), (x + 28, 52)], number)
        yield _mark(x + 14, 52, number)
        yield _text(x + 36, 56, name)
        x += length


def _text(
    x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", weight: str = "normal", colour: str = INK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{colour}">{escape(words)}</text>'
    )
