"""Figures in letters, as docs/architectures.md has them, read as graphs.

    x  ─┬─ ln_1 ─ c_attn: q k v ─ attention ─ c_proj ─ + ─ x'
        └──────────────────────────────────────────────┘

Words and the operators + and × are nodes; lines lead from left to right, and may enter an operator from above or below.
What is called x' at an end goes on where a later line begins with x'. A paragraph `scan: ...` explains the node scan.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

# To which sides a character's line goes: left, right, up, down.
SIDES = {"─": "LR", "│": "UD", "┬": "LRD", "┴": "LRU", "├": "UDR", "┤": "UDL", "└": "UR", "┘": "UL", "┐": "LD"}
OPERATORS = "+×"
NODE = re.compile(f"[{OPERATORS}]|[^{''.join(SIDES)}{OPERATORS}]+")
NOTES = re.compile(r"(\w+):(?=\s)")

Cell = tuple[int, int]  # line, column


@dataclass(eq=False)
class Node:
    """A word or an operator of a figure."""

    label: str
    row: int
    column: int
    inputs: list["Node"] = field(default_factory=list)
    outputs: list["Node"] = field(default_factory=list)
    result: str = ""  # the name that the figure gives to what comes out
    notes: list[str] = field(default_factory=list)

    @property
    def is_operator(self) -> bool:
        return self.label in OPERATORS


class Half(NamedTuple):
    """What reads the residual stream `x`, and is added to it again, which makes `result`."""

    x: str
    result: str
    nodes: list[Node]  # each behind its inputs

    def inputs(self, node: Node) -> list[Node]:
        """What a node reads within this half."""
        return [one for one in node.inputs if one in self.nodes]

    def outputs(self, node: Node) -> list[Node]:
        """What reads a node within this half."""
        return [one for one in node.outputs if one in self.nodes]


def halves(text: str) -> list[Half]:
    """The halves of a block, or its one where attention and MLP are parallel; raises ValueError where a line ends."""
    nodes = parse(text)
    (stream,) = (node for node in nodes if not node.inputs)
    found, name = list[Half](), stream.label
    while stream.outputs:
        added = next((one for one in stream.outputs if one.label == "+"), None)
        if added is None:
            break
        inside = list[Node]()
        for node in reversed(stream.outputs):
            _reach(node, added, inside)
        found.append(Half(name, added.result, inside[::-1]))
        stream, name = added, added.result
    return found


def _reach(node: Node, end: Node, inside: list[Node]) -> None:
    """Add what lies between a node and `end`, each before its inputs."""
    if node is end or node in inside:
        return
    for output in reversed(node.outputs):
        _reach(output, end, inside)
    inside.append(node)


def parse(text: str) -> list[Node]:
    """The nodes of a figure, in the order of its letters, each with its inputs and outputs."""
    lines, notes = _without_notes(text)
    nets = _nets(lines)
    nodes = list(_nodes(lines))
    sources, sinks = dict[Cell, list[Node]](), dict[Cell, list[Node]]()
    for node in nodes:
        row, line, last = node.row, lines[node.row], node.column + len(node.label)
        left, right = len(line[: node.column].rstrip()) - 1, last + len(line[last:]) - len(line[last:].lstrip())
        ports = [((row, left), "R", sinks), ((row, right), "L", sources)]
        if node.is_operator:
            ports += [((row - 1, node.column), "D", sinks), ((row + 1, node.column), "U", sinks)]
        for cell, side, ends in ports:
            if side in SIDES.get(_at(lines, cell), ""):
                ends.setdefault(nets[cell], []).append(node)
    for net in sources.keys() | sinks.keys():
        if net not in sources or net not in sinks:
            raise ValueError(f"A line of the figure leads nowhere, from line {net[0]}, column {net[1]}:\n{text}")
        for source in sources[net]:
            source.outputs += sinks[net]
        for sink in sinks[net]:
            sink.inputs += sources[net]
    for node in nodes:
        node.inputs.sort(key=lambda one: (one.row, one.column))
        node.outputs.sort(key=lambda one: (one.row, one.column))
        node.notes = notes.get(node.label, [])
    return _joined(nodes)


def _without_notes(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """The lines that are drawn, and what is said of a node: its formulas, one by one."""
    drawn, notes = list[str](), dict[str, list[str]]()
    for paragraph in re.split(r"\n[ ]*\n", text.strip("\n")):
        if match := NOTES.match(paragraph):
            formulas = re.split(r";\s+|\n\s*", paragraph[match.end() :].strip())
            notes[match[1]] = [formula.strip() for formula in formulas]
        else:
            drawn += [*paragraph.split("\n"), ""]
    return drawn, notes


def _nodes(lines: list[str]) -> Iterator[Node]:
    for row, line in enumerate(lines):
        for match in NODE.finditer(line):
            if label := match[0].strip():
                yield Node(label, row, match.start() + match[0].index(label))


def _nets(lines: list[str]) -> dict[Cell, Cell]:
    """Each character of a line, by the first character of all lines that it is connected with."""
    nets = dict[Cell, Cell]()
    for row, line in enumerate(lines):
        for column, letter in enumerate(line):
            if letter in SIDES and (row, column) not in nets:
                left = [(row, column)]
                while left:
                    cell = left.pop()
                    if cell not in nets:
                        nets[cell] = (row, column)
                        left += _neighbours(lines, cell)
    return nets


def _neighbours(lines: list[str], cell: Cell) -> Iterator[Cell]:
    row, column = cell
    for side, back, other in (
        ("L", "R", (row, column - 1)), ("R", "L", (row, column + 1)),
        ("U", "D", (row - 1, column)), ("D", "U", (row + 1, column)),
    ):  # fmt: skip
        if side in SIDES[_at(lines, cell)] and back in SIDES.get(_at(lines, other), ""):
            yield other


def _at(lines: list[str], cell: Cell) -> str:
    row, column = cell
    return lines[row][column] if 0 <= row < len(lines) and 0 <= column < len(lines[row]) else " "


def _joined(nodes: list[Node]) -> list[Node]:
    """The nodes without the names that only say where a line goes on."""
    gone = set[Node]()
    for end in [node for node in nodes if not node.outputs]:
        for node in end.inputs:
            node.result = end.label
        begin = next((one for one in nodes if not one.inputs and one.label == end.label and one.row > end.row), None)
        if begin is not None:
            gone |= {begin, end}
            for node in end.inputs:
                node.outputs = [*(one for one in node.outputs if one is not end), *begin.outputs]
            for node in begin.outputs:
                node.inputs = [*end.inputs, *(one for one in node.inputs if one is not begin)]
    return [node for node in nodes if node not in gone]
