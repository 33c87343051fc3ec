"""`bench`: its arithmetic against numbers worked out by hand, its works over a tiny model, and what it prints.

No speed is asserted: these tests pass on the slowest machine.
"""

import csv
import io
import json
import re
import signal
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from command_line import Children, Shell, Terminal

from tinyserve import LLM
from tinyserve.cli.bench import _columns, short
from tinyserve.errors import UserError
from tinyserve.evaluation import bench, bench_budget
from tinyserve.evaluation.bench import Cost, Limits, Measurement, Work
from tinyserve.models.config import parse_config
from tinyserve.tensor import _jit, dot_product, limits, matmul, norm, quant

FolderOf = Callable[[str], Path]
LLAMA = parse_config(checkpoints.CONFIGS["llama"])
MISTRAL = parse_config(checkpoints.CONFIGS["mistral"])
HYBRID = parse_config(checkpoints.CONFIGS["granite-hybrid"])
SHORT = ("--prefill", "16", "--depth", "0", "--depth", "20", "--batch", "1", "--batch", "3", "--decode", "4", "-r", "2")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.setattr(limits, "READ", 1 << 20)
    return Shell(monkeypatch, capsys)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_works_are_every_length_and_every_depth_with_every_batch() -> None:
    assert bench.works([16, 40], [0, 20], [1, 3], 8) == [
        Work("prefill", 16), Work("prefill", 40),
        Work("decode", 8, 0, 1), Work("decode", 8, 0, 3), Work("decode", 8, 20, 1), Work("decode", 8, 20, 3),
    ]  # fmt: skip


def test_the_tokens_a_sequence_comes_to() -> None:
    assert Work("prefill", 100).most_tokens(5) == 101
    # A prompt of one token, a step while others are read, one stretch, and the token that the prompt gave.
    assert Work("decode", 32, 0, 1).most_tokens(5) == 1 + 1 + 32 + 1
    # All six stretches follow one prompt. 32 prompts of 512 are read in steps of at least 512 - 32 tokens.
    assert Work("decode", 32, 512, 32).most_tokens(5) == 512 + (512 * 32 // 480 + 1) + 6 * 32 + 1


def test_the_cost_of_a_decode_step() -> None:
    # Three layers of 4·120² + 3·120·157 weights, and a head of 261·120; 4 operations a number of 5 heads of 24.
    assert bench.decode_cost(LLAMA, 1000, 7, batch=2, context=10) == Cost(
        1000 + 2 * 10 * 7, 2 * (2 * (342_360 + 31_320) + 10 * 3 * 4 * 120)
    )
    # Mistral's window is 5 tokens.
    assert bench.decode_cost(MISTRAL, 1000, 7, 1, 9) == bench.decode_cost(MISTRAL, 1000, 7, 1, 5)


def test_the_cost_of_a_prefill() -> None:
    # Steps of 2, 2 and 1 tokens; the head is for the last one only; 1 + 2 + 3 + 4 + 5 pairs of tokens.
    assert bench.prefill_cost(LLAMA, 1000, 7, tokens=5, step=2) == Cost(
        3 * 1000 + (2 + 4 + 5) * 7, 5 * 2 * 342_360 + 2 * 31_320 + 15 * 1440
    )
    five, six = (bench.prefill_cost(MISTRAL, 0, 0, tokens).operations for tokens in (5, 6))
    seven = bench.prefill_cost(MISTRAL, 0, 0, 7).operations
    assert seven - six == six - five  # from its fifth token on, each sees five


def test_states_are_read_written_and_planned_for() -> None:
    state = 2 * 4 * (2 * 304 + 10 * 16 * 24)  # two layers, float32: windows of 2 × 304, ten heads of 16 × 24
    still, more = (bench.decode_cost(HYBRID, 1000, 7, batch, context=10).bytes for batch in (1, 3))
    assert (still, more - still) == (1000 + 10 * 7 + 2 * state, 2 * (10 * 7 + 2 * state))
    assert bench.prefill_cost(HYBRID, 1000, 7, tokens=5, step=2).bytes == 3 * (1000 + 2 * state) + (2 + 4 + 5) * 7
    works = bench.works([16], [20], [1, 3], 8)
    plan = bench.plan(HYBRID, "w8a16", works, repetitions=2, memory=1 << 30)
    pages = 3 * 3 * 5 * (24 + 32) * 2 * 16  # sequences, blocks, heads, keys and padded values, bfloat16, tokens
    assert plan.options["kv_cache_memory"] == pages + 4 * state
    tight = bench.plan(HYBRID, "w8a16", works, 2, bench.weight_bytes(HYBRID, "w8a16") + 2 * 3 * state)
    assert [skip.work.batch for skip in tight.skipped] == [3]
    assert "keys, values and states" in tight.skipped[0].reason


def test_the_bytes_of_a_step_are_all_but_the_table() -> None:
    total, table = 4 * (342_360 + 2 * 31_320 + 7 * 120), 4 * 31_320
    assert bench.bytes_per_step(LLAMA, "float32", total) == pytest.approx(total - table + 4 * 120)
    tied = parse_config(checkpoints.CONFIGS["llama-grouped"])
    assert bench.bytes_per_step(tied, "float32", 1234) == 1234


def test_rates_shares_and_the_roofline() -> None:
    measured = Measurement(Work("decode", 4, 0, 2), [1.0, 2.0], Cost(80, 400), [])
    assert measured.rates == [8.0, 4.0]
    assert (measured.mean, measured.deviation) == (6.0, pytest.approx(8**0.5))
    assert (measured.bytes_per_second, measured.operations_per_second) == (60.0, 300.0)
    assert measured.attainable(Limits(100, 1000)) == pytest.approx(10)  # memory is the nearer limit
    assert measured.attainable(Limits(1000, 100)) == pytest.approx(2)
    row = measured.row(Limits(100, 1000))
    assert (row["share_of_bandwidth"], row["share_of_peak"], row["mean_per_sequence"]) == (0.6, 0.3, 3.0)
    assert row["time_to_first_token_seconds"] is None
    first = Measurement(Work("prefill", 4), [1.0], Cost(1, 1), [0.3, 0.1, 0.2])
    assert (first.time_to_first_token, first.deviation) == (0.2, 0.0)


def test_a_plan_has_room_for_what_fits_and_says_what_does_not() -> None:
    wanted = bench.works([16, 128], [0, 20], [1, 3], 8)
    plan = bench.plan(LLAMA, "w8a16", wanted, repetitions=2, memory=1 << 30)
    assert plan.works == [work for work in wanted if work != Work("prefill", 128)]
    (skipped,) = plan.skipped
    assert skipped.reason == "prefill of 128 tokens comes to 129 tokens, and the context holds 128"
    longest = 20 + 1 + 3 * 8 + 1
    assert plan.options["max_num_seqs"] == 3 and plan.options["max_model_len"] == longest
    block = 3 * 5 * (24 + 32) * 2 * 16  # layers, heads, keys and padded values, bfloat16, tokens
    assert plan.options["kv_cache_memory"] == 3 * 3 * block
    # The weights leave twice what one sequence takes: three do not fit in half of it.
    weights = bench.weight_bytes(LLAMA, "w8a16")
    tight = bench.plan(LLAMA, "w8a16", wanted, 2, weights + 2 * 3 * block)
    assert Work("decode", 8, 20, 1) in tight.works
    assert [skip.work for skip in tight.skipped if not skip.by_context] == [Work("decode", 8, 20, 3)]
    assert "of keys and values, and there is room for" in tight.skipped[-1].reason
    assert bench.plan(LLAMA, "w8a16", wanted, 2, 0).works == []


def test_synthetic_weights_that_do_not_fit_are_refused_before_they_fill_the_memory() -> None:
    wanted = bench.works([16], [], [], 8)
    with pytest.raises(UserError, match=r"MB in float32.*--dtype int8 or int4"):
        bench.plan(LLAMA, "float32", wanted, 2, memory=1000, synthetic=True)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_reading_adds_up_all_that_was_read() -> None:
    array = (np.arange(64 * 128) % 1000).astype(np.float32)
    sums = np.empty(64, np.float32)
    limits.read_all(array, sums)
    np.testing.assert_array_equal(sums, array.reshape(64, 128).sum(axis=1))


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_the_integer_peak_is_of_right_products(weight_bits: int, activation_bits: int) -> None:
    random = np.random.default_rng(0)
    outputs, K, rounds = limits.PANELS * quant.PANEL, limits.INPUTS, 3
    group, most = (64, 127) if weight_bits == 8 else (32, 8)
    whole = random.integers(-most + 1, most, (outputs, K))
    whole[:, ::group] = -most  # so that every scale is one
    pack = quant.pack_bytes if weight_bits == 8 else quant.pack_nibbles
    packed = pack(whole.astype(np.float32), group)
    w = packed.integers[: (limits.PANELS + 1) // 2].ravel()
    x = random.integers(-127, 128, (limits.ROWS, K))
    x[:, ::group] = 127
    numbers = quant.RoundingNumbers(np.float32(127), quant.ZERO_8)
    rounding = quant.Rounding(quant.activation_dtype(activation_bits, weight_bits), numbers)
    q = matmul.quantized_rows(x.astype(np.float32), norm.NO_NORM, rounding, packed).q
    zero = 0 if dot_product.SIGNED and weight_bits == 8 else {8: quant.ZERO_8, 4: quant.ZERO_4}[weight_bits]
    expected = np.broadcast_to(rounds * (x @ (whole + zero).T), (2, limits.ROWS, outputs))
    out = np.empty(expected.shape, np.float32)
    limits.dot_in_registers(w, q, rounds, out)
    np.testing.assert_array_equal(out, expected.astype(np.float32))


def test_the_float_peak_is_of_right_products() -> None:
    random = np.random.default_rng(0)
    rows, panels, K = limits.FLOAT_ROWS, limits.FLOAT_PANELS, limits.INPUTS
    w = random.integers(-9, 10, (panels, K, quant.PANEL)).astype(np.float32)
    x = random.integers(-9, 10, (rows, K)).astype(np.float32)
    expected = np.einsum("rk,pkl->rpl", x, w).reshape(1, rows, -1) * 3
    out = np.empty(expected.shape, np.float32)
    limits.fma_in_registers(w.ravel(), x, 3, out)
    np.testing.assert_array_equal(out, expected)


def test_limits_are_plausible() -> None:
    _jit.set_threads(1)
    assert 1e8 < limits.memory_bandwidth(1 << 22) < 1e14
    assert 1e7 < limits.float_peak() < 1e15
    for bits in ((8, 16), (8, 8), (4, 16), (4, 8)):
        assert 1e7 < limits.integer_peak(*bits) < 1e16
    assert 0 < limits.best_rate(lambda rounds: time.sleep(rounds / 1e4)) <= 1e4


# --- works over a model -----------------------------------------------------------------------------------------------


def _llm(folder: Path, plan: bench.Plan, dtype: str = "float32") -> LLM:
    return LLM(folder, dtype=dtype, num_threads=1, **plan.options)  # type: ignore[arg-type]


def test_a_run_measures_every_work(folder_of: FolderOf) -> None:
    wanted = bench.works([16, 40], [0, 20], [1, 3], 4)
    plan = bench.plan(LLAMA, "float32", wanted, 2, 1 << 30)
    llm, said = _llm(folder_of("llama"), plan), []
    weights = bench.bytes_per_step(LLAMA, "float32", llm.model.nbytes)
    kv = 3 * 5 * (24 + 32) * 4
    results = list(bench.run(llm, plan.works, 2, lambda *told: said.append(told[0])))
    assert [result.work for result in results] == wanted
    for result in results:
        assert len(result.seconds) == 2 and min(result.seconds) > 0
        if result.work.kind == "prefill":
            assert len(result.first_token) == 2
            assert all(first >= took for first, took in zip(result.first_token, result.seconds, strict=True))
            assert result.cost == bench.prefill_cost(LLAMA, weights, kv, result.work.tokens)
        else:
            # Of four steps; a sequence sees its prompt, what it has decoded, and itself.
            context = 1 + 2.5 if result.work.depth == 0 else 20 + 2.5 + statistics.fmean([4, 8])
            step = bench.decode_cost(LLAMA, weights, kv, result.work.batch, context)
            assert result.cost.bytes == pytest.approx(4 * step.bytes)
            assert result.cost.operations == pytest.approx(4 * step.operations)
    assert said[:3] == [f"prefill of 16 tokens, {what}" for what in ("warming up", *_counted(2))]
    assert said[-1] == "decode at depth 20, batch 3, all 2 repetitions"


def _counted(repetitions: int) -> list[str]:
    return [f"repetition {i + 1} of {repetitions}" for i in range(repetitions)]


def test_only_steps_in_which_all_sequences_decode_are_counted(
    folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prompts of 20 tokens in steps of 16: the first sequences decode while the last prompts are read.
    monkeypatch.setattr(bench, "STEP", 16)
    work = Work("decode", 4, 20, 3)
    plan = bench.plan(LLAMA, "float32", [work], 2, 1 << 30)
    llm, steps = _llm(folder_of("llama"), plan), []
    execute = llm.engine.runner.execute

    def spy(scheduled: Any) -> Any:
        steps.append([(one.sequence.cache.num_computed + one.num_tokens, one.num_tokens) for one in scheduled])
        return execute(scheduled)

    monkeypatch.setattr(llm.engine.runner, "execute", spy)
    (result,) = bench.run(llm, [work], 2)
    # The prompts are read once; of three stretches of four steps the first is not counted.
    counted = [step for step in steps if [num_tokens for _, num_tokens in step] == [1, 1, 1]][4:12]
    context = statistics.fmean(seen for step in counted for seen, _ in step)
    assert context > 20 + 2.5 + 6  # by what the first ones were ahead
    kv, weights = 3 * 5 * (24 + 32) * 4, bench.bytes_per_step(LLAMA, "float32", llm.model.nbytes)
    assert result.cost.bytes == pytest.approx(4 * bench.decode_cost(LLAMA, weights, kv, 3, context).bytes)
    assert not llm.engine.has_work()  # what was begun is given back


# --- what is printed --------------------------------------------------------------------------------------------------


def without_legend(out: str) -> list[str]:
    """The lines that are printed, but for those that explain the columns."""
    return [line for line in out.splitlines() if not line.startswith(("tokens/s: ", "first: ", "GB/s: ", "GOPS: "))]


def test_the_table(shell: Shell, folder_of: FolderOf) -> None:
    result = shell("bench", folder_of("llama"), *SHORT)
    assert result.code == 0, result.err
    title, measured, heading, *lines = result.out.splitlines()
    assert re.fullmatch(
        rf".*llama in int8 \(w8a16\): 8 bits a weight, 493.3 kB; \d+ threads? of \S+, dot product {dot_product.PATH}",
        title,
    )
    assert re.fullmatch(r"measured here: reads [\d.]+ GB/s, multiplies and adds [\d.e-]+ TOPS in w8a16", measured)
    assert re.fullmatch(r"work +tokens +depth +batch +runs +tokens/s +each +first +GB/s +% +GOPS +%", heading)
    legend = lines[5:]
    rows = [line.split() for line in lines[:5]]
    assert [row[: row.index("±") - 1] for row in rows] == [
        ["prefill", "16", "2"], ["decode", "4", "0", "1", "2"], ["decode", "4", "0", "3", "2"],
        ["decode", "4", "20", "1", "2"], ["decode", "4", "20", "3", "2"],
    ]  # fmt: skip
    assert all(len(line) <= 80 for line in (heading, *lines))
    assert re.search(r"\d ms|\d s", lines[0])  # the time to the first token
    # Every column that is not the name of a number that was given is explained.
    explained = {word for line in legend for word in re.findall(r"(?:^|; )([^:;]+):", line)}
    assert explained == {"tokens/s", "each", "first", "GB/s", "%", "GOPS"}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.004, 0.0), "0.00 ± 0.00"), ((1.234, 0.5), "1.23 ± 0.50"), ((12.34, 0.51), "12.3 ± 0.5"),
        ((99_999.0, 99_999.0), "99999 ± 99999"), ((123_456.0, 54_321.0), "123k ± 54k"),
        ((1.234e8, 1.234e8), "123400k ± 123400k"),
    ],
)  # fmt: skip
def test_cells_stay_apart_however_large_they_are(numbers: tuple[float, float], words: str) -> None:
    mean, deviation = numbers
    cell = f"{short(mean)} ± {short(deviation, mean)}"
    assert cell == words
    line = _columns("prefill", "16", "", "", "2", cell, *[short(mean)] * 6)
    assert line.split() == ["prefill", "16", "2", *words.split(), *[short(mean)] * 6]


def test_json(shell: Shell, folder_of: FolderOf) -> None:
    result = shell("bench", folder_of("gpt2"), *SHORT, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert (report["dtype"], report["weights"], report["dot_product"]) == ("w8a16", "auto", dot_product.PATH)
    assert report["weight_bytes"] > 0 and report["threads"] >= 1 and report["processor"]
    assert report["bandwidth"] > 0 and report["peak"] > 0 and report["repetitions"] == 2
    assert [(row["work"], row["tokens"], row["depth"], row["batch"]) for row in report["results"]] == [
        ("prefill", 16, 0, 1), ("decode", 4, 0, 1), ("decode", 4, 0, 3), ("decode", 4, 20, 1), ("decode", 4, 20, 3),
    ]  # fmt: skip
    for row in report["results"]:
        assert len(row["rates"]) == row["repetitions"] == 2
        assert min(row["rates"]) <= row["median"] <= max(row["rates"])
        assert row["mean"] > 0 <= row["deviation"]
        assert row["mean_per_sequence"] == row["mean"] / row["batch"]
        assert row["share_of_bandwidth"] == pytest.approx(row["bytes_per_second"] / report["bandwidth"])
        assert row["share_of_peak"] == pytest.approx(row["operations_per_second"] / report["peak"])
        assert (row["time_to_first_token_seconds"] is None) == (row["work"] == "decode")
    assert report["skipped"] == report["left_out"] == []
    assert (report["budget_seconds"], report["interrupted"]) == (90, False)
    assert report["full_seconds"] > 0


def test_csv(shell: Shell, folder_of: FolderOf, tmp_path: Path) -> None:
    printed = shell("bench", folder_of("gpt2"), *SHORT, "--dtype", "float32", "--csv", "-")
    assert (printed.code, "±" in printed.out) == (0, False)
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert [(row["work"], row["depth"], row["batch"]) for row in rows] == [
        ("prefill", "0", "1"), ("decode", "0", "1"), ("decode", "0", "3"), ("decode", "20", "1"), ("decode", "20", "3"),
    ]  # fmt: skip
    assert {(row["dtype"], row["dot_product"]) for row in rows} == {("float32", "float32 fma")}
    assert all(float(row["mean"]) > 0 for row in rows)
    file = tmp_path / "bench.csv"
    both = shell("bench", folder_of("gpt2"), *SHORT, "--csv", file)
    assert "±" in both.out
    assert [list(row) for row in csv.DictReader(io.StringIO(file.read_text()))] == [list(row) for row in rows]


def test_plot(shell: Shell, folder_of: FolderOf, tmp_path: Path) -> None:
    for name, panels, options in (("both", 2, ()), ("one", 1, ("--depth", "100", "--decode", "2", "-r", "1"))):
        file = tmp_path / f"{name}.png"
        works = SHORT if panels == 2 else ("--prefill", "16", "--prefill", "40", *options)
        result = shell("bench", folder_of("gpt2"), *works, "--plot", file)
        assert result.code == 0, result.err
        data = file.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert (width, height) == (1740, 690)


def test_what_does_not_fit_is_skipped_and_said(shell: Shell, folder_of: FolderOf) -> None:
    quick = shell("bench", folder_of("gpt2"), "--quick", "-r", "1", "--decode", "4")
    assert quick.code == 0, quick.err
    *_, row, skipped = without_legend(quick.out)
    assert row.split()[:4] == ["decode", "4", "0", "1"]
    assert skipped == "skipped: prefill of 512 tokens comes to 513 tokens, and the context holds 128"
    everything = shell("bench", folder_of("gpt2"), "-r", "1", "--decode", "2", "--csv", "-")
    assert everything.err.count("skipped: ") == 3 + 6  # three lengths, two depths with three batches
    report = json.loads(shell("bench", folder_of("gpt2"), "--quick", "-r", "1", "--json").out)
    assert [skip["work"] for skip in report["skipped"]] == ["prefill"]


def _nothing_more_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the time run out with what is measured in any case."""
    predict = bench_budget.Speeds.seconds
    monkeypatch.setattr(bench_budget.Speeds, "seconds", lambda speeds, job: 1000 + predict(speeds, job))


def test_what_there_is_no_time_for_is_left_out_and_said(
    shell: Shell, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = ("--batch", "1", "--batch", "3")
    _nothing_more_fits(monkeypatch)
    monkeypatch.setattr(bench, "PREFILL", (16, 40, 100))
    monkeypatch.setattr(bench, "DEPTHS", (0, 20))
    monkeypatch.setattr(bench, "DECODE", 4)
    result = shell("bench", folder_of("gpt2"), *works)
    assert result.code == 0, result.err
    *rows, last = result.out.splitlines()[3:]
    # The prompt nearest to 512 tokens would be 100; nothing seems to fit, so it is as short as can be.
    assert [row.split()[:2] for row in rows if row.startswith("prefill")] == [["prefill", "16"]]
    assert [row.split()[2:4] for row in rows if row.startswith("decode")] == [["0", "1"], ["0", "3"]]
    assert re.fullmatch(
        r"left out: prefill of 40 and 100 tokens; decode at depth 20, batch 1 and 3: --full measures everything, in "
        r"about \d+ (hours?|minutes|seconds)", last
    )  # fmt: skip
    printed = shell("bench", folder_of("gpt2"), *works, "--csv", "-")
    assert len(printed.out.splitlines()) == 1 + 3 and "left out: " in printed.err
    report = json.loads(shell("bench", folder_of("gpt2"), *works, "--budget", "7", "--json").out)
    assert [(work["work"], work["tokens"], work["depth"], work["batch"]) for work in report["left_out"]] == [
        ("prefill", 40, 0, 1), ("prefill", 100, 0, 1), ("decode", 4, 20, 1), ("decode", 4, 20, 3),
    ]  # fmt: skip
    assert report["budget_seconds"] == 7
    full = json.loads(shell("bench", folder_of("gpt2"), *works, "-r", "1", "--full", "--json").out)
    assert len(full["results"]) == 3 + 4 and full["left_out"] == []
    assert full["budget_seconds"] is full["full_seconds"] is None


def test_ctrl_c_leaves_what_was_measured(
    shell: Shell, folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = bench.measure, []

    def interrupted(*given: Any) -> Measurement:
        calls.append(given)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(bench, "measure", interrupted)
    monkeypatch.setattr(bench_budget, "measure", interrupted)
    file = tmp_path / "bench.csv"
    result = shell("bench", folder_of("gpt2"), *SHORT, "--csv", file)
    assert (result.code, result.err) == (130, "")
    *_, prefill, decode, last = without_legend(result.out)
    assert (prefill.split()[0], decode.split()[:4]) == ("prefill", ["decode", "4", "0", "1"])
    assert last.startswith("left out: decode at depth 0, batch 3; decode at depth 20, batch 1 and 3: --full")
    assert len(file.read_text().splitlines()) == 1 + 2
    as_json = shell("bench", folder_of("gpt2"), *SHORT, "--full", "--json")
    report = json.loads(as_json.out)
    assert (as_json.code, report["interrupted"], len(report["results"])) == (130, True, 2)
    assert [work["batch"] for work in report["left_out"]] == [3, 1, 3]
    in_full = shell("bench", folder_of("gpt2"), *SHORT, "--full")
    assert (in_full.code, in_full.out.splitlines()[-1]) == (
        130, "left out: decode at depth 0, batch 3; decode at depth 20, batch 1 and 3"
    )  # fmt: skip
    calls += [()] * 2  # now the first one is interrupted
    nothing = shell("bench", folder_of("gpt2"), *SHORT, "--json")
    assert (nothing.code, nothing.out, nothing.err) == (130, "", "")


def test_a_pipe_has_each_row_as_soon_as_it_is_measured(start: Children, folder_of: FolderOf) -> None:
    works = ("--prefill", "16", "--depth", "0", "--batch", "1", "--decode", "100", "-r", "300")
    run = start("bench", folder_of("gpt2"), *works)
    assert run.stdout is not None
    assert [run.stdout.readline().split()[0] for _ in range(4)][1:] == [b"measured", b"work", b"prefill"]
    run.send_signal(signal.SIGINT)  # 300 times 100 steps take a while
    rest = run.communicate(timeout=60)[0].decode()
    assert without_legend(rest)[0].startswith("left out: decode at depth 0, batch 1: --full measures")
    assert run.returncode == 130


def test_synthetic_weights_need_a_config_only(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.CONFIGS["llama"]))
    result = shell("bench", tmp_path, "--load-format", "dummy", *SHORT)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{tmp_path} in int8 (w8a16): 8 bits a weight, 493.3 kB of synthetic weights; ")


def test_on_a_terminal_it_says_what_is_measured(folder_of: FolderOf) -> None:
    with Terminal("bench", folder_of("gpt2"), *SHORT, columns=100) as terminal:
        terminal.wait_for("measuring what this machine can do")
        terminal.wait_for("a first look at the model's speed |        | 0 of 90 s")
        terminal.wait_for("decode at depth 20, batch 3, all 2 repetitions |")
        assert terminal.end() == 0
        assert "repetition" not in terminal.shown.split("work")[-1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--prefill 1000", "prefill of 1000 tokens comes to 1001 tokens, and the context holds 128: give a smaller"),
        ("--depth 120", "decode at depth 120, batch 1 comes to"),
        ("--depth -1", "Invalid value for '--depth'"),
        ("--prefill 0", "Invalid value for '--prefill'"),
        ("--batch 0", "Invalid value for '--batch'"),
        ("--repetitions 0", "Invalid value for '--repetitions'"),
        ("--dtype int9", "dtype 'int9'"),
        ("--load-format dumy", "load_format 'dumy'"),
        ("--threads 0", "--threads is 0"),
        ("--json --csv -", "both print to standard output"),
        ("--csv /no/such/folder/x.csv", "--csv is /no/such/folder/x.csv, whose folder does not exist"),
        ("--csv /", "which is a folder"),
        ("--plot /no/such/folder/x.png", "--plot is /no/such/folder/x.png, whose folder does not exist"),
        ("--plot x.svg", "ends with .png"),
        ("--full --budget 5", "give one of them"),
        ("--budget 0", "Invalid value for '--budget'"),
        ("--decode 500", "Nothing is left to measure"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    shell: Shell, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch, options: str, says: str
) -> None:
    monkeypatch.setattr(bench, "measure_limits", lambda llm: pytest.fail("it measured"))
    result = shell("bench", folder_of("gpt2"), *options.split())
    assert result.code == 2
    assert says in result.sentence


def test_a_plot_without_matplotlib_says_what_to_install(
    shell: Shell, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence = shell("bench", folder_of("gpt2"), "--plot", "x.png").sentence
    assert sentence == "--plot needs matplotlib: pip install 'tinyserve[plot]'."
