"""Inline SVG and colours of the report: pure functions from numbers to escaped markup.

Every string goes through markupsafe, so a task id cannot leave its text node. Colours come from CSS classes
with a light and a dark value; the hues of Okabe and Ito (2008) suit colour-blind readers.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

STEPS = 16
"""Shades of a heat map. The numbers are in the cells, so a shade only has to guide the eye."""

RAMPS = {  # name: (light mode: low, middle, high), (dark mode: low, middle, high)
    "blue": (("#eff5fb", "#6baed6", "#08306b"), ("#1d2733", "#2f7fb8", "#bfe3ff")),
    "orange": (("#fdf3e9", "#f0914a", "#6e2a00"), ("#2b231c", "#c2661c", "#ffd9b0")),
    "green": (("#ecf6f2", "#4fb39a", "#00463a"), ("#1b2926", "#23806a", "#b5efdc")),
}
MOST_NOTES = 600
"""A map of more cells has no hover texts, which would make most of the page's size."""
BIDI = {0x202A, 0x202B, 0x202C, 0x202D, 0x202E, 0x2066, 0x2067, 0x2068, 0x2069}
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-4.5L4.5 3.5h-9z",
    "M0-5L5 0L0 5L-5 0z",
)


@dataclass(frozen=True)
class Line:
    """A line of a chart: points are (tasks learned, score), the shade picks colour and marker."""

    name: str
    points: Sequence[tuple[int, float]]
    shade: int
    is_dashed: bool = False
    is_main: bool = False
    notes: Sequence[str] = ()
    """Hover text of each point in addition to its number."""
    band: Sequence[tuple[float, float]] = ()
    """(low, high) around each point; empty for a single run."""


def clean(text: object) -> str:
    """Return one line of visible text: control and text-direction characters are replaced."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in {"Cc", "Cs"} or ord(c) in BIDI else c
        for c in str(text)
    )


def shorten(text: object, limit: int) -> str:
    """Return the text in at most `limit` characters; the cut is in the middle: task ids differ at both ends."""
    text = clean(text)
    head = (limit - 1) * 2 // 5
    return text if len(text) <= limit else f"{text[:head]}…{text[head + 1 - limit :]}"


def heat_class(value: float, low: float, high: float, ramp: str = "blue") -> str:
    """Return the CSS class of a value's shade between low and high."""
    return f"h-{ramp}-{heat_step(value, low, high)}"


def heat_step(value: float, low: float, high: float) -> int:
    """Return which of the shades, from 0 to STEPS - 1, a value between low and high has."""
    share = (value - low) / (high - low) if high > low else 1.0
    return min(STEPS - 1, max(0, int(share * STEPS)))


def heat_css() -> Markup:
    """Return the rules of all shades, for both colour schemes, with the ink that is easier to read on each."""
    schemes = [
        "".join(
            f".h-{name}-{k}{{--shade:{(fill := shade(name, k, dark=dark))};--ink:{ink(fill)}}}"
            for name in RAMPS
            for k in range(STEPS)
        )
        for dark in (False, True)
    ]
    return Markup("{}@media(prefers-color-scheme:dark){{{}}}").format(*map(Markup, schemes))


def shade(ramp: str, step: int, *, dark: bool = False) -> str:
    """Return the colour of one step of a ramp as #rrggbb."""
    low, middle, high = ([int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in RAMPS[ramp][1 if dark else 0])
    place = 2 * step / (STEPS - 1)
    start, end, share = (low, middle, place) if place <= 1 else (middle, high, place - 1)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(start, end, strict=True))


def contrast(one: str, two: str) -> float:
    """Return the WCAG 2 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(two)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def ink(fill: str) -> str:
    """Return black or white, whichever reads better on the fill."""
    return max(("#000000", "#ffffff"), key=lambda colour: contrast(fill, colour))


def tag(name: str, *body: object, **attributes: object) -> Markup:
    """Return an element; attributes write '-' as '_', may end in '_', and are left out if None."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), round(v, 1) if isinstance(v, float) else v)
        for key, v in attributes.items()
        if v is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, pairs, Markup("").join(escape(part) for part in body))


def svg(width: float, height: float, title: str, *body: object) -> Markup:
    """Return a drawing at its natural size, with a description for screen readers."""
    size = f"0 0 {width:g} {height:g}"
    return tag("svg", tag("title", title), *body, width=width, height=height, viewBox=size, role="img")


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart to `gap` where possible, keeping their order and staying between low and high."""
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    order = sorted(range(len(places)), key=lambda i: places[i])
    result = list(places)
    floor = low
    for i in order:
        result[i] = floor = max(result[i], floor)
        floor += gap
    ceiling = high
    for i in reversed(order):
        result[i] = ceiling = min(result[i], ceiling)
        ceiling -= gap
    return result


def score_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of an axis that holds all values, ending on multiples of 0.05."""
    return max(0.0, math.floor(min(values) * 20) / 20), min(1.0, math.ceil(max(values) * 20) / 20 or 0.05)


def ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers from low to high."""
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / s < 6.5)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(lines: Sequence[Line], width: int, title: str) -> Markup:
    """Return scores over the tasks learned so far, each line named at its end instead of in a legend."""
    height = max(250, 60 + 17 * len(lines))
    label_width = min(max(len(line.name) for line in lines) * 7.8 + 30, width // 3 + 10)
    left, right, top, bottom = 40, width - label_width, 12, height - 42
    last = max(x for line in lines for x, _ in line.points)
    edges = [y for line in lines for pair in line.band for y in pair]
    low, high = score_range([max(0.0, min(1.0, y)) for y in [y for line in lines for _, y in line.points] + edges])

    def at(x: float, y: float) -> tuple[float, float]:
        across, y = (x - 1) / max(last - 1, 1), max(low, min(high, y))
        return left + 8 + across * (right - left - 16), bottom - (y - low) / (high - low or 1) * (bottom - top)

    body = []
    for y in ticks(low, high):
        level = at(1, y)[1]
        body.append(tag("line", class_="grid", x1=left, x2=right, y1=level, y2=level))
        body.append(tag("text", f"{y:.2f}", class_="tick", x=left - 6, y=level + 4, text_anchor="end"))
    every = math.ceil(last * 26 / (right - left))
    body += [
        tag("text", x, class_="tick", x=at(x, low)[0], y=bottom + 18, text_anchor="middle")
        for x in range(1, last + 1, every)
    ]
    middle = (left + right) / 2
    body.append(tag("text", "tasks learned so far", class_="tick", x=middle, y=bottom + 36, text_anchor="middle"))
    ends = [at(*line.points[-1]) for line in lines]
    for line, end, label in zip(lines, ends, spread([y for _, y in ends], 16, top, bottom), strict=True):
        places = [at(*point) for point in line.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        style = f"series s{line.shade % 8}{' dashed' if line.is_dashed else ''}{' main' if line.is_main else ''}"
        notes = line.notes or [""] * len(places)
        marks = [
            tag(
                "path",
                tag("title", f"{clean(line.name)}, after {point[0]}: {point[1]:.4f}{note and f' ({note})'}"),
                class_="mark",
                d=MARKERS[line.shade % 4],
                transform=f"translate({x:.1f} {y:.1f})",
            )
            for (x, y), point, note in zip(places, line.points, notes, strict=True)
        ]
        leader = f"M{end[0] + 5:.1f} {end[1]:.1f}L{right + 8} {label:.1f}"
        name = shorten(line.name, int((label_width - 14) / 7.8))
        note = f"{clean(line.name)}: {', '.join(f'{y:.3f}' for _, y in line.points)}"
        text = tag("text", name, class_="name", x=right + 12, y=label + 4)
        if line.band:
            edge = [at(x, y[1]) for (x, _), y in zip(line.points, line.band, strict=True)]
            edge += [at(x, y[0]) for (x, _), y in reversed(list(zip(line.points, line.band, strict=True)))]
            outline = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in edge) + "z"
            body.append(tag("path", class_=f"band s{line.shade % 8}", d=outline))
        parts = (tag("path", class_="leader", d=leader), tag("path", class_="line", d=path), *marks, text)
        body.append(tag("g", tag("title", note), *parts, class_=style))
    return svg(width, height, title, *body)


def spark(points: Sequence[tuple[int, float]], last: int, bounds: tuple[float, float], base: float | None) -> Markup:
    """Return a small chart of one task: its score since it was learned, dashed the majority class."""
    width, height = 180, 64
    low, high = bounds

    def at(x: float, y: float) -> tuple[float, float]:
        across = 8 + (x - 1) / max(last - 1, 1) * (width - 16)
        return across, height - 6 - (y - low) / (high - low or 1) * (height - 12)

    places = [at(*point) for point in points]
    body = [tag("line", class_="grid", x1=0, x2=width, y1=at(1, y)[1], y2=at(1, y)[1]) for y in bounds]
    if base is not None and low <= base <= high:
        body.append(tag("line", class_="base", x1=0, x2=width, y1=at(1, base)[1], y2=at(1, base)[1]))
    body.append(tag("path", class_="line", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)))
    body += [
        tag("circle", tag("title", f"after task {t}: {score:.4f}"), class_="mark", cx=x, cy=y, r=3)
        for (x, y), (t, score) in zip(places, points, strict=True)
    ]
    note = f"score after each task: {', '.join(f'{y:.3f}' for _, y in points)}"
    return svg(width, height, note, tag("g", *body, class_="series s0"))


def curve(
    losses: Sequence[tuple[int, float]],
    dev: Sequence[tuple[int, float]],
    highest: float,
    bounds: tuple[float, float] | None,
) -> Markup:
    """Return a task's learning curves over its optimizer steps: the loss, and below it the dev accuracy.

    Args:
        losses: (step, training loss).
        dev: (step, accuracy on dev rows).
        highest: Top of the loss axis, which begins at 0.
        bounds: Range of the accuracy axis; None leaves the lower chart out.
    """
    width, top, tall, gap, small = 250, 8, 78, 22, 52
    left, last = 30, max(step for points in (losses, dev) for step, _ in points)

    def across(step: int) -> float:
        return left + 4 + step / last * (width - left - 12)

    def path(points: Sequence[tuple[float, float]]) -> Markup:
        return tag("path", class_="line", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points))

    def axis(y: float, text: str) -> list[Markup]:
        line = tag("line", class_="grid", x1=left, x2=width, y1=y, y2=y)
        return [line, tag("text", text, class_="tick", x=left - 4, y=y + 4, text_anchor="end")]

    body = [*axis(top, f"{highest:.2g}"), *axis(top + tall, "0")]
    if losses:
        places = [(across(step), top + tall * (1 - min(loss / (highest or 1), 1.0))) for step, loss in losses]
        marks = [
            tag("circle", tag("title", f"step {step}: loss {loss:.4f}"), class_="spot", cx=x, cy=y, r=4)
            for (x, y), (step, loss) in zip(places, losses, strict=True)
        ]
        shown = marks[:: max(1, len(marks) // 20)]
        body.append(tag("g", path(places), *shown, class_="series s0"))
    bottom = top + tall
    if bounds is not None:
        low, high = bounds
        first, bottom = bottom + gap, bottom + gap + small
        body += [*axis(first, f"{high:.2f}"), *axis(bottom, f"{low:.2f}")]
        places = [(across(step), bottom - (score - low) / (high - low or 1) * small) for step, score in dev]
        marks = [
            tag("circle", tag("title", f"step {step}: dev accuracy {score:.4f}"), class_="mark", cx=x, cy=y, r=3)
            for (x, y), (step, score) in zip(places, dev, strict=True)
        ]
        body.append(tag("g", *([path(places)] if dev else []), *marks, class_="series s1"))
    body.append(tag("text", f"step {last}", class_="tick", x=width, y=bottom + 15, text_anchor="end"))
    return svg(width, bottom + 18, f"loss and dev accuracy over {last} optimizer steps", *body)


def layer_map(rows: Sequence[tuple[str, Sequence[float | None]]], notes: Sequence[Sequence[str]], ramp: str) -> Markup:
    """Return fractions as percent: a row per layer, the last one their mean, and a column per task."""
    num_tasks = len(rows[0][1])
    wide, tall, style = (38, 19, "cell") if num_tasks <= 8 else (22, 16, "dense cell")
    left = 12 + 6.2 * max(len(shorten(name, 16)) for name, _ in rows)
    body = [
        tag("text", k + 1, class_="tick", x=left + (k + 0.5) * wide, y=12, text_anchor="middle")
        for k in range(num_tasks)
    ]
    for i, ((name, values), texts) in enumerate(zip(rows, notes, strict=True)):
        y = 18.0 + i * tall + (6 if i == len(rows) - 1 else 0)
        body.append(tag("text", shorten(name, 16), class_="tick", x=left - 8, y=y + tall / 2 + 4, text_anchor="end"))
        for k, (value, note) in enumerate(zip(values, texts, strict=True)):
            shown = "void" if value is None else heat_class(value, 0, 1, ramp)
            x = left + k * wide
            box = tag("rect", x=x, y=y, width=wide - 1, height=tall - 1)
            number = "" if value is None else f"{100 * value:.0f}"
            text = tag("text", number, x=x + (wide - 1) / 2, y=y + tall / 2 + 3.5)
            hover = [tag("title", note)] if num_tasks * len(rows) <= MOST_NOTES else []
            body.append(tag("g", *hover, box, text, class_=f"{style} {shown}"))
    height = 18 + len(rows) * tall + 8
    return svg(left + num_tasks * wide, height, "heat map of layers and tasks, in percent", *body)


def arcs(
    names: Sequence[str], opened: Sequence[Sequence[float | None]], width: int, *, strongest: int, least: float
) -> Markup:
    """Return tasks down the page and an arc from an earlier task to each later one that opens its capsule.

    Args:
        names: The tasks in learned order.
        opened: opened[u][i] is how often task u opens the capsule of task i < u.
        width: Of the drawing, in pixels.
        strongest: Largest number of arcs into a task; weaker ones are left out.
        least: Draw no arc below this value.
    """
    row = 30
    labels = [f"{k} {shorten(name, 17)}" for k, name in enumerate(names, 1)]
    left = 24.0 + min(max(len(label) for label in labels) * 7.4, 150)
    reach = (len(names) - 1) * row / 2
    flat = min(1.8, (width - left - 10) / max(reach, 1))
    body = []
    for u, label in enumerate(labels):
        y = 18.0 + u * row
        known = [(value, i) for i, value in enumerate(opened[u]) if value is not None and value >= least]
        parts = []
        for value, i in sorted(known, reverse=True)[:strongest]:
            radius = (u - i) * row / 2
            path = f"M{left:.1f} {y - 2 * radius:.1f}A{radius * flat:.1f} {radius:.1f} 0 0 1 {left:.1f} {y:.1f}"
            note = f"{clean(names[u])} opens the capsule of {clean(names[i])}: {100 * value:.0f} %"
            width_px, strength = f"{0.8 + 4.5 * value:.1f}", f"{0.2 + 0.65 * value:.2f}"
            arc = tag("path", tag("title", note), class_="arc", d=path, stroke_width=width_px, opacity=strength)
            parts.append(arc)
        text = tag("text", tag("title", clean(names[u])), label, class_="name", x=left - 12, y=y + 4, text_anchor="end")
        body.append(tag("g", *parts, text, tag("circle", cx=left, cy=y, r=4.5), class_="into"))
    return svg(width, 36 + (len(names) - 1) * row, "arcs from earlier tasks to the later tasks that use them", *body)
