"""Four families side by side, each as a block between embedding and head; what a family changed is marked.

The names come from the figures in letters and from the configs' tensors, all that is said of them from the configs.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from figures.letters import Half, Node, halves
from figures.svg import Drawing, wrapped
from figures.weights import weights_of
from tinyserve.models.config import ModelConfig, preset_config
from tinyserve.models.config.description import attention_kind

MARGIN, GAP = 10.0, 8.0
STREAM = 15.0  # from a column's left side
INNER, RIGHT = 31.0, 4.0  # where its boxes begin, and what is free at the other side
PAD, ADDITION = 5.0, 8.0  # within a box, and the radius of an addition
CHIP_GAP, LINE, NAME, TITLE = 3.0, 13.0, 11.0, 12.0

ABOVE, BELOW = 30.0, 10.0  # of a frame over the addition, and of the way from the stream under the norm
HEADER, LEGEND = 120.0, 52.0


class Family(NamedTuple):
    """A column to be: the model whose first layer is drawn, and one with the attention that other layers have."""

    title: str
    model: str
    width: float
    attention: str | None = None


FAMILIES = (
    Family("GPT-2", "gpt2", 124),
    Family("Falcon", "falcon-7b", 206),
    Family("Llama", "llama-3.1-8b", 176),
    Family("Granite hybrid", "granite-350m", 210, attention="granite-4.0-350m"),
)


@dataclass
class Group:
    """A box with a title, words that may be marked, and the names of its weights, the first one lowest."""

    title: str
    kind: str
    words: list[tuple[str, bool]]
    names: list[list[str]] = field(default_factory=list)  # side by side where they are computed side by side

    def rows(self, width: float) -> Iterator[list[tuple[float, list[str]]]]:
        """The names as they fit: in each row chips, as wide as they are long, each of some lines."""
        for names in self.names:
            room, letters = width - 2 * PAD - CHIP_GAP * (len(names) - 1), sum(map(len, names))
            cells = [room * len(name) / letters for name in names]
            yield [(cell, wrapped(name, NAME, cell - 4)) for name, cell in zip(names, cells, strict=True)]

    def height(self, width: float) -> float:
        """How high it is where it is so wide."""
        rows = sum(_chip_height(row) + CHIP_GAP for row in self.rows(width))
        return (18 if self.title else 0) + 17 * len(self.words) + rows + 2 * PAD - 2


def _chip_height(row: list[tuple[float, list[str]]]) -> float:
    return LINE * max(len(lines) for _, lines in row) + 5


@dataclass
class Column:
    """One family: its groups from below to above, and what of it is said in words."""

    family: Family
    config: ModelConfig
    facts: dict[str, str]
    changed: set[str]  # those of its facts that its left neighbour has otherwise
    embedding: Group
    norms: list[Group]
    mixers: list[Group]  # of which a layer has one
    mlp: Group
    last_norm: Group
    head: Group

    @property
    def width(self) -> float:
        return self.family.width

    @property
    def inner(self) -> float:
        """How wide what stands beside the stream is."""
        return self.width - INNER - RIGHT

    @property
    def is_parallel(self) -> bool:
        return self.facts["block"] == "parallel"

    @property
    def halves(self) -> "list[tuple[Group, list[tuple[Group, float]]]]":
        """Each norm, and what reads it, with its width."""
        if self.is_parallel:
            return [(self.norms[0], self._shared([*self.mixers, self.mlp]))]
        return [(self.norms[0], self._shared(self.mixers)), (self.norms[1], self._shared([self.mlp]))]

    @property
    def gap(self) -> float:
        return 14 if len(self.mixers) > 1 else 6  # between two of which a layer has one, there is a word

    def _shared(self, groups: list[Group]) -> list[tuple[Group, float]]:
        return [(one, (self.inner - self.gap * (len(groups) - 1)) / len(groups)) for one in groups]


def families(letters: Mapping[str, str]) -> str:
    """The SVG of the four; `letters` are the page's figures by model."""
    columns = list[Column]()
    for family in FAMILIES:
        config, parts = preset_config(family.model), halves(letters[family.model])
        facts = _facts(config, parts)
        before = columns[-1].facts if columns else facts
        changed = {name for name in facts if facts[name] != before[name]}
        columns.append(_column(family, config, parts, facts, changed, letters))
    return _draw(columns)


def _facts(config: ModelConfig, parts: list[Half]) -> dict[str, str]:
    """What columns are compared by."""
    described = config.describe()
    biases = any(one.name.endswith(".bias") and one.component in ("attention", "mlp") for one in config.tensor_shapes())
    scaled = any(node.label == "·r" for half in parts for node in half.nodes)
    return {
        "norm": described.norm,
        "position": "learned positions"
        if described.position == "learned"
        else "NoPE"
        if described.position == "none (NoPE)"
        else described.position.split()[0],
        "activation": described.activation.split()[0],
        "block": described.block.partition(",")[0],
        "attention": attention_kind(config),
        "biases": "linear with bias" if biases else "linear without bias",
        "head": "tied to embedding" if config.tie_word_embeddings else "not tied",
        "mixer": "Mamba2" if config.num_mamba_layers else "attention alone",
        "scale": "·r" if scaled else "",
    }


def _column(
    family: Family, config: ModelConfig, parts: list[Half], facts: dict[str, str], changed: set[str],
    letters: Mapping[str, str],
) -> Column:  # fmt: skip
    outside = dict[str, list[str]]()
    for tensor in config.tensor_shapes():
        if tensor.layer is None and not tensor.name.endswith(".bias"):
            outside.setdefault(tensor.component, []).append(_short(tensor.name))

    def word(fact: str) -> tuple[str, bool]:
        return facts[fact], fact in changed

    positions = outside.get("position", [])
    told = [word("attention"), (f"{config.num_attention_heads} Q : {config.num_key_value_heads} KV", False)]
    told += [] if positions else [word("position")]
    if family.attention is None:
        mixers = [Group("attention", "attention", told, _rows(parts, config, "attention"))]
    else:
        others, mamba = halves(letters[family.attention]), [(f"{config.num_mamba_layers} layers", True)]
        told = [(f"{config.num_attention_layers} layers", False), *told]
        mixers = [
            Group("Mamba2", "mamba", [*mamba, ("fixed state", False)], _rows(parts, config, "mamba")),
            Group("attention", "attention", told, _rows(others, preset_config(family.attention), "attention")),
        ]
    return Column(
        family, config, facts, changed,
        Group("embedding", "plain", [word("position")] if positions else [], [outside["embedding"] + positions]),
        [
            Group("", "norm", [word("norm")], [[node.label] for node in half.nodes if not half.inputs(node)])
            for half in parts
        ],
        mixers,
        Group("MLP", "mlp", [word("activation")], _rows(parts, config, "mlp")),
        Group("", "norm", [], [outside["norm"]]),
        Group("head", "plain", [word("head")], [outside.get("head") or outside["embedding"]]),
    )  # fmt: skip


def _short(name: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[2]


def _rows(parts: list[Half], config: ModelConfig, kind: str) -> list[list[str]]:
    """The labels of the nodes of a kind, those that are computed side by side in one row, the first row first."""
    weights = weights_of(parts, config, 0)
    tensors = {_short(one.name) for one in config.tensor_shapes() if one.layer == 0}
    rows = dict[tuple[int, int], list[str]]()
    for i, half in enumerate(parts):
        ranks = dict[Node, int]()
        for node in half.nodes:
            ranks[node] = max((ranks[one] + 1 for one in half.inputs(node)), default=0)
            kinds = {one.kind for one in weights.get(node, [])}
            label = node.label
            if node.notes:
                told = [word for note in node.notes for word in re.findall(r"\w+", note) if word in tensors]
                kinds, label = {"mamba"}, " ".join([f"{label}:", *told])
            elif label.startswith("attention"):
                kinds = {"attention"}
            elif kinds == {"norm"} and half.inputs(node):
                kinds = {"mamba"}  # a norm that does not read the stream is its mixer's
            if kind in kinds:
                rows.setdefault((i, ranks[node]), []).append(label)
    return [names for _, names in sorted(rows.items())]


def _draw(columns: list[Column]) -> str:
    drawing = Drawing("Four architectures side by side", " ".join(map(_description, columns)))
    levels, top = _levels(columns)
    x = MARGIN
    for column in columns:
        _draw_column(drawing, column, x, levels, top)
        x += column.width + GAP
    drawing.badge(MARGIN + 110, 32, "differs from the left neighbour")
    drawing.operator(MARGIN + 256, 32, "+", ADDITION)
    drawing.text(MARGIN + 270, 32, "adds to the residual stream, which goes up", 11, anchor="start", faint=True)
    drawing.text(MARGIN + 568, 32, "·r", 11)
    drawing.text(MARGIN + 580, 32, "residual_multiplier", 11, anchor="start", faint=True)
    return drawing.document(x - GAP + MARGIN, top + HEADER + LEGEND, -top - HEADER)


def _levels(columns: list[Column]) -> tuple[dict[str, float], float]:
    """How far up each slot begins, where all columns have theirs at one height, and how far up the last one ends."""

    def most(groups: Iterable[tuple[Group, float]]) -> float:
        return max(group.height(width) for group, width in groups)

    slots = {"embedding": most((one.embedding, one.width) for one in columns) + 36}
    for i in range(2):
        halves = [(column.inner, *column.halves[i]) for column in columns if i < len(column.halves)]
        slots[f"norm {i}"] = most((norm, inner) for inner, norm, _ in halves) + 14
        slots[f"group {i}"] = most(chain.from_iterable(groups for _, _, groups in halves)) + 14
        slots[f"add {i}"] = ABOVE
    slots["frame"] = 14
    slots["last norm"] = most((one.last_norm, one.width) for one in columns) + 14
    slots["head"] = most((one.head, one.width) for one in columns) + 14
    levels, level = dict[str, float](), 30.0
    for slot, height in slots.items():
        levels[slot] = level
        level += height
    return levels, level


def _draw_column(drawing: Drawing, column: Column, x: float, levels: dict[str, float], top: float) -> None:
    stream, width, centre, config = x + STREAM, column.width, x + column.width / 2, column.config
    drawing.text(centre, -top - 96, column.family.title, 15, "bold", room=width)
    said = f"{config.num_hidden_layers} layers × {config.hidden_size}"
    drawing.text(centre, -top - 78, said, 11, faint=True, room=width)
    for above, fact in ((60, "block"), (42, "biases")):
        drawing.badge(centre, -top - above, column.facts[fact], is_marked=fact in column.changed, room=width)
    drawing.text(centre, -top - 14, "logits", 11, faint=True)
    drawing.text(centre, -2, "token ids", 11, faint=True)
    begin, end = levels["norm 0"] - BELOW - 12, levels[f"add {len(column.halves) - 1}"] + ABOVE
    for kind in ("band", "frame"):
        drawing.box(x + 1, -end, width - 2, end - begin, kind, 8)
    drawing.text(x + width - RIGHT - 4, -end + 14, f"× {config.num_hidden_layers}", 12, "bold", anchor="end")
    embedded = levels["embedding"] + column.embedding.height(width)
    normed, headed = (
        levels["last norm"] + column.last_norm.height(width),
        levels["head"] + column.head.height(width),
    )
    drawing.wire([(centre, -10), (centre, -levels["embedding"])])
    drawing.wire([(stream, -embedded), (stream, -levels["last norm"])], more="stream")
    drawing.wire([(centre, -normed), (centre, -levels["head"])])
    drawing.wire([(centre, -headed), (centre, -top - 8)])
    _draw_group(drawing, column.embedding, x, levels["embedding"], width)
    for i in range(len(column.halves)):
        _draw_half(drawing, column, i, x, levels)
    _draw_group(drawing, column.last_norm, x, levels["last norm"], width)
    _draw_group(drawing, column.head, x, levels["head"], width)


def _draw_half(drawing: Drawing, column: Column, i: int, x: float, levels: dict[str, float]) -> None:
    """A norm, what reads it, and the way back to the stream."""
    norm, groups = column.halves[i]
    begin, base, end = levels[f"norm {i}"], levels[f"group {i}"], levels[f"add {i}"]
    stream, left, centre = x + STREAM, x + INNER, x + INNER + column.inner / 2
    normed, way = begin + norm.height(column.inner), begin - BELOW
    drawing.wire([(stream, -way), (centre, -way), (centre, -begin)])
    drawing.dot(stream, -way)
    is_choice = len(groups) > 1 and not column.is_parallel
    more = "dashed" if is_choice else ""
    _draw_group(drawing, norm, left, begin, column.inner)
    for group, width in groups:
        middle = left + width / 2
        drawing.wire([(middle, -normed), (middle, -base)], more=more)
        drawing.wire([(middle, -base - group.height(width)), (middle, -end), (stream + ADDITION, -end)], more=more)
        _draw_group(drawing, group, left, base, width)
        left += width + column.gap
    if is_choice:
        drawing.text(centre, -(normed + base) / 2, "or", 11, "bold")
    drawing.operator(stream, -end, "+", ADDITION)
    if column.facts["scale"]:
        drawing.badge(stream + 26, -end, column.facts["scale"], is_marked="scale" in column.changed)


def _draw_group(drawing: Drawing, group: Group, x: float, up: float, width: float) -> None:
    height = group.height(width)
    y = -up - height
    drawing.box(x, y, width, height, group.kind)
    y += PAD - 1
    if group.title:
        drawing.text(x + width / 2, y + 8, group.title, TITLE, "bold", room=width - 4)
        y += 18
    for text, is_marked in group.words:
        drawing.badge(x + width / 2, y + 8, text, 10.5, is_marked, room=width)
        y += 17
    for row in reversed(list(group.rows(width))):
        left, high = x + PAD, _chip_height(row)
        for cell, lines in row:
            is_operation = lines[0].startswith("attention")
            if not is_operation:
                drawing.box(left, y, cell, high, "plain", 4)
            for j, line in enumerate(lines):
                middle = y + high / 2 + LINE * (j - (len(lines) - 1) / 2)
                face = "sans" if is_operation else "mono"
                drawing.text(left + cell / 2, middle, line, NAME, face, faint=is_operation, room=cell)
            left += cell + CHIP_GAP
        y += high + CHIP_GAP


def _description(column: Column) -> str:
    groups = [column.embedding, *column.norms, *column.mixers, column.mlp, column.last_norm, column.head]
    told = []
    for group in groups:
        words = [*(text for text, _ in group.words), *chain.from_iterable(group.names)]
        told.append(f"{group.title or 'norm'} ({', '.join(words)})")
    new = ", ".join(column.facts[name] for name in column.facts if name in column.changed)
    changed = f" Differs from the left neighbour: {new}." if new else ""
    layers, block = column.config.num_hidden_layers, column.facts["block"]
    return f"{column.family.title}, {layers} layers, {block}: {'; '.join(told)}.{changed}"
