"""The engine's parts, and what passes between them in a step."""

from collections.abc import Sequence
from typing import NamedTuple

from figures.svg import Drawing

WIDTH = 520.0
LEFT, MAIN, BETWEEN, SIDE = 20.0, 240.0, 84.0, 156.0  # the columns, from left to right
MARGIN, PAD = 10.0, 10.0  # of a band: outside and inside
DOWN, UP = 44.0, 236.0  # where the arrows between rows are
NAME, WORDS, SMALL, LINE = 13.0, 11.5, 11.0, 16.0
GAP = 54.0  # between two rows
HEADER = 24.0  # of a band
TITLE = "What passes between the parts of the engine"


class Part(NamedTuple):
    """A part: its file or folder, what is called in it, and what it does."""

    file: str
    call: str
    does: Sequence[str]

    @property
    def height(self) -> float:
        return 46 + LINE * len(self.does)


class Row(NamedTuple):
    """A part, and the one beside it; what goes there and back, down to the row below and up from it."""

    part: Part
    side: Part
    there: Sequence[str]
    back: Sequence[str]
    down: Sequence[str] = ()
    up: Sequence[str] = ()


class Band(NamedTuple):
    """Rows that deal with the same kind of things, and the threads that they run in."""

    things: str
    threads: str
    kind: str  # of its boxes, one of svg.KINDS
    rows: Sequence[Row]


BANDS = (
    Band("text", "the caller's thread", "plain", (
        Row(
            Part("llm.py", "LLM", ("generate, stream, chat:", "text in, text out")),
            Part("text/", "InputProcessor", ("and RequestState,", "with its detokenizer")),
            ("prompt,", "Update"), ("Sequence,", "text"),
            ("Sequence: token ids,", "SamplingParams"), ("Update: token id, logprobs,", "finish_reason"),
        ),
    )),
    Band("ints", "the engine's thread", "attention", (
        Row(
            Part("engine.py", "Engine.step", ("schedule, execute, update:", "appends tokens, ends sequences")),
            Part("scheduling/", "Scheduler", ("queues, token budget,", "blocks, state slots,", "prefix cache")),
            ("schedule()",), ("Scheduled",),
            ("Scheduled: new token ids,", "block_table, state_slot"), ("Sampled: token id,", "logprobs"),
        ),
    )),
    Band("arrays", "engine's and kernels' threads", "mlp", (
        Row(
            Part("model_runner.py", "ModelRunner.execute", ("chooses the rows to sample,", "accepts draft tokens")),
            Part("sampler.py", "Sampler", ("penalties, masks,", "temperature, top-p")),
            ("logits",), ("Sampled",),
            ("token ids, block tables,", "rows to sample"), ("Step: hidden states,", "logits of the rows"),
        ),
        Row(
            Part("models/forward.py", "ForwardPass", ("Batch: token_ids, positions,", "slot_mapping, block_tables")),
            Part("models/base.py", "DecoderModel", ("blocks with weights,", "called once per shape")),
            ("Batch,", "KVCache"), ("calls of", "kernels"),
            ("Program: kernels with", "their arrays, replayed"), ("hidden states, logits,", "the largest of each row"),
        ),
        Row(
            Part("tensor/", "Numba kernels", ("norms, matmuls, attention,", "Mamba2, experts, sampling")),
            Part("models/", "KVCache", ("blocks: keys, values;", "slots: Mamba2 states")),
            ("K, V at", "slot_mapping"), ("K, V by", "block_tables"),
        ),
    )),
)  # fmt: skip


def engine() -> str:
    """The SVG of the engine."""
    drawing = Drawing(TITLE, _description())
    drawing.text(WIDTH / 2, 26, TITLE, 14, "bold", room=WIDTH)
    y, tops = 46.0, list[float]()
    for band in BANDS:
        inside = sum(_height(row) for row in band.rows) + GAP * (len(band.rows) - 1)
        drawing.box(MARGIN, y, WIDTH - 2 * MARGIN, HEADER + inside + PAD, "band", 8)
        drawing.text(
            WIDTH - LEFT, y + 13, f"{band.things}: {band.threads}", 11, anchor="end", room=WIDTH - LEFT - UP - 10
        )
        y += HEADER
        for row in band.rows:
            tops.append(y)
            y += _height(row) + GAP
        y += PAD
    rows = [(row, band) for band in BANDS for row in band.rows]
    for (row, band), top, (_, next_band), next_top in zip(rows, tops, rows[1:], tops[1:], strict=False):
        crosses = band is not next_band
        lower = top + _height(row)
        _draw_passing(drawing, row, lower, next_top, lower + GAP / 2 + PAD * crosses)
    for (row, band), top in zip(rows, tops, strict=True):
        _draw_row(drawing, row, band.kind, top)
    return drawing.document(WIDTH, y - GAP + MARGIN)


def _height(row: Row) -> float:
    return max(row.part.height, row.side.height)


def _draw_row(drawing: Drawing, row: Row, kind: str, y: float) -> None:
    height = _height(row)
    left, right = LEFT + MAIN, LEFT + MAIN + BETWEEN
    _draw_part(drawing, row.part, kind, LEFT, y, MAIN, height)
    _draw_part(drawing, row.side, kind, right, y, SIDE, height)
    for words, share, begin, end in ((row.there, 0.43, left, right), (row.back, 0.87, right, left)):
        arrow = y + share * height
        drawing.wire([(begin, arrow), (end, arrow)])
        for i, line in enumerate(reversed(words)):
            drawing.text((left + right) / 2, arrow - 10 - 13 * i, line, SMALL, faint=True, room=BETWEEN)


def _draw_part(drawing: Drawing, part: Part, kind: str, x: float, y: float, width: float, height: float) -> None:
    drawing.box(x, y, width, height, kind)
    middle = x + width / 2
    y += (height - part.height) / 2
    drawing.text(middle, y + 15, part.file, NAME, "mono", room=width - 8)
    drawing.text(middle, y + 32, part.call, NAME, "bold", room=width - 8)
    for i, line in enumerate(part.does):
        drawing.text(middle, y + 49 + LINE * i, line, WORDS, faint=True, room=width - 8)


def _draw_passing(drawing: Drawing, row: Row, upper: float, lower: float, middle: float) -> None:
    """The arrows between a row and the next one, with their words around the height `middle`."""
    drawing.wire([(DOWN, upper), (DOWN, lower)])
    drawing.wire([(UP, lower), (UP, upper)])
    for words, x, room in ((row.down, DOWN + 8, UP - DOWN - 12), (row.up, UP + 8, WIDTH - MARGIN - UP - 12)):
        for i, line in enumerate(words):
            y = middle + LINE * (i - (len(words) - 1) / 2)
            drawing.text(x, y, line, WORDS, anchor="start", room=room)


def _description() -> str:
    sentences = list[str]()
    rows = [row for band in BANDS for row in band.rows]
    for i, row in enumerate(rows):
        part, side = row.part, row.side
        sentences += [
            f"{part.file}, {part.call}: {' '.join(part.does)}.",
            f"To {side.file}, {side.call} ({' '.join(side.does)}): {' '.join(row.there)}. Back: {' '.join(row.back)}.",
        ]
        if row.down:
            below = rows[i + 1].part.file
            sentences.append(f"Down to {below}: {' '.join(row.down)}. Up from it: {' '.join(row.up)}.")
    return " ".join(sentences)
