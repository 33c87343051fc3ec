"""Where a step's time goes: its program, instruction by instruction, with bytes, times and shares of the limits.

Knows the model and its program. What the engine adds is no part of it: scheduling, grammars, sampling that is not
greedy.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tinyserve.engine_options import EngineOptions
from tinyserve.errors import UserError
from tinyserve.models.config import ModelConfig
from tinyserve.models.config.costs import state_bytes_per_sequence, weight_bytes
from tinyserve.models.dtypes import WEIGHT_DTYPES
from tinyserve.progress import size

if TYPE_CHECKING:
    import numpy as np

    from tinyserve.llm import LLM
    from tinyserve.models.base import DecoderModel
    from tinyserve.models.batch import Batch, Wanted
    from tinyserve.models.kv_cache import KVCache
    from tinyserve.tensor.program import Description, Operand, Program

DEPTH = 128
BLOCK = EngineOptions().block_size
MOST_TOKENS = 8192  # of a step
LEAST_RUNS, MOST_RUNS, LONGEST = 3, 50, 5.0  # after so many seconds the least are enough


@dataclass(frozen=True)
class StepShape:
    """A step that computes `tokens` new tokens of each of `batch` sequences, behind `depth` that are in the cache."""

    tokens: int = 1
    depth: int = DEPTH
    batch: int = 1

    def __str__(self) -> str:
        if self.tokens == 1:
            return f"decode at depth {self.depth}, batch {self.batch}"
        behind = f" at depth {self.depth}" if self.depth else ""
        return f"prefill of {self.tokens} tokens{behind}" + (f", batch {self.batch}" if self.batch > 1 else "")

    @property
    def length(self) -> int:
        """Tokens of each sequence after the step."""
        return self.depth + self.tokens

    @property
    def blocks(self) -> int:
        """Blocks of the cache that each sequence has."""
        return -(-self.length // BLOCK)

    def keys(self, queries: int, window: int) -> int:
        """Positions of the cache that the last `queries` tokens of each sequence see, for all sequences together;
        `window` 0 is none.
        """
        return self.batch * (min(self.length, window + queries - 1) if window else self.length)

    def pairs(self, queries: int, window: int) -> int:
        """Pairs of one of those tokens and a position that it sees, for all sequences together."""
        seen = (min(position + 1, window or self.length) for position in range(self.length - queries, self.length))
        return self.batch * sum(seen)

    def check(self, config: ModelConfig, dtype: str, kv_cache_dtype: str, memory: int, synthetic: bool) -> None:
        """Raise UserError where the model's context, a step, or `memory` bytes do not hold it.

        Of weights that are read from a file it says nothing: they may have fewer bits than `dtype`.
        """
        from tinyserve.models.kv_cache import KVCache

        limit = config.max_position_embeddings
        if self.length > limit:
            name = "--depth" if self.tokens == 1 else "--prefill"
            raise UserError(f"{self} comes to {self.length} tokens, and the context holds {limit}: lower {name}.")
        if self.tokens * self.batch > MOST_TOKENS:
            raise UserError(
                f"{self} is a step of {self.tokens * self.batch} tokens; it can have {MOST_TOKENS}: lower --batch"
                f"{' or --prefill' if self.tokens > 1 else ''}."
            )
        weights = weight_bytes(config, dtype)
        if synthetic and weights > memory:
            raise UserError(
                f"The weights take {size(weights)} in {dtype}, and {size(memory)} of memory are free: take "
                f"--dtype {'int4' if WEIGHT_DTYPES[dtype].is_integer else 'int8 or int4'}, or a smaller model."
            )
        block = KVCache.block_nbytes(config, BLOCK, kv_cache_dtype)
        need, room = self.batch * (self.blocks * block + state_bytes_per_sequence(config)), max(0, memory - weights)
        if need > room:
            raise UserError(
                f"{self} takes {size(need)} of keys, values and states, and there is room for {size(room)}: lower "
                f"--batch or --depth."
            )


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What some instructions do, in so much time. What fits a cache of the processor is read faster than memory."""

    seconds: float
    bytes: float  # of weights, cache and activations, each that is touched counted once
    operations: float  # of products and attention, a multiplication and an addition being two
    peak_seconds: float  # what these operations take at least

    @classmethod
    def total(cls, parts: "Iterable[Cost]") -> "Cost":
        """All of them together."""
        parts = list(parts)
        return cls(
            sum(part.seconds for part in parts),
            sum(part.bytes for part in parts),
            sum(part.operations for part in parts),
            sum(part.peak_seconds for part in parts),
        )

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds

    @property
    def operations_per_second(self) -> float:
        return self.operations / self.seconds

    @property
    def share_of_peak(self) -> float:
        """Of the operations a second that were measured here for numbers of these bits."""
        return self.peak_seconds / self.seconds


@dataclass(frozen=True)
class Row:
    """One instruction of the program."""

    layer: int | None  # None before the first layer and behind the last
    kernel: str
    kind: str  # the file of tinyserve/tensor/ that has the kernel
    shape: str  # in words
    operands: dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape of each array, by name
    weight_bytes: int  # of `cost.bytes`, those that a product reads of its matrix
    cost: Cost


@dataclass(frozen=True)
class Folded:
    """Instructions that are alike in layers that are alike."""

    rows: list[Row]
    cost: Cost  # of all

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def layers(self) -> list[int]:
        """The layers that have it; none outside of them."""
        return [row.layer for row in self.rows if row.layer is not None]


@dataclass(frozen=True)
class Trace:
    """A step's program with its times: the median of each instruction, over `runs` runs."""

    shape: StepShape
    rows: list[Row]
    runs: int
    bandwidth: float  # bytes a second that this machine reads, measured
    peaks: dict[str, float]  # operations a second, measured, by the dtype that is multiplied

    @property
    def cost(self) -> Cost:
        """The whole step's."""
        return Cost.total(row.cost for row in self.rows)

    def kinds(self) -> dict[str, list[Row]]:
        """The instructions of each kind, the kind that takes the longest first."""
        kinds = dict[str, list[Row]]()
        for row in self.rows:
            kinds.setdefault(row.kind, []).append(row)
        return dict(sorted(kinds.items(), key=lambda item: -sum(row.cost.seconds for row in item[1])))

    def folded(self) -> list[list[Folded]]:
        """What is before the layers, the layers of each kind as one, what is behind them."""
        layers = dict[int, list[Row]]()
        for row in self.rows:
            if row.layer is not None:
                layers.setdefault(row.layer, []).append(row)
        alike = dict[Any, list[list[Row]]]()
        for rows in layers.values():
            # A number such as a scale that differs from layer to layer makes them no less alike.
            alike.setdefault(tuple((row.kernel, tuple(row.operands.items())) for row in rows), []).append(rows)
        first, last = min(layers, default=0), max(layers, default=0)
        begin = next((i for i, row in enumerate(self.rows) if row.layer == first), 0)
        end = len(self.rows) - next((i for i, row in enumerate(reversed(self.rows)) if row.layer == last), 0)
        return [
            [_fold([row]) for row in self.rows[:begin]],
            *[[_fold(same) for same in zip(*group, strict=True)] for group in alike.values()],
            [_fold([row]) for row in self.rows[end:]],
        ]

    def figures(self, cost: Cost) -> dict[str, Any]:
        """A cost beside the step's and the limits, for scripts."""
        return {
            "seconds": cost.seconds,
            "share_of_step": cost.seconds / self.cost.seconds,
            "bytes": cost.bytes,
            "bytes_per_second": cost.bytes_per_second,
            "share_of_bandwidth": cost.bytes_per_second / self.bandwidth,
            "operations": cost.operations,
            "operations_per_second": cost.operations_per_second,
            "share_of_peak": cost.share_of_peak,
        }

    def report(self) -> dict[str, Any]:
        """All of it for scripts."""
        return {
            "step": str(self.shape),
            "tokens": self.shape.tokens,
            "depth": self.shape.depth,
            "batch": self.shape.batch,
            "runs": self.runs,
            "bandwidth": self.bandwidth,
            "peaks": self.peaks,
            "total": self.figures(self.cost),
            "kinds": [
                {"kind": kind, "instructions": len(rows), **self.figures(Cost.total(row.cost for row in rows))}
                for kind, rows in self.kinds().items()
            ],
            "instructions": [
                {
                    "layer": row.layer,
                    "kernel": row.kernel,
                    "kind": row.kind,
                    "operands": {name: {"dtype": of, "shape": shape} for name, (of, shape) in row.operands.items()},
                    "weight_bytes": row.weight_bytes,
                    **self.figures(row.cost),
                }
                for row in self.rows
            ],
        }


def _fold(rows: Sequence[Row]) -> Folded:
    return Folded(list(rows), Cost.total(row.cost for row in rows))


def trace(llm: "LLM", shape: StepShape) -> Trace:
    """Capture a step of this shape, with a cache of its own, and run it some tens of times.

    The tokens behind which it computes are not read: timing does not depend on what is in the cache.
    """
    from tinyserve.models.base import DecoderModel
    from tinyserve.models.kv_cache import KVCache
    from tinyserve.tensor import _jit, limits

    if not isinstance(llm.model, DecoderModel):
        raise UserError("A step is traced in one process: load the model without pipeline_parallel_size.")
    with _jit.one_at_a_time(llm.num_threads):
        cache = KVCache(llm.config, shape.batch * shape.blocks, BLOCK, llm.kv_cache_dtype, shape.batch)
        _fill(cache)
        program, layers = captured(llm.model, cache, shape)
        times, runs = _times(program)
        bandwidth = limits.memory_bandwidth()
        descriptions = (program.descriptions or [])[1:]
        kind = WEIGHT_DTYPES[llm.dtype]
        multiplied = [_multiplied(one, kind.activation_bits) for one in descriptions]
        peaks = {
            name: limits.integer_peak(*bits) if bits else limits.float_peak()
            for name, bits in dict(multiplied).items()
            if name
        }
    rows = []
    for one, (name, _), layer, seconds in zip(descriptions, multiplied, layers, times, strict=True):
        touched = {operand.name: _touched(one, operand, shape) for operand in one.operands.values()}
        operations = _operations(one, shape)
        rows.append(
            Row(
                layer,
                one.name,
                one.file,
                _shape_of(one, shape),
                {operand.name: (str(operand.dtype), operand.shape) for operand in one.operands.values()},
                sum(touched[name] for name in ("w", "w.stream") if name in touched),
                Cost(seconds, sum(touched.values()), operations, operations / peaks[name] if name else 0.0),
            )
        )
    return Trace(shape, rows, runs, bandwidth, peaks)


def captured(model: "DecoderModel", cache: "KVCache", shape: StepShape) -> "tuple[Program, list[int | None]]":
    """The described program of a step behind `start_clock`, and the layer of each instruction but that one."""
    from tinyserve.models.batch import Batch, BatchShape
    from tinyserve.models.forward import compute
    from tinyserve.scheduling.sequence import CacheState
    from tinyserve.tensor.arena import Arena
    from tinyserve.tensor.program import capture, start_clock

    places = [
        CacheState(list(range(i * shape.blocks, (i + 1) * shape.blocks)), i, shape.depth) for i in range(shape.batch)
    ]
    # Tokens that differ, as they do in use: a mixture sends them to experts of their own.
    prompts = [
        [7919 * (i + 1) * (seed + 1) % model.config.vocab_size for i in range(shape.tokens)]
        for seed in range(shape.batch)
    ]
    work = list(zip(prompts, places, strict=True))
    batch = Batch.empty(BatchShape.of(work, shape.batch))
    batch.fill(work, [shape.tokens * (i + 1) - 1 for i in range(shape.batch)], BLOCK)
    layers: list[int | None] = []
    with capture(Arena(), described=True) as program:
        start_clock(0)

        def noting(layer: int, block: Callable[..., Any]) -> Callable[..., Any]:
            def noted(x: "np.ndarray", batch: "Batch", cache: Any, wanted: "Wanted | None") -> "np.ndarray":
                layers.extend([None] * (len(program) - 1 - len(layers)))
                x = block(x, batch, cache, wanted)
                layers.extend([layer] * (len(program) - 1 - len(layers)))
                return x

            return noted

        beside: Any = copy.copy(model)  # the engine's own stays as it is
        beside.blocks = [noting(i, block) for i, block in enumerate(model.blocks)]
        compute(beside, cache, batch)
    layers.extend([None] * (len(program) - 1 - len(layers)))
    return program, layers


def _fill(cache: "KVCache") -> None:
    """Write to all of it: memory that nobody has written to is one page of zeros, which is always in a cache."""
    for layer in cache.layers:
        for array in layer:
            array.fill(0x3F803F80 if array.dtype == "uint32" else 1)  # 1.0 twice in bfloat16


def _times(program: "Program") -> tuple[list[float], int]:
    """Seconds of each instruction but the first, the median of some runs, and how many runs."""
    import numpy as np

    ticks = np.zeros(len(program), np.int64)
    samples, clocks = list[np.ndarray](), list[tuple[float, int]]()
    program.run()  # compiled code and weights come into memory
    start = perf_counter()
    while len(samples) < MOST_RUNS and (len(samples) < LEAST_RUNS or perf_counter() - start < LONGEST):
        program.run(ticks.ctypes.data)
        clocks.append((perf_counter(), int(ticks[-1])))
        samples.append(np.diff(ticks))
    (first, first_tick), (last, last_tick) = clocks[0], clocks[-1]
    medians = np.median(samples, axis=0) * (last - first) / (last_tick - first_tick)
    return np.maximum(medians, 1e-9).tolist(), len(samples)


# --- what an instruction reads and does -------------------------------------------------------------------------------


def _touched(one: "Description", operand: "Operand", shape: StepShape) -> int:
    """Bytes of an array that an instruction reads or writes: all, unless it is a table, a cache, or room to work in."""
    from tinyserve.tensor.quant import PAIR

    whole, sizes = operand.nbytes, {other.name: other.nbytes for other in one.operands.values()}
    if not whole:
        return 0
    match one.name, operand.name.partition(".")[0]:
        case _, "scratch" | "parts" | "chunks":
            return 0
        case ("_matmul_integer_row", "h" | "quantized") | ("_quantize_rows", "h") | ("_matmul_float", "h"):
            return 0  # `_matmul_float` reads x or, normalised before, as much of h
        case "_take_rows_float" | "_take_rows_integer", "packed":
            return whole * one.operands["ids"].shape[0] // (operand.shape[0] * PAIR)
        case "_take_rows", "x":
            return sizes["y"]
        case "add_rows", "table":
            return sizes["x"]
        case "rotate_and_store", "rope_table":
            return whole // operand.shape[0] * shape.tokens * shape.batch
        case "rotate_and_store", "pages":
            return whole // (operand.shape[0] * BLOCK) * shape.tokens * shape.batch
        case "_attend", "pages":
            return whole // (operand.shape[0] * BLOCK) * shape.keys(*_queries(one, shape))
        case "_attend", "qkv":
            return sizes["out"]
        case "_causal_conv1d", "windows":
            return 2 * whole  # read and written
        case "_selective_scan", "states":
            return 2 * whole
        case "_causal_conv1d", "inputs":
            return sizes["y"]
        case "_gated_rms_norm", "gate":
            return sizes["out"]
        case "_selective_scan", "dt":
            return operand.shape[0] * one.operands["states"].shape[1] * operand.dtype.itemsize
        case "_choose", "logits":
            return whole // one.operands["peaks"].shape[1]  # the chunk with the largest
        case "_grouped_matmul_float" | "_grouped_matmul_integer", "w":
            experts = one.operands["offsets"].shape[0] - 1
            return whole * min(experts, one.operands["y"].shape[0]) // experts  # at most one a row
    return whole


def _queries(one: "Description", shape: StepShape) -> tuple[int, int]:
    """Of an attention, how many tokens of each sequence it is for, in the last layer one, and its window."""
    return one.operands["out"].shape[0] // shape.batch, int(one.numbers["scoring.window"])


def _weights(one: "Description") -> tuple[int, int] | None:
    """Outputs and inputs of a product's matrix, padded as it is kept; None where it is no product."""
    from tinyserve.tensor.quant import PAIR

    if "w.stream" in one.operands:
        pairs, groups, _ = one.operands["w.stream"].shape
        return pairs * PAIR, groups * int(one.numbers["w.group"])
    if "w" in one.operands:
        pairs, inputs, _ = one.operands["w"].shape
        return pairs * PAIR, inputs
    return None


def _operations(one: "Description", shape: StepShape) -> float:
    """Multiplications and additions of a product or of attention; 0 where there are few."""
    if weights := _weights(one):
        experts = one.operands["offsets"].shape[0] - 1 if "offsets" in one.operands else 1
        return 2 * one.operands["y"].shape[0] * math.prod(weights) / experts
    if one.name == "_attend":
        return 4 * one.operands["out"].shape[1] * shape.pairs(*_queries(one, shape))
    return 0


def _multiplied(one: "Description", activation_bits: int) -> tuple[str, tuple[int, int] | None]:
    """In which dtype it multiplies, and the bits of weights and activations where they are integers."""
    if "w.stream" in one.operands:
        bits = 8 if one.operands["w.stream"].dtype == "int8" else 4
        return f"w{bits}a{activation_bits}", (bits, activation_bits)
    return ("float32", None) if "w" in one.operands or one.name == "_attend" else ("", None)


def _shape_of(one: "Description", shape: StepShape) -> str:
    """What people want to know of its shapes, in a few characters."""
    from tinyserve.tensor.matmul import SILU_MUL

    if weights := _weights(one):
        rows, outputs = one.operands["y"].shape
        inputs = one.operands["x"].shape[1] if "x" in one.operands else weights[1]
        gates = "2·" if one.numbers["after.activation"] == SILU_MUL else ""
        return f"{f'{rows}×' if rows > 1 else ''}{inputs} → {gates}{outputs}"
    if one.name == "_attend":
        keys = shape.keys(*_queries(one, shape))
        return f"{one.numbers['heads.heads']}/{one.numbers['heads.kv_heads']}, {keys} keys"
    for name in ("logits", "y", "out", "rows", "qkv", "quantized.q", "ids", "x"):
        if name in one.operands:
            return "×".join(map(str, one.operands[name].shape))
    return ""
