"""`trace`: what is told of each instruction of a step, over tiny models of every family, and what is printed.

No time is asserted but that it is one: these tests pass on the slowest machine.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from command_line import Shell, Terminal

from tinyserve import LLM
from tinyserve.errors import UserError
from tinyserve.evaluation import trace
from tinyserve.evaluation.trace import Cost, Row, StepShape, Trace
from tinyserve.models.base import DecoderModel
from tinyserve.models.config import parse_config
from tinyserve.models.config.costs import state_bytes_per_sequence
from tinyserve.models.matrix import Matrix
from tinyserve.tensor import limits

FolderOf = Callable[[str], Path]
LlmOf = Callable[..., LLM]
FAMILIES = (
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "granite", "granite-moe", "granite-hybrid", "granite-hybrid-moe",
    "falcon-7b", "falcon-40b", "falcon-rw",
)  # fmt: skip
KINDS = {"matmul", "attention", "kv_cache", "norm", "quant", "rows", "mamba2", "moe", "grouped_matmul", "sampling"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST_RUNS", 3)
    monkeypatch.setattr(limits, "memory_bandwidth", lambda: 1e10)
    monkeypatch.setattr(limits, "PASSES", 2)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def matrices(part: Any) -> Iterator[Matrix]:
    """Every weight matrix within a part of a model."""
    if isinstance(part, Matrix):
        yield part
    elif isinstance(part, list):
        for one in part:
            yield from matrices(one)
    elif type(part).__module__.startswith("tinyserve.models."):
        for one in vars(part).values() if hasattr(part, "__dict__") else ():
            yield from matrices(one)


def product_bytes(model: DecoderModel, shape: StepShape) -> int:
    """What the products of a step read of the weights, where each token may choose experts of its own: of the last
    layer's those of the sequences' last tokens.
    """
    experts, each = (getattr(model.config, key, 0) for key in ("num_local_experts", "num_experts_per_tok"))
    total = sum(matrix.nbytes for matrix in matrices([model.head]))
    for i, block in enumerate(model.blocks):
        tokens = shape.batch * (1 if i == len(model.blocks) - 1 else shape.tokens)
        of_experts = [
            of.matrix
            for of in (getattr(block.mlp, "up", None), getattr(block.mlp, "down", None))
            if type(of).__name__ == "Experts"
        ]
        for matrix in matrices([block]):
            is_chosen = any(matrix is one for one in of_experts)
            total += matrix.nbytes * min(experts, tokens * each) // experts if is_chosen else matrix.nbytes
    return total


# --- what is told of a program ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [StepShape(1, 20), StepShape(12, 0, 2)], ids=str)
def test_every_instruction_of_every_family(llm_of: LlmOf, name: str, shape: StepShape) -> None:
    llm = llm_of(name)
    told = trace.trace(llm, shape)
    layers = llm.config.num_hidden_layers
    assert {row.kind for row in told.rows} <= KINDS
    assert all(row.cost.seconds > 0 and row.cost.bytes > 0 and row.shape and row.operands for row in told.rows)
    assert sorted({row.layer for row in told.rows if row.layer is not None}) == list(range(layers))
    assert told.rows[0].layer is None and told.rows[-1].kernel == "_choose"
    order = [row.layer for row in told.rows if row.layer is not None]
    assert order == sorted(order)
    assert sum(row.weight_bytes for row in told.rows) == product_bytes(llm.model, shape)
    assert {row.kind for row in told.rows if row.weight_bytes} <= {"matmul", "grouped_matmul"}
    assert ("mamba2" in told.kinds()) == ("hybrid" in name)
    assert ("grouped_matmul" in told.kinds()) == ("moe" in name)
    folded = [one for section in told.folded() for one in section]
    assert sorted(id(row) for one in folded for row in one.rows) == sorted(id(row) for row in told.rows)
    assert sum(one.cost.seconds for one in folded) == pytest.approx(told.cost.seconds)
    assert sum(one.cost.bytes for one in folded) == pytest.approx(told.cost.bytes)
    sections = told.folded()[1:-1]
    assert sum(len(section[0].rows) for section in sections) == layers
    # Layers of two kinds in a hybrid; and of a prompt the last layer is for the last token of each sequence.
    assert len(sections) == (2 if "hybrid" in name else 1) + (shape.tokens > 1)
    report = json.loads(json.dumps(told.report()))
    assert len(report["instructions"]) == len(told.rows)
    assert sum(kind["instructions"] for kind in report["kinds"]) == len(told.rows)
    assert sum(kind["share_of_step"] for kind in report["kinds"]) == pytest.approx(1)


@pytest.mark.parametrize("dtype", ["bfloat16", "w8a8", "int8", "int4", "w4a8"])
def test_every_dtype(llm_of: LlmOf, dtype: str) -> None:
    for shape in (StepShape(1, 20), StepShape(1, 20, 3)):
        llm = llm_of("granite-moe", dtype)
        told = trace.trace(llm, shape)
        assert sum(row.weight_bytes for row in told.rows) == product_bytes(llm.model, shape)
        expected = {"float32"} if dtype == "bfloat16" else {llm.dtype, llm.dtype.replace("w4", "w8"), "float32"}
        assert set(told.peaks) == expected and min(told.peaks.values()) > 0


def test_bytes_and_operations_of_a_step(llm_of: LlmOf) -> None:
    told = trace.trace(llm_of("llama"), StepShape(1, 20))
    at = {row.kernel: row for row in told.rows if row.layer in (None, 1)}
    # Keys of 24 numbers and values of two vectors, for five heads and 21 tokens, the query, the answer, and where.
    attend = at["_attend"]
    assert attend.shape == "5/5, 21 keys"
    assert attend.cost.bytes == 4 * (5 * 21 * (24 + 32) + 2 * 120 + 32) + 3 * 8
    assert attend.cost.operations == 4 * 5 * 24 * 21
    assert at["rotate_and_store"].cost.bytes == 4 * (3 * 120 + 24 + 5 * (24 + 32) + 32) + 3 * 8
    assert at["_take_rows_float"].cost.bytes == 2 * 4 * 120 + 8
    head = [row for row in told.rows if row.kind == "matmul"][-1]
    assert head.shape == f"120 → {checkpoints.VOCAB}"
    padded = head.weight_bytes // (4 * 120)
    assert head.cost.operations == 2 * 120 * padded
    assert head.cost.bytes == head.weight_bytes + 4 * (2 * 120 + checkpoints.VOCAB)  # norm, x, y
    gates = next(row for row in told.rows if "2·" in row.shape)
    assert gates.shape == "120 → 2·157"
    # Causal: the first token sees one, the last all.
    prefill = trace.trace(llm_of("llama"), StepShape(12, 4, 2))
    attend = next(row for row in prefill.rows if row.kernel == "_attend")
    assert attend.cost.operations == 4 * 5 * 24 * 2 * sum(range(5, 17))
    assert attend.shape == "5/5, 32 keys"
    last = [row for row in prefill.rows if row.kernel == "_attend"][-1]
    assert last.cost.operations == 4 * 5 * 24 * 2 * 16
    assert last.operands["out"][1] == (2, 120)


def test_a_window_and_states(llm_of: LlmOf) -> None:
    windowed = trace.trace(llm_of("mistral"), StepShape(1, 20))
    assert {row.shape for row in windowed.rows if row.kernel == "_attend"} == {"6/2, 5 keys"}
    assert StepShape(3, 20).keys(3, 5) == 7 and StepShape(3, 20).pairs(3, 5) == 15
    assert StepShape(3, 20).keys(1, 5) == 5 and StepShape(3, 20).pairs(1, 5) == 5
    assert StepShape(3, 0).keys(3, 5) == 3 and StepShape(3, 0).pairs(3, 0) == 6
    llm = llm_of("granite-hybrid")
    told = trace.trace(llm, StepShape(1, 20, 3))
    states = 2 * 3 * state_bytes_per_sequence(llm.config)  # read and written
    assert states < told.figures(Cost.total(row.cost for row in told.kinds()["mamba2"]))["bytes"] < 1.5 * states


def test_layers_that_are_alike_are_folded() -> None:
    def row(layer: int | None, kernel: str, seconds: float) -> Row:
        return Row(layer, kernel, "rows", "1", {}, 0, Cost(seconds, 1.0, 0.0, 0.0))

    rows = [row(None, "first", 1), row(0, "a", 1), row(0, "b", 2), row(1, "c", 4), row(2, "a", 3), row(2, "b", 4)]
    told = Trace(StepShape(), [*rows, row(None, "last", 8)], 1, 1.0, {})
    sections = told.folded()
    assert [[(one.first.kernel, one.layers, one.cost.seconds) for one in section] for section in sections] == [
        [("first", [], 1)], [("a", [0, 2], 4), ("b", [0, 2], 6)], [("c", [1], 4)], [("last", [], 8)],
    ]  # fmt: skip
    assert told.cost == Cost(23, 7, 0, 0)


def test_the_engine_is_left_as_it_is(llm_of: LlmOf) -> None:
    llm = llm_of("granite-hybrid-moe")
    prompt, blocks = [[1, 2, 3]], llm.model.blocks
    before = [output.outputs[0].token_ids for output in llm.generate(prompt)]
    trace.trace(llm, StepShape(4, 8))
    assert llm.model.blocks is blocks
    assert [output.outputs[0].token_ids for output in llm.generate(prompt)] == before


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    config = parse_config(checkpoints.CONFIGS["llama"])

    def refusal(shape: StepShape, memory: int = 1 << 30, config: Any = config) -> str:
        with pytest.raises(UserError) as error:
            shape.check(config, "w8a16", "bfloat16", memory, synthetic=True)
        return str(error.value)

    StepShape(1, 127).check(config, "w8a16", "bfloat16", 1 << 30, synthetic=True)
    assert refusal(StepShape(1, 128)) == (
        "decode at depth 128, batch 1 comes to 129 tokens, and the context holds 128: lower --depth."
    )
    assert refusal(StepShape(120, 9)).startswith("prefill of 120 tokens at depth 9 comes to 129 tokens")
    assert "it can have 8192: lower --batch or --prefill." in refusal(StepShape(128, 0, 100))
    long = replace(config, max_position_embeddings=1024)
    assert "and 1.0 kB of memory are free: take --dtype int4" in refusal(StepShape(), 1000, long)
    assert "lower --batch or --depth." in refusal(StepShape(1, 100, 1000), 1 << 20)


# --- what is printed --------------------------------------------------------------------------------------------------


def test_the_tables(shell: Shell, folder_of: FolderOf) -> None:
    result = shell("trace", folder_of("granite-hybrid"), "--depth", "20")
    assert result.code == 0, result.err
    title, measured, step, _, heading, *lines = result.out.splitlines()
    assert "granite-hybrid in int8 (w8a16): 8 bits a weight, " in title and measured.startswith(
        "measured here: reads 10.0 GB/s"
    )
    assert step == "decode at depth 20, batch 1, keys and values in bfloat16; median of 3 runs"
    assert heading.split() == ["file", "kernel", "shape", "×", "µs", "step", "MB", "GB/s", "limit"]
    assert sum(" selective_scan " in line for line in lines) == 1
    assert any(re.match(r"mamba2 +selective_scan +1×240 +2 ", line) for line in lines)
    assert any(re.match(r"attention +attend +5/5, 21 keys +1 ", line) for line in lines)
    totals = lines[next(i for i, line in enumerate(lines) if line.startswith("all of")) + 1 :]
    assert {"matmul", "mamba2", "attention", "the"} <= {line.split()[0] for line in totals if line.strip()}
    assert re.search(r"^the step +\d+ +[\d.]+ +100\.0% ", result.out, re.MULTILINE)
    assert "What the engine adds" in result.out


def test_all_instructions_and_many_tokens(shell: Shell, folder_of: FolderOf) -> None:
    result = shell("trace", folder_of("gpt2"), "--prefill", "16", "--all", "--dtype", "float32", "--threads", "1")
    assert result.code == 0, result.err
    assert "prefill of 16 tokens, keys and values in float32" in result.out
    heading = next(line for line in result.out.splitlines() if line.startswith("file"))
    assert re.fullmatch("file +kernel +shape +layer +µs +step +MB +GB/s +limit +GOPS +peak", heading.strip())
    assert [line.split()[5] for line in result.out.splitlines() if " attend " in line] == ["0", "1", "2"]


def test_json(shell: Shell, folder_of: FolderOf) -> None:
    arguments = ("--depth", "20", "--batch", "3", "--kv-cache-dtype", "int8", "--json")
    report = json.loads(shell("trace", folder_of("llama"), *arguments).out)
    assert (report["dtype"], report["kv_cache_dtype"], report["batch"], report["depth"]) == ("w8a16", "int8", 3, 20)
    first = report["instructions"][0]
    assert (first["kernel"], first["kind"], first["layer"]) == ("_take_rows_integer", "quant", None)
    assert first["operands"]["rows"] == {"dtype": "float32", "shape": [3, 120]}
    attend = next(one for one in report["instructions"] if one["kernel"] == "_attend")
    assert attend["operands"]["pages.keys"]["dtype"] == "int8"
    total = report["total"]
    assert total["seconds"] == pytest.approx(sum(one["seconds"] for one in report["instructions"]))
    assert total["bytes_per_second"] == pytest.approx(total["bytes"] / total["seconds"])
    assert total["share_of_bandwidth"] == pytest.approx(total["bytes_per_second"] / report["bandwidth"])


def test_it_fits_a_terminal_of_80_columns(folder_of: FolderOf) -> None:
    with Terminal("trace", folder_of("llama"), "--depth", "20", columns=80) as terminal:
        terminal.wait_for("measuring decode at depth 20, batch 1")
        assert terminal.end() == 0
        lines = terminal.shown.split("runs")[-1].splitlines()
        rows = [line for line in lines if re.match(r"(matmul|attention|kv_cache|quant|sampling) ", line)]
        assert len(rows) == 10 + 5  # no shape needs a second line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--depth 128", "comes to 129 tokens, and the context holds 128: lower --depth"),
        ("--prefill 1000", "prefill of 1000 tokens comes to 1000 tokens, and the context holds 128"),
        ("--depth -1", "Invalid value for '--depth'"),
        ("--prefill 0", "Invalid value for '--prefill'"),
        ("--batch 0", "Invalid value for '--batch'"),
        ("--dtype int9", "dtype 'int9'"),
        ("--kv-cache-dtype int9", "kv_cache_dtype 'int9'"),
        ("--threads 0", "--threads is 0"),
    ],
)
def test_what_cannot_be_traced_is_refused_before_anything_is(
    shell: Shell, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch, options: str, says: str
) -> None:
    monkeypatch.setattr(trace, "trace", lambda llm, shape: pytest.fail("it measured"))
    defaults = () if "--depth" in options or "--prefill" in options else ("--depth", "20")
    result = shell("trace", folder_of("gpt2"), *options.split(), *defaults)
    assert result.code == 2
    assert says in result.sentence
