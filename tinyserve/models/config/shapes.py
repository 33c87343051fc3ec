"""One tensor of a checkpoint by name, shape and the part it belongs to, and the tensors of parts that families share.

Knows names and integers; which parts a family has is told by its own file.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tinyserve.models.config.base import ModelConfig

MAX_LAYERS: Final = 4096  # far more than any model has; each is a dozen names of tensors
COMPONENTS: Final = (
    "embedding",
    "position",
    "attention",
    "mlp",
    "norm",
    "mamba",
    "experts",
    "router",
    "head",
)


@dataclass(frozen=True)
class TensorShape:
    """One tensor of a checkpoint: name and shape as transformers writes them, and the part it belongs to."""

    name: str
    shape: tuple[int, ...]
    component: str  # one of COMPONENTS
    layer: int | None = None
    in_axis: int = -1  # the axis of a matrix that meets the activations: 0 in GPT-2's Conv1D

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is kept in the model's dtype; norms, biases, positions and convolutions are float32."""
        return len(self.shape) >= 2 and self.component != "position" and not self.name.endswith("conv1d.weight")


def linear(name: str, rows: int, columns: int, component: str, layer: int, bias: bool = False) -> Iterator[TensorShape]:
    """Yield a torch Linear, [out, in], and its bias."""
    yield TensorShape(f"{name}.weight", (rows, columns), component, layer)
    if bias:
        yield TensorShape(f"{name}.bias", (rows,), component, layer)


def conv1d(name: str, rows: int, columns: int, component: str, layer: int) -> Iterator[TensorShape]:
    """Yield GPT-2's Conv1D, a Linear stored as [in, out], and its bias."""
    yield TensorShape(f"{name}.weight", (rows, columns), component, layer, in_axis=0)
    yield TensorShape(f"{name}.bias", (columns,), component, layer)


def layer_norm(name: str, hidden: int, layer: int | None = None) -> Iterator[TensorShape]:
    """Yield a LayerNorm, which has a bias."""
    yield TensorShape(f"{name}.weight", (hidden,), "norm", layer)
    yield TensorShape(f"{name}.bias", (hidden,), "norm", layer)


def rms_norm(name: str, hidden: int, layer: int | None = None) -> Iterator[TensorShape]:
    """Yield an RMSNorm, which has none."""
    yield TensorShape(f"{name}.weight", (hidden,), "norm", layer)


def grouped_attention(config: "ModelConfig", i: int, *, bias: bool, output_bias: bool) -> Iterator[TensorShape]:
    """Yield layer i's projections of queries, keys and values, apart, and of the heads' answers."""
    name, hidden = f"model.layers.{i}.self_attn", config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    yield from linear(f"{name}.q_proj", queries, hidden, "attention", i, bias)
    yield from linear(f"{name}.k_proj", keys, hidden, "attention", i, bias)
    yield from linear(f"{name}.v_proj", keys, hidden, "attention", i, bias)
    yield from linear(f"{name}.o_proj", hidden, queries, "attention", i, output_bias)


def gated_mlp(config: "ModelConfig", i: int, *, bias: bool) -> Iterator[TensorShape]:
    """Yield layer i's gate, what it lets through, and the way back."""
    name, hidden, inner = f"model.layers.{i}.mlp", config.hidden_size, config.intermediate_size
    yield from linear(f"{name}.gate_proj", inner, hidden, "mlp", i, bias)
    yield from linear(f"{name}.up_proj", inner, hidden, "mlp", i, bias)
    yield from linear(f"{name}.down_proj", hidden, inner, "mlp", i, bias)
