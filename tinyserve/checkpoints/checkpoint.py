"""A checkpoint as one read-only mapping of names to float32 arrays, each read from its file when it is asked for.

Knows neither file formats (they hand it readers) nor models (they rename what it holds).
"""

import math
import mmap
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyserve.errors import CheckpointError
from tinyserve.tensor.gguf_blocks import Blocks
from tinyserve.tensor.quant import IntegerWeights

Array = np.ndarray
Index = slice | np.ndarray

# What old checkpoints keep beside their weights although it follows from the config: RoPE's frequencies.
_COMPUTED = "rotary_emb.inv_freq"


class MappedFile:
    """A file's bytes, mapped into memory: pages that have been read can be given back."""

    def __init__(self, path: Path):
        self.bytes = np.memmap(path, np.uint8, mode="r")

    def forget(self, start: int, end: int) -> None:
        """Take bytes start..end out of this process's memory, where the system can; they may be read again."""
        mapping = getattr(self.bytes, "_mmap", None)
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED") and end > start:
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, first, end - first)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor not read yet: its shape is known, `read` brings it as float32, `file` and `name` are for errors.

    `blocks` brings a matrix as the quantized blocks that its file keeps, where it does; `stored` brings integers as
    they are in the file, mapped and not read; `packed` makes a whole matrix of any shape (N, K), as a dtype has it.
    `take` brings some rows of a matrix alone, or of its transpose, all axes but the last being one; `forget` gives the
    memory of what has been read back.
    """

    shape: tuple[int, ...]
    file: str
    read: Callable[[], Array]
    blocks: Callable[[], Blocks] | None = None
    stored: Callable[[], Array] | None = None
    packed: Callable[[tuple[int, int], str], IntegerWeights] | None = None
    name: str = ""  # its file's own: a model may know it by another
    take: Callable[[Index, bool], Array] | None = None
    forget: Callable[[], None] = lambda: None

    def map(self, change: Callable[[Array], Array], shape: tuple[int, ...]) -> "LazyTensor":
        """The same tensor with `change` applied when it is read, which gives it another shape."""
        return LazyTensor(shape, self.file, lambda: change(self.read()), name=self.name, forget=self.forget)

    def reordered(self, change: Callable[[Array], Array]) -> "LazyTensor":
        """The same tensor with its rows in another order: `change` takes (rows, anything), be it numbers or blocks."""
        blocks = self.blocks
        changed = None if blocks is None else lambda: (b := blocks()) and replace(b, raw=change(b.raw))
        take = self.take

        def take_reordered(index: Index, transposed: bool) -> Array:
            assert take is not None
            order = change(np.arange(math.prod(self.shape[:-1])))
            return take(index, True)[:, order] if transposed else take(order[index], False)

        turned = None if take is None else take_reordered
        return replace(self, read=lambda: change(self.read()), blocks=changed, take=turned)

    def transposed(self) -> "LazyTensor":
        """The same matrix the other way round."""
        take = self.take
        turned = None if take is None else lambda index, transposed: take(index, not transposed)
        return replace(self.map(np.transpose, self.shape[::-1]), take=turned)


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Parts (..., rows, columns) of one shape, each matrix of the first above that of the second, and so on.

    Raises CheckpointError for matrices of different shapes.
    """
    first, count = parts[0], len(parts)
    if len({part.shape for part in parts}) > 1 or len(first.shape) < 2:
        raise CheckpointError(
            f"{first.file}: tensors {', '.join(repr(part.name) for part in parts)} are parts of one, and cannot be, "
            f"with the shapes {', '.join(str(list(part.shape)) for part in parts)}."
        )
    shape = (*first.shape[:-2], count * first.shape[-2], first.shape[-1])
    blocks = None
    kept = [part.blocks() for part in parts if part.blocks]
    if len(kept) == len(parts) and len({one.quantization for one in kept}) == 1:

        def blocks() -> Blocks:
            raw = [one.raw.reshape(*part.shape[:-1], -1) for one, part in zip(kept, parts, strict=True)]
            joined = np.concatenate(raw, axis=-2)
            whole = joined.reshape(-1, joined.shape[-1])
            return Blocks(kept[0].quantization, whole, (len(whole), shape[-1]))

    def read() -> Array:
        return np.concatenate([part.read() for part in parts], axis=-2)

    def take(index: Index, transposed: bool) -> Array:
        if transposed:
            return read().reshape(-1, shape[-1]).T[index]
        rows = first.shape[-2]  # of one matrix: of each stack the first part has so many, then the second
        stack, row = np.divmod(np.arange(math.prod(shape[:-1]))[index], count * rows)
        which, row = np.divmod(row, rows)
        taken = np.empty((len(row), shape[-1]), np.float32)
        for i, part in enumerate(parts):
            mine = which == i
            if part.take and mine.any():
                taken[mine] = part.take(stack[mine] * rows + row[mine], False)
        return taken

    def forget() -> None:
        for part in parts:
            part.forget()

    name = " and ".join(part.name for part in parts)
    by_rows = take if all(part.take for part in parts) else None
    return LazyTensor(shape, first.file, read, blocks, name=name, take=by_rows, forget=forget)


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

    def is_copy(self, name: str) -> bool:
        """Whether another matrix has the very numbers of this one."""
        mine = self.tensors[name]
        others = [each for key, each in self.tensors.items() if key != name and each.shape == mine.shape]
        return any(_are_equal(mine, other) for other in others)

    def without(self, name: str) -> "Checkpoint":
        """All tensors but one."""
        return Checkpoint({key: tensor for key, tensor in self.tensors.items() if key != name}, self.source)

    def renamed(self, name: str, new_name: str) -> "Checkpoint":
        """The same tensors, one of them under another name."""
        return Checkpoint({new_name if k == name else k: tensor for k, tensor in self.tensors.items()}, self.source)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless the tensor is there in this shape; nothing is read."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.source} has no tensor {name!r}, which its config asks for: the checkpoint is incomplete, or "
                f"the config belongs to another model."
            )
        if tensor.shape != shape:
            own = f" ({tensor.name!r} in the file)" if tensor.name not in ("", name) else ""
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r}{own} has shape {list(tensor.shape)}, but the config implies "
                f"{list(shape)}."
            )

    def check_nothing_is_left_over(self, names: Container[str]) -> None:
        """Raise CheckpointError for a tensor that is none of `names`, under the name that its file has for it."""
        left = [name for name in self.tensors if name not in names and not name.endswith(_COMPUTED)]
        if not left:
            return
        tensor = self.tensors[left[0]]
        others = f" (nor are {len(left) - 1} others)" if len(left) > 1 else ""
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name or left[0]!r:.200} is no part of the model that the config describes"
            f"{others}: the config belongs to another model, or asks for something that is not built."
        )


def _are_equal(a: LazyTensor, b: LazyTensor, rows: int = 1024) -> bool:
    """Compares some rows at a time: what differs does so at once, and what is equal need not be in memory whole."""
    if a.take is None or b.take is None:
        return False
    parts = (slice(start, start + rows) for start in range(0, math.prod(a.shape[:-1]), rows))
    equal = all(np.array_equal(a.take(part, False), b.take(part, False)) for part in parts)
    a.forget()
    b.forget()
    return equal
