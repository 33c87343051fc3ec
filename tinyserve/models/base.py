"""What every architecture shares: the face of a model, and how its layers are built from a checkpoint.

Knows no architecture by name; registry.py keeps that table.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain

import numpy as np

from tinyserve.checkpoints.checkpoint import Checkpoint, Index, LazyTensor
from tinyserve.errors import CheckpointError
from tinyserve.models.batch import Batch
from tinyserve.models.config import ModelConfig
from tinyserve.models.dtypes import WEIGHT_DTYPES, kept_weights
from tinyserve.models.kv_cache import KVCache
from tinyserve.models.layers import Block, Embedding, Experts, LayerNorm, Linear, RMSNorm
from tinyserve.models.matrix import (
    IntegerMatrix,
    Matrix,
    no_bias,
    pack_parts,
    repack,
    stacked,
)
from tinyserve.models.row_orders import (
    Places,
    RowOrder,
    concatenated,
    expert_by_expert,
    interleaved_halves,
    interleaved_panels,
    within,
)
from tinyserve.progress import Progress, silent
from tinyserve.tensor.gguf_blocks import Blocks
from tinyserve.tensor.matmul import PLAIN, SILU_MUL
from tinyserve.tensor.norm import norm_rows
from tinyserve.tensor.quant import BLOCK, IntegerWeights, padded

Array = np.ndarray


class DecoderModel:
    """Token ids to logits: embedding, blocks, a last norm, a head, which is the embedding again where the two are tied.

    Holds weights and nothing else: state belongs to sequences, in the cache. A slice of a model (pipeline/) has some of
    the layers; only the first one embeds, and only the last one has a norm and a head.
    """

    embedding: Embedding
    norm: RMSNorm | LayerNorm
    head: Linear

    def __init__(
        self,
        config: ModelConfig,
        loader: "Loader",
        embedding: str,
        blocks: Sequence[Block],
        norm: Callable[[], RMSNorm | LayerNorm],
    ):
        self.config, self.layers, self.blocks = config, loader.layers, blocks
        tied = config.tie_word_embeddings
        if loader.is_first or (loader.is_last and tied):
            self.embedding = loader.embedding(embedding)
        if loader.is_last:
            self.norm = norm()
            self.head = self.embedding.head if tied else loader.head("lm_head")
        self.nbytes = loader.nbytes  # of all weights as they are kept
        self.weights_by_bits = loader.weights_by_bits
        self.kept = kept_weights(loader.dtype, loader.weights_by_bits, loader.nbytes)

    def embed(self, batch: Batch) -> Array:
        """-> (tokens, hidden): what the first block reads."""
        return self.embedding(batch.token_ids)

    def __call__(self, batch: Batch, cache: KVCache) -> Array:
        """-> hidden states (tokens, hidden) float32, before the last norm; of the wanted tokens, if others are not."""
        x = self.embed(batch) if self.layers.start == 0 else batch.stream
        last = len(self.blocks) - 1
        for i, (block, layer_cache) in enumerate(zip(self.blocks, cache.layers, strict=True)):
            x = block(x, batch, layer_cache, batch.wanted if i == last else None)
        return x

    def normed(self, hidden: Array) -> Array:
        """hidden (rows, hidden) -> (rows, hidden) behind the last norm: transformers' last_hidden_state."""
        return norm_rows(hidden, self.norm.norm)

    def logits(self, hidden: Array) -> Array:
        """hidden (rows, hidden) -> (rows, vocab) float32: the last norm, and the head."""
        return self.head(self.norm(hidden))


def gguf_names(
    parts: Mapping[str, str],
    embedding: str = "model.embed_tokens",
    layers: str = "model.layers",
    norm: str = "model.norm",
    **others: str,
) -> Callable[[str], str]:
    """A function from llama.cpp's name of a tensor to Hugging Face's; a name that it does not know stays as it is.

    `parts` are those of a layer, "attn_q" for example, and `others` those beside embedding, last norm and head.
    """
    outside = {"token_embd": embedding, "output_norm": norm, "output": "lm_head"} | others

    def renamed(name: str) -> str:
        match name.split("."):
            case [part, kind] if part in outside:
                return f"{outside[part]}.{kind}"
            case ["blk", layer, part, kind] if part in parts:
                return f"{layers}.{layer}.{parts[part]}.{kind}"
        return name

    return renamed


_MOST_PACKED = 8  # numbers to a stored value: of 4 bits in 32


class Loader:
    """Builds layers from a checkpoint, tensor by tensor, and counts what they take."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: str,
        max_model_len: int,
        progress: Progress | None = None,
        layers: range | None = None,
    ):
        """Check every tensor before anything is allocated; raises CheckpointError for one that is missing, misshapen,
        or left over. `layers` are those to build, by default all: tensors of others are not read.
        """
        self.checkpoint, self.dtype, self.max_model_len = checkpoint, dtype, max_model_len
        self.layers = range(config.num_hidden_layers) if layers is None else layers
        self.is_first, self.is_last = self.layers.start == 0, self.layers.stop == config.num_hidden_layers
        self.nbytes = 0
        self.weights_by_bits = Counter[int]()  # of matrices, how many weights have so many bits
        self._progress = progress or silent
        self._done = 0
        self.built: dict[str, Matrix | Array] = {}
        shapes = {tensor.name: tensor.shape for tensor in config.tensor_shapes()}
        packed: set[str] = set()
        parts: set[str] = set()
        for key in checkpoint:
            weights = [f"{name}.weight" for name in _names(key)] if key.endswith(f".{STREAM}") else []
            if weights and all(weight in shapes for weight in weights):
                self._check_size(key, [shapes[weight] for weight in weights])
                packed.update(weights)
                parts.add(key)
        for name, shape in shapes.items():
            if name not in packed:
                checkpoint.check(name, shape)
        self._total = sum(tensor.size for tensor in config.tensor_shapes(self.layers))
        checkpoint.check_nothing_is_left_over(shapes.keys() | parts)
        self._shapes = shapes

    def _check_size(self, key: str, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise CheckpointError where a packed matrix cannot be of these shapes: room is taken by what they say."""
        stored = math.prod(self.checkpoint.tensors[key].shape)
        numbers = sum(map(math.prod, shapes))
        if numbers > _MOST_PACKED * stored:
            raise CheckpointError(
                f"{self.checkpoint.source}: {key!r} is packed in {stored} values, and config.json makes it matrices of "
                f"{' and '.join(str(list(shape)) for shape in shapes)}: the two do not belong together."
            )

    def array(self, name: str) -> Array:
        """A tensor as float32, for norms, biases and positions."""
        array = np.ascontiguousarray(self._read(name))
        self.nbytes += array.nbytes
        array.flags.writeable = False
        self.built[name] = array
        return array

    def linear(self, *names: str, transposed: bool = False, activation: int = PLAIN) -> Linear:
        """The layers `names` as one, outputs one after the other; `transposed` where the file has (inputs, outputs)."""
        bias = self._bias(names, concatenated)
        return Linear(self._matrix(names, self.dtype, concatenated, transposed), bias, activation)

    def gated(self, *names: str) -> Linear:
        """silu(gate(x)) · up(x) as one product: a panel of gates, the panel that they let through, and so on.

        `names` are gate and up, or the one layer that has the gates above what they let through.
        """
        order = interleaved_panels if len(names) == 2 else interleaved_halves
        width = sum(self._shapes[f"{name}.weight"][0] for name in names) // 2
        return Linear(self._matrix(names, self.dtype, order), self._bias(names, order), SILU_MUL, width)

    def experts(self, name: str) -> Experts:
        """The experts of a tensor (experts, outputs, inputs)."""
        experts, width, _ = self._shapes[f"{name}.weight"]
        matrix = self._matrix((name,), self.dtype, partial(expert_by_expert, concatenated, experts))
        return Experts(matrix, PLAIN, width)

    def gated_experts(self, name: str) -> Experts:
        """The same for experts that have gates above what they let through, as in `gated`."""
        experts, rows, _ = self._shapes[f"{name}.weight"]
        matrix = self._matrix((name,), self.dtype, partial(expert_by_expert, interleaved_halves, experts))
        return Experts(matrix, SILU_MUL, rows // 2)

    def head(self, name: str) -> Linear:
        """A head that is no embedding, or a router: like an embedding, it keeps 8 bits."""
        return Linear(self._matrix((name,), WEIGHT_DTYPES[self.dtype].at_least_8_bits, concatenated), no_bias())

    def embedding(self, name: str) -> Embedding:
        """A token embedding, which serves as the head of a model that ties them."""
        return Embedding(self._matrix((name,), WEIGHT_DTYPES[self.dtype].at_least_8_bits, concatenated))

    def _bias(self, names: Sequence[str], order: RowOrder) -> Array:
        biases = [self.array(f"{name}.bias") for name in names if f"{name}.bias" in self._shapes]
        if not biases:
            return no_bias()
        total, places = order([len(bias) for bias in biases])
        whole = np.zeros(total, np.float32)
        for place, bias in zip(places, biases, strict=True):
            whole[place] = bias
        whole.flags.writeable = False
        return whole

    def _matrix(self, names: Sequence[str], dtype: str, order: RowOrder, transposed: bool = False) -> Matrix:
        """The weights of `names` as one matrix: as the file has it packed, or from its own blocks, or from floats."""
        key = "+".join(names)
        shapes = [self._shapes[f"{name}.weight"][:: -1 if transposed else 1] for name in names]
        rows, places = order([math.prod(shape[:-1]) for shape in shapes])
        shape = rows, shapes[0][-1]
        matrix: Matrix | None
        if f"{key}.{STREAM}" in self.checkpoint:
            matrix = self._packed(key, shape, dtype)
        else:
            tensors = [self.checkpoint.tensors[f"{name}.weight"] for name in names]
            if WEIGHT_DTYPES[dtype].is_integer and (make := tensors[0].packed):
                matrix = IntegerMatrix(shape, make(shape, dtype), WEIGHT_DTYPES[dtype].activation_bits)
            else:
                matrix = None if transposed else self._from_blocks(key, tensors, shape, places, dtype)
        if matrix is None:
            matrix = self._from_floats(names, shape, places, dtype, transposed)
        else:
            self._advance(sum(math.prod(part) for part in shapes))
        self.nbytes += matrix.nbytes
        self.weights_by_bits[matrix.bits] += math.prod(shape)
        self.built[key] = matrix
        return matrix

    def _packed(self, key: str, shape: tuple[int, int], dtype: str) -> Matrix:
        """A matrix that `tinyserve quantize` wrote: mapped, not read; raises CheckpointError for another layout."""
        tensor = self.checkpoint.tensors[f"{key}.{STREAM}"]
        stream = tensor.stored() if tensor.stored is not None else tensor.read()
        packed: IntegerWeights | None = None
        with suppress(ValueError):
            packed = IntegerWeights.of(stream)
        if packed is None or not packed.holds(shape):
            raise CheckpointError(
                f"{self.checkpoint.source}: {key!r} is packed as {stream.dtype} {list(stream.shape)}, which is no "
                f"matrix of {list(shape)}: write the checkpoint again with this version's `tinyserve quantize`."
            )
        return IntegerMatrix(shape, packed, WEIGHT_DTYPES[dtype].activation_bits)

    def _from_blocks(
        self, key: str, tensors: Sequence[LazyTensor], shape: tuple[int, int], places: Places, dtype: str
    ) -> Matrix | None:
        """A matrix from GGUF's blocks without a loss; None where they are of several kinds, or do not fit the dtype."""
        blocks = [tensor.blocks() for tensor in tensors if tensor.blocks]
        if len(blocks) < len(tensors) or len({one.quantization for one in blocks}) > 1:
            return None
        kind, width = blocks[0].quantization, blocks[0].raw.shape[1]
        whole = len(blocks) == 1 and isinstance(places[0], slice)

        def repacked(start: int, end: int) -> IntegerWeights | None:
            if whole:
                raw = blocks[0].raw[start:end]
            else:
                raw = np.zeros((end - start, width), np.uint8)
                for i, source, place in within(start, end, places):
                    raw[place] = blocks[i].raw[source]
            packed = repack(Blocks(kind, raw, (end - start, shape[1])), dtype)
            for tensor in tensors:
                tensor.forget()
            return packed

        steps = _steps(*shape)
        first = repacked(*steps[0])
        if first is None:
            return None
        rest = (part.stream for step in steps[1:] if (part := repacked(*step)) is not None)
        packed = IntegerWeights.of(stacked(chain([first.stream], rest), shape[0]))
        if not packed.is_finite():
            raise CheckpointError(
                f"{tensors[0].file}: the weights of {key!r} hold scales that are no numbers: they are damaged, "
                f"download them again."
            )
        return IntegerMatrix(shape, packed, WEIGHT_DTYPES[dtype].activation_bits)

    def _from_floats(
        self, names: Sequence[str], shape: tuple[int, int], places: Places, dtype: str, transposed: bool
    ) -> Matrix:
        """A few rows at a time are floats: the peak is the packed matrix and those."""
        whole_names = [f"{name}.weight" for name in names]
        # What cannot be taken row by row is read once and as a whole.
        alone = all(self.checkpoint.tensors[name].take for name in whole_names)

        def parts() -> Iterator[Array]:
            for start, end in _steps(*shape) if alone else [(0, shape[0])]:
                rows = np.empty((0, 0), np.float32)
                for i, source, place in within(start, end, places):
                    taken = self._take(whole_names[i], source, transposed)
                    if len(taken) == end - start and isinstance(place, slice):
                        rows = taken
                    else:
                        rows = rows if rows.size else np.zeros((end - start, shape[1]), np.float32)
                        rows[place] = taken
                yield rows
                for name in whole_names:
                    self.checkpoint.tensors[name].forget()

        try:
            return pack_parts(parts(), shape, dtype)
        except OverflowError as error:
            name = whole_names[0]
            file = self.checkpoint.tensors[name].file
            raise CheckpointError(f"{file}: tensor {name!r} cannot be {dtype}: {error}; use bfloat16.") from None

    def rms_norm(self, name: str, eps: float) -> RMSNorm:
        return RMSNorm(self.array(f"{name}.weight"), eps)

    def layer_norm(self, name: str, eps: float) -> LayerNorm:
        return LayerNorm(self.array(f"{name}.weight"), self.array(f"{name}.bias"), eps)

    def _take(self, name: str, index: Index, transposed: bool) -> Array:
        """Rows of a matrix, or of its transpose."""
        tensor = self.checkpoint.tensors[name]
        if tensor.take is None:
            whole = self._read(name)
            whole = whole.reshape(-1, whole.shape[-1])
            return (whole.T if transposed else whole)[index]
        rows = tensor.take(index, transposed)
        if not _is_finite(rows):
            self._check_numbers(name, self.checkpoint[name])
        self._advance(rows.size)
        return rows

    def _read(self, name: str) -> Array:
        array = self.checkpoint[name]
        self._check_numbers(name, array)
        self._advance(array.size)
        return array

    def _check_numbers(self, name: str, array: Array) -> None:
        if not _is_finite(array) and not (finite := np.isfinite(array)).all():
            where = [int(i) for i in np.argwhere(~finite)[0]]
            raise CheckpointError(
                f"{self.checkpoint.tensors[name].file}: tensor {name!r} holds {array[tuple(where)]} at {where}: the "
                f"weights are damaged, download them again."
            )

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress("load", self._done, self._total)


@np.errstate(over="ignore", invalid="ignore")
def _is_finite(array: Array) -> bool:
    """False if anything in it may not be a number: nor is the sum then, which costs a tenth of looking at each."""
    return bool(np.isfinite(array.sum()))


_AT_ONCE = 1 << 20  # weights that are floats at the same time while a matrix is packed
STREAM = "stream"  # the name of a packed matrix in a checkpoint, behind that of its layers


def _names(key: str) -> list[str]:
    """The layers that are one matrix under this name in a packed checkpoint."""
    return key.removesuffix(f".{STREAM}").split("+")


def _steps(rows: int, columns: int) -> list[tuple[int, int]]:
    """First and last rows of the parts in which a matrix is packed, each a multiple of BLOCK but for the last."""
    step = padded(max(1, _AT_ONCE // max(1, columns)), BLOCK)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
