"""One block, drawn from its figure in letters: the residual stream is a vertical line, and all goes upwards.

Each line of letters is a lane beside the stream; what forks into several lanes, or joins them, is as wide as these.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from figures.letters import Half, Node, halves
from figures.svg import Drawing, Point, width_of
from figures.weights import Weight, weights_of
from tinyserve.models.config import ModelConfig
from tinyserve.models.config.description import architecture

MARGIN = 16.0
STREAM = 34.0  # where the residual stream is
LEFT = 62.0  # where the lanes begin
LANE_GAP = 14.0
GAP = 20.0  # between a box and the next one above it
RADIUS = 10.0  # of an operator
NAME, SMALL, NOTE = 13.0, 11.0, 11.5  # sizes of text
HEADER = 48.0
NARROWEST = 290.0


@dataclass
class Box:
    """A node with its place: the middle of its lower edge, and how large it is. `up` grows upwards."""

    node: Node
    weights: list[Weight]
    kind: str
    lines: list[str] = field(default_factory=list)  # below the name
    is_value: bool = False  # a part of what a matrix makes, and nothing that computes
    width: float = 0.0
    height: float = 0.0
    x: float = 0.0
    up: float = 0.0

    @property
    def top(self) -> float:
        return self.up + self.height

    @property
    def is_wide(self) -> bool:
        """Whether it fills the lanes that it stands in."""
        return bool(self.weights or self.lines)

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Its names side by side, each with what is said below it."""
        if len(self.weights) > 1:
            return [(weight.name, weight.shape) for weight in self.weights]
        if self.weights:
            (weight,) = self.weights
            words, _, _ = self.node.label.partition(weight.name)
            label = self.node.label.removeprefix(words)
            return [(label, words + weight.shape)]
        return [(self.node.label, "")]


def block(title: str, text: str, config: ModelConfig, layer: int, is_half: bool = False) -> str:
    """The SVG of a block, or of its second half."""
    parts = halves(text)
    weights = weights_of(parts, config, layer)
    boxes = {node: box_of(node, weights.get(node, []), config, half) for half in parts for node in half.nodes}
    widths = [place(half, boxes) for half in parts]
    layers = f"second half, {config.num_hidden_layers} layers" if is_half else _layers(config, layer)
    least = 2 * MARGIN + width_of(title, 15, "bold") + 24 + width_of(layers, 12)
    width = max(NARROWEST, least, LEFT + max(widths) + MARGIN)
    drawing = Drawing(f"{title}: {'the second half of ' if is_half else ''}a block", description(parts, layers))
    up = 24.0  # above the name of what comes in
    ends = [up]
    for half, taken in zip(parts, widths, strict=True):
        centre = LEFT + (width - MARGIN - LEFT - taken) / 2
        for node in half.nodes:
            boxes[node].x += centre
            boxes[node].up += up + 30
        tops = [boxes[node].top for node in half.nodes if not half.outputs(node)]
        ends += [up + 8, max(tops) + GAP + 2]
        up = ends[-1] + 30
    top = -(up + 14 + HEADER)
    drawing.wire([(STREAM, -12), (STREAM, -up - 2)], more="stream")
    drawing.text(STREAM, 0, parts[0].x, NAME, "mono")
    drawing.text(STREAM, -up - 12, parts[-1].result, NAME, "mono")
    for half, begin, end in zip(parts, ends[1::2], ends[2::2], strict=True):
        for points in wires(half, boxes, begin, end):
            drawing.wire([(x, -y) for x, y in points])
        drawing.dot(STREAM, -begin)
        drawing.operator(STREAM, -end, "+", RADIUS)
        if half.result != half.x and half is not parts[-1]:
            drawing.text(STREAM - 12, -end - 24, half.result, NAME, "mono", anchor="end")
        for node in sorted(half.nodes, key=lambda one: (one.row, one.column)):
            draw(drawing, boxes[node])
    drawing.text(MARGIN, top + 24, title, 15, "bold", anchor="start")
    drawing.text(width - MARGIN, top + 24, layers, 12, anchor="end", faint=True)
    return drawing.document(width, 16 - top, top)


def _layers(config: ModelConfig, layer: int) -> str:
    """How many layers of a model are such blocks."""
    alike, total = config.count_layers(config.layer_types[layer]), config.num_hidden_layers
    return f"{alike} of {total} layers" if alike < total else f"{total} layers"


def description(parts: list[Half], layers: str) -> str:
    """A block in words, for those who hear it."""
    sentences = []
    for half in parts:
        chains = []
        for node in half.nodes:
            read = [one.label for one in half.inputs(node)] or [f"the residual stream {half.x}"]
            chains.append(f"{node.label} reads {' and '.join(read)}")
        last = " and ".join(node.label for node in half.nodes if not half.outputs(node))
        sentences.append(f"{'; '.join(chains)}. What {last} makes is added to {half.x}, which becomes {half.result}.")
    return f"{layers}. {' '.join(sentences)}"


def box_of(node: Node, weights: list[Weight], config: ModelConfig, half: Half) -> Box:
    """A node's box, as large as its words ask for."""
    box = Box(node, weights, weights[0].kind if weights else "plain")
    box.is_value = not weights and any(len(half.outputs(one)) > 1 for one in half.inputs(node))
    if node.is_operator:
        box.width = box.height = 2 * RADIUS
        return box
    if node.label.startswith("attention"):
        box.kind, box.lines = "attention", [architecture(config)["attention"].partition(" in ")[0]]
    if node.label == "scan":
        box.kind, box.lines = "mamba", [f"state S: {' × '.join(map(str, config.state_shapes[1]))}", *node.notes]
    if weights:
        needs = [max(width_of(name, NAME, "mono"), width_of(shape, SMALL)) for name, shape in box.cells]
        box.width, box.height = len(needs) * (max(needs) + 14), 42
    else:
        face = "mono" if len(box.lines) > 1 else "sans"
        lines = [width_of(line, NOTE, face) for line in box.lines]
        box.width = max(width_of(node.label, NAME, "bold" if box.lines else "sans"), *lines, 0) + 22
        box.height = 20 if box.is_value else 26 if not box.lines else 28 + 16 * len(box.lines) - 2 * (not node.notes)
    return box


def place(half: Half, boxes: dict[Node, Box]) -> float:
    """Give the boxes of a half their places, from (0, 0) on; returns how wide it is."""
    spans = {node: lanes(half, node) for node in half.nodes}
    rows = sorted(set[int]().union(*spans.values()))
    columns = {node: [i for i, row in enumerate(rows) if row in spans[node]] for node in half.nodes}
    widths = [0.0] * len(rows)
    for node in sorted(half.nodes, key=lambda one: len(columns[one])):
        span = columns[node]
        lacks = boxes[node].width - (sum(widths[i] for i in span) + LANE_GAP * (len(span) - 1))
        for i in span:
            widths[i] += max(0.0, lacks / len(span))
    for node in half.nodes:
        first, last, box = columns[node][0], columns[node][-1], boxes[node]
        left = sum(widths[:first]) + LANE_GAP * first
        right = sum(widths[: last + 1]) + LANE_GAP * last
        box.x = (left + right) / 2
        if box.is_wide:
            box.width = right - left
        box.up = max((boxes[one].top + GAP for one in half.inputs(node)), default=0.0)
    return sum(widths) + LANE_GAP * (len(widths) - 1)


def lanes(half: Half, node: Node) -> set[int]:
    """The lines of letters that a node stands for: those that it joins, or into which it forks, or its own."""
    while len(inputs := half.inputs(node)) == 1 and len(half.outputs(inputs[0])) == 1:
        node = inputs[0]
    if len(inputs) > 1:
        return set[int]().union(*(lanes(half, one) for one in inputs))
    row = node.row
    while len(outputs := half.outputs(node)) == 1 and len(half.inputs(outputs[0])) == 1:
        node = outputs[0]
    return set[int]().union(*(lanes(half, one) for one in outputs)) if len(outputs) > 1 else {row}


def wires(half: Half, boxes: dict[Node, Box], begin: float, end: float) -> Iterator[list[Point]]:
    """The lines of a half, which leaves the stream at `begin` and is added to it at `end`."""
    for node in half.nodes:
        box = boxes[node]
        if not half.inputs(node):
            yield [(STREAM, begin), (box.x, begin), (box.x, box.up)]
        for one in half.inputs(node):
            yield _wire(boxes[one], box)
        if not half.outputs(node):
            yield [(box.x, box.top), (box.x, end), (STREAM + RADIUS, end)]


def _wire(source: Box, sink: Box) -> list[Point]:
    """From a box up into another: straight where one is above the other, into an operator from its side."""
    if abs(source.x - sink.x) < 1:
        return [(source.x, source.top), (source.x, sink.up)]
    if sink.node.is_operator:
        side, middle = (-1 if source.x < sink.x else 1), sink.up + RADIUS
        return [(source.x, source.top), (source.x, middle), (sink.x + side * RADIUS, middle)]
    narrow, wide = sorted((source, sink), key=lambda box: box.width)
    if abs(narrow.x - wide.x) < wide.width / 2:
        return [(narrow.x, source.top), (narrow.x, sink.up)]
    middle = sink.up - GAP / 2
    return [(source.x, source.top), (source.x, middle), (sink.x, middle), (sink.x, sink.up)]


def draw(drawing: Drawing, box: Box) -> None:
    """A box, with its words."""
    x, y, width = box.x - box.width / 2, -box.top, box.width
    if box.node.is_operator:
        drawing.operator(box.x, y + RADIUS, box.node.label, RADIUS)
        return
    if box.weights:
        if box.weights[0].is_stack:
            for shift in (6, 3):
                drawing.box(x + shift, y - shift, width, box.height, box.kind)
        cell = width / len(box.cells)
        for i, (name, words) in enumerate(box.cells):
            drawing.box(x + i * cell, y, cell, box.height, box.kind)
            drawing.text(x + (i + 0.5) * cell, y + 14, name, NAME, "mono", room=cell - 6)
            drawing.text(x + (i + 0.5) * cell, y + 31, words, SMALL, faint=True, room=cell - 6)
        return
    if box.is_value:
        drawing.text(box.x, y + 10, box.node.label, NAME, faint=True)
        return
    drawing.box(x, y, width, box.height, box.kind, 6 if box.lines else box.height / 2)
    drawing.text(box.x, y + 13, box.node.label, NAME, "bold" if box.lines else "sans", room=width - 6)
    face = "mono" if len(box.lines) > 1 else "sans"
    for i, line in enumerate(box.lines):
        if face == "mono" and i:
            drawing.text(x + 11, y + 29 + 16 * i, line, NOTE, face, anchor="start", room=width - 16)
        else:
            drawing.text(box.x, y + 29 + 16 * i, line, NOTE, faint=True, room=width - 6)
