"""The words of a figure that are weights, with what the config of their checkpoint says of them."""

import re
from collections import Counter
from dataclasses import dataclass

from figures.letters import Half, Node
from tinyserve.models.config import ModelConfig
from tinyserve.models.config.shapes import TensorShape


@dataclass(frozen=True)
class Weight:
    """A weight as a figure draws it."""

    name: str
    kind: str  # of the box, one of svg.KINDS
    shape: str  # in words
    is_stack: bool = False  # one matrix for each of many experts


def weights_of(halves: list[Half], config: ModelConfig, layer: int) -> dict[Node, list[Weight]]:
    """The weights of each node that has some. Where a layer has a name more than once, they come in its own order."""
    tensors = dict[str, list[TensorShape]]()
    biased = set[str]()
    for tensor in config.tensor_shapes():
        if tensor.layer == layer:
            path, _, kind = tensor.name.rpartition(".")
            if kind == "bias":
                biased.add(path)
            else:
                path = path if kind == "weight" else tensor.name
                tensors.setdefault(path.rpartition(".")[2], []).append(tensor)
    seen = Counter[str]()
    found = dict[Node, list[Weight]]()
    for node in sorted((node for half in halves for node in half.nodes), key=lambda one: (one.row, one.column)):
        for word in re.findall(r"[\w.]+", node.label):
            name = word.rpartition(".")[2]
            if name in tensors:
                tensor = tensors[name][min(seen[name], len(tensors[name]) - 1)]
                seen[name] += 1
                path = tensor.name.removesuffix(".weight")
                found.setdefault(node, []).append(_weight(word, tensor, path in biased, config))
    return found


def _weight(word: str, tensor: TensorShape, has_bias: bool, config: ModelConfig) -> Weight:
    bias = " + bias" if has_bias else ""
    if len(tensor.shape) == 1:
        norm = config.describe().norm.partition(",")[0]
        per_head = "" if tensor.size == config.hidden_size or tensor.component != "norm" else ", per head"
        return Weight(word, "norm", norm + per_head)
    if tensor.name.endswith("conv1d.weight"):
        channels, _, width = tensor.shape
        return Weight(word, tensor.component, f"{channels} × {width}{bias}")
    *count, rows, columns = tensor.shape
    inner, outer = (rows, columns) if tensor.in_axis == 0 else (columns, rows)
    kind = "experts" if tensor.component == "router" else tensor.component
    return Weight(word, kind, f"{inner} → {outer}{bias}", is_stack=bool(count))
