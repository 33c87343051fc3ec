"""A checkpoint as one read-only mapping of names to float32 arrays, each read from its file when it is asked for.

Knows neither file formats (they hand it readers) nor models (they rename what it holds).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinyserve.errors import CheckpointError
from tinyserve.tensor.gguf_blocks import Blocks
from tinyserve.tensor.quant import Packed

Array = np.ndarray


@dataclass(frozen=True)
class LazyTensor:
    """A tensor not read yet: its shape is known, `read` brings it as float32, `file` is where errors point.

    `blocks` brings a matrix as the quantized blocks that its file keeps, where it does; `stored` brings integers as
    they are in the file, mapped and not read; `packed` makes a whole matrix of any shape (N, K), as a dtype has it.
    """

    shape: tuple[int, ...]
    file: str
    read: Callable[[], Array]
    blocks: Callable[[], Blocks] | None = None
    stored: Callable[[], Array] | None = None
    packed: Callable[[tuple[int, int], str], Packed] | None = None

    def map(self, change: Callable[[Array], Array], shape: tuple[int, ...]) -> "LazyTensor":
        """The same tensor with `change` applied when it is read, which gives it another shape."""
        return replace(self, shape=shape, read=lambda: change(self.read()), blocks=None, stored=None, packed=None)

    def reordered(self, change: Callable[[Array], Array]) -> "LazyTensor":
        """The same tensor with its rows in another order: `change` takes (rows, anything), be it numbers or blocks."""
        blocks = self.blocks
        changed = None if blocks is None else lambda: (b := blocks()) and replace(b, raw=change(b.raw))
        return replace(self, read=lambda: change(self.read()), blocks=changed)

    def transposed(self) -> "LazyTensor":
        """The same matrix the other way round."""
        return self.map(np.transpose, self.shape[::-1])


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Matrices one above the other, or several such stacks side by side: (..., rows, columns), joined along rows.

    Raises CheckpointError for matrices of different widths.
    """
    first = parts[0]
    if len({(*part.shape[:-2], part.shape[-1:]) for part in parts}) > 1 or len(first.shape) < 2:
        raise CheckpointError(
            f"{first.file}: tensors of shapes {', '.join(str(list(part.shape)) for part in parts)} belong one above "
            f"the other, and cannot be."
        )
    rows = sum(part.shape[-2] for part in parts)
    shape = (*first.shape[:-2], rows, first.shape[-1])
    blocks = None
    kept = [part.blocks() for part in parts if part.blocks]
    if len(kept) == len(parts) and len({one.quantization for one in kept}) == 1:

        def blocks() -> Blocks:
            raw = [one.raw.reshape(*part.shape[:-1], -1) for one, part in zip(kept, parts, strict=True)]
            joined = np.concatenate(raw, axis=-2)
            whole = joined.reshape(-1, joined.shape[-1])
            return Blocks(kept[0].quantization, whole, (len(whole), shape[-1]))

    return LazyTensor(shape, first.file, lambda: np.concatenate([part.read() for part in parts], axis=-2), blocks)


class Checkpoint(Mapping[str, Array]):
    """Named tensors of one model. Reading an item twice reads the file twice: keep what you build from it."""

    def __init__(self, tensors: Mapping[str, LazyTensor], source: str):
        self.tensors = dict(tensors)
        self.source = source

    def __getitem__(self, name: str) -> Array:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise KeyError(name)
        array = tensor.read()
        array.flags.writeable = False
        return array

    def __contains__(self, name: object) -> bool:
        return name in self.tensors  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless the tensor is there in this shape; nothing is read."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.source} has no tensor {name!r}, which its config asks for: the checkpoint is incomplete, or "
                f"the config belongs to another model."
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has shape {list(tensor.shape)}, but the config implies {list(shape)}."
            )
