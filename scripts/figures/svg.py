"""SVG by small functions: boxes, words and wires, in colours that a browser chooses by light and dark.

Fonts are those of the system, so a text's width is not known here: it is estimated by the widest that are common, and
what would not fit is refused.
"""

from collections.abc import Sequence
from functools import reduce
from html import escape
from operator import add

Point = tuple[float, float]

FONTS = {
    "sans": 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif',
    "mono": 'ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace',
}
# What a letter takes, by the size of the font: small ones, capital ones and the widest, as DejaVu has them.
ADVANCE = {"sans": (0.6, 0.77, 0.98), "bold": (0.69, 0.83, 1.05), "mono": (0.62, 0.62, 0.62)}

# The kinds of boxes, as (fill, line) in light and in dark.
KINDS = {
    "plain": (("#ffffff", "#8a94a3"), ("#1b2028", "#7f8a9a")),
    "norm": (("#e9ecf1", "#7b8696"), ("#303743", "#8c97a8")),
    "attention": (("#dce8fd", "#3a72cf"), ("#1d3459", "#6c9ff2")),
    "mlp": (("#d8f1e4", "#1d8f62"), ("#123c2e", "#43bd8c")),
    "mamba": (("#eae0fb", "#7c4fcb"), ("#37275c", "#ab8cec")),
    "experts": (("#fde6cf", "#c46d18"), ("#4b3014", "#e39c52")),
    "mark": (("#ffe27a", "#c99700"), ("#6b5200", "#e0b53a")),
    "band": (("#f5f7fa", "#d5dae2"), ("#20262f", "#3a4350")),
    "card": (("#ffffff", "#dfe3ea"), ("#161a21", "#343c48")),
}
INK = (("#1c2430", "#5b6675"), ("#e8ebf0", "#a5afbd"))  # of words and wires: the strong, the faint

RADIUS = 7.0  # of a corner of a wire
ARROW = 7.0


def width_of(text: str, size: float, face: str = "sans") -> float:
    """What a text takes at most."""
    small, capital, widest = ADVANCE[face]
    letters = [widest if one in "mwMW→" else capital if one.isupper() else small for one in text]
    return size * reduce(add, letters, 0.0)  # of floats, `sum` rounds otherwise since Python 3.12


def wrapped(text: str, size: float, width: float, face: str = "mono") -> list[str]:
    """A text in lines that fit, broken behind a colon or at spaces, and behind underscores where a word is too long."""
    begin, colon, rest = text.partition(": ")
    if colon and width_of(text, size, face) > width:
        return [f"{begin}:", *wrapped(rest, size, width, face)]
    lines = [""]
    for word in text.split():
        if lines[-1] and width_of(f"{lines[-1]} {word}", size, face) > width:
            lines.append("")
        line = f"{lines[-1]} {word}".strip()
        pieces = [line] if width_of(line, size, face) <= width else line.replace("_", "_\0").split("\0")
        lines[-1] = pieces[0]
        for piece in pieces[1:]:
            if width_of(lines[-1] + piece, size, face) > width:
                lines.append("")
            lines[-1] += piece
    return lines


class Drawing:
    """The parts of one picture; y grows downwards, as SVG has it, and may begin below zero."""

    def __init__(self, title: str, description: str):
        self.title, self.description = title, description
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, kind: str, radius: float = 6, more: str = ""
    ) -> None:
        """A rectangle with its upper left corner at (x, y); `more` are further classes."""
        place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="{_n(radius)}"'
        self.parts.append(f'<rect class="{f"{kind} {more}".strip()}" {place}/>')

    def text(
        self, x: float, y: float, text: str, size: float = 12, face: str = "sans", anchor: str = "middle",
        faint: bool = False, room: float | None = None,
    ) -> None:  # fmt: skip
        """A line of text with its middle at the height y; raises ValueError where it may be wider than `room`."""
        if room is not None and width_of(text, size, face) > room:
            raise ValueError(f"{text!r} may take {width_of(text, size, face):.0f} units, and has {room:.0f}.")
        classes = " ".join([face, *(["faint"] if faint else []), *([anchor] if anchor != "middle" else [])])
        place = f'x="{_n(x)}" y="{_n(y + 0.35 * size)}" font-size="{_n(size)}"'
        self.parts.append(f'<text class="{classes}" {place}>{escape(text, quote=False)}</text>')

    def badge(
        self, x: float, y: float, text: str, size: float = 11, is_marked: bool = True, room: float | None = None
    ) -> None:
        """A text around (x, y), on a ground of its own where it is marked."""
        if is_marked:
            width, height = width_of(text, size) + 12, size + 5
            self.box(x - width / 2, y - height / 2, width, height, "mark", 4)
        self.text(x, y, text, size, room=None if room is None else room - 12 * is_marked)

    def operator(self, x: float, y: float, label: str, radius: float = 10) -> None:
        """A circle with + or × in it, drawn by strokes: letters are not in the middle of their line."""
        a = 0.5 * radius if label == "+" else 0.38 * radius
        ends = ((-a, 0, a, 0), (0, -a, 0, a)) if label == "+" else ((-a, -a, a, a), (-a, a, a, -a))
        path = "".join(f"M{_n(x + x0)} {_n(y + y0)}L{_n(x + x1)} {_n(y + y1)}" for x0, y0, x1, y1 in ends)
        self.parts.append(f'<circle class="plain strong" cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"/>')
        self.parts.append(f'<path class="stroke" d="{path}"/>')

    def dot(self, x: float, y: float) -> None:
        """Where a line leaves another."""
        self.parts.append(f'<circle class="dot" cx="{_n(x)}" cy="{_n(y)}" r="3.5"/>')

    def wire(self, points: Sequence[Point], has_arrow: bool = True, more: str = "") -> None:
        """A line through points, with round corners and an arrow at its end."""
        points = [point for i, point in enumerate(points) if not i or point != points[i - 1]]
        (x0, y0), (x1, y1) = points[-2:]
        length = abs(x1 - x0) + abs(y1 - y0)
        u, v = (x1 - x0) / length, (y1 - y0) / length
        if has_arrow:
            points = [*points[:-1], (x1 - u * (ARROW - 1), y1 - v * (ARROW - 1))]
        path = f"M{_n(points[0][0])} {_n(points[0][1])}"
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            (ax, ay), (bx, by) = _towards(corner, before), _towards(corner, after)
            path += f"L{_n(ax)} {_n(ay)}Q{_n(corner[0])} {_n(corner[1])} {_n(bx)} {_n(by)}"
        path += f"L{_n(points[-1][0])} {_n(points[-1][1])}"
        self.parts.append(f'<path class="{f"wire {more}".strip()}" d="{path}"/>')
        if has_arrow:
            a, b = ARROW, 0.55 * ARROW
            corners = ((x1, y1), (x1 - a * u - b * v, y1 - a * v + b * u), (x1 - a * u + b * v, y1 - a * v - b * u))
            tip = " ".join(f"{_n(x)},{_n(y)}" for x, y in corners)
            self.parts.append(f'<polygon class="dot" points="{tip}"/>')

    def document(self, width: float, height: float, top: float = 0) -> str:
        """The whole file; what is drawn is between `top` and `top + height`."""
        box = f"0 {_n(top)} {_n(width)} {_n(height)}"
        card = (
            f'<rect class="card" x=".5" y="{_n(top + 0.5)}" width="{_n(width - 1)}" height="{_n(height - 1)}" rx="10"/>'
        )
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{_n(width)}" height="{_n(height)}" '
            'role="img" aria-labelledby="title desc">'
        )
        words = [
            f'<title id="title">{escape(self.title, quote=False)}</title>',
            f'<desc id="desc">{escape(self.description, quote=False)}</desc>',
        ]
        return "\n".join([opening, *words, f"<style>\n{_style()}</style>", card, *self.parts, "</svg>\n"])


def _style() -> str:
    lines = [f".{face}{{font-family:{fonts}}}" for face, fonts in FONTS.items()]
    lines += [f".bold{{font-family:{FONTS['sans']};font-weight:650}}", "text{text-anchor:middle}"]
    lines += [".start{text-anchor:start}", ".end{text-anchor:end}"]
    lines += ["rect,circle{stroke-width:1.2}", ".frame{fill:none;stroke-dasharray:5 4}", ".strong{stroke-width:1.6}"]
    lines += [".wire,.stroke{fill:none;stroke-width:1.6}", ".stroke{stroke-width:2;stroke-linecap:round}"]
    lines += [".stream{stroke-width:3}", ".dashed{stroke-dasharray:4 4}", ".dot{stroke:none}"]
    return "\n".join([*lines, *_colours(0), "@media (prefers-color-scheme:dark){", *_colours(1), "}"]) + "\n"


def _colours(mode: int) -> list[str]:
    strong, faint = INK[mode]
    lines = [f".{kind}{{fill:{modes[mode][0]};stroke:{modes[mode][1]}}}" for kind, modes in KINDS.items()]
    lines += [f"text{{fill:{strong}}}", f"text.faint{{fill:{faint}}}", f".dot{{fill:{faint}}}", ".frame{fill:none}"]
    return [*lines, f".wire,.strong,.frame{{stroke:{faint}}}", f".stream,.stroke{{stroke:{strong}}}"]


def _towards(corner: Point, end: Point) -> Point:
    """A point between a corner and the next one, where the corner's arc begins."""
    (x, y), (dx, dy) = corner, (end[0] - corner[0], end[1] - corner[1])
    length = abs(dx) + abs(dy)
    share = min(RADIUS, length / 2) / length
    return x + share * dx, y + share * dy


def _n(number: float) -> str:
    """A number in as few digits as a picture needs."""
    return f"{round(number, 2) + 0.0:g}"
