"""The engine's rules with a runner that computes nothing: who runs, in what portions, and where the blocks go."""

from typing import Any

import pytest
from fakes import FakeRunner

from tinyserve.blocks import BlockManager
from tinyserve.engine import Engine
from tinyserve.errors import RequestError
from tinyserve.sampling_params import SamplingParams
from tinyserve.sequence import Sequence

END = 99


def build(
    runner: FakeRunner | None = None, num_blocks: int = 64, max_model_len: int = 256, seqs: int = 4, budget: int = 32
) -> Engine:
    blocks = BlockManager(num_blocks, 16)
    return Engine(runner or FakeRunner(), blocks, frozenset({END}), max_model_len, seqs, budget)


def params(max_tokens: int = 3, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **options)


def run(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.has_work():
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def batches(engine: Engine) -> list[list[tuple[int, int]]]:
    return engine.runner.batches


def test_one_request() -> None:
    """A prompt, then a token a step; the last token is never computed, since nothing follows it."""
    engine = build()
    sequence = engine.add([5] * 10, params(3))
    assert engine.has_work() and sequence.finish_reason is None
    assert engine.step() == [sequence]
    run(engine)
    assert batches(engine) == [[(0, 10)], [(0, 1)], [(0, 1)]]
    assert sequence.output_token_ids == [1, 1, 1] and sequence.prompt_token_ids == [5] * 10
    assert sequence.finish_reason == "length"
    assert engine.blocks.num_free == 64 and not engine.has_work()


def test_a_long_prompt_is_computed_in_chunks() -> None:
    engine = build(budget=8)
    sequence = engine.add([5] * 20, params(2))
    assert engine.step() == [] and engine.step() == [] and engine.step() == [sequence]
    run(engine)
    assert batches(engine) == [[(0, 8)], [(0, 8)], [(0, 4)], [(0, 1)]]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    """The one that decodes comes first; the newcomer's prompt gets what is left of the budget."""
    engine = build(budget=8)
    engine.add([5] * 4, params(9))
    engine.step()
    engine.add([6] * 20, params(1))
    for _ in range(3):
        engine.step()
    assert batches(engine) == [[(0, 4)], [(0, 1), (1, 7)], [(0, 1), (1, 7)], [(0, 1), (1, 6)]]


def test_first_come_first_served() -> None:
    engine = build(seqs=2, budget=100)
    for length in (30, 3, 20, 1):
        engine.add([5] * length, params(2))
    run(engine)
    assert batches(engine)[0] == [(0, 30), (1, 3)]
    first_step = [next(i for i, batch in enumerate(batches(engine)) if r in dict(batch)) for r in range(4)]
    assert first_step == sorted(first_step)


def test_a_large_request_is_not_overtaken() -> None:
    """What waits first runs first, even if a later one would fit already: nobody starves."""
    engine = build(num_blocks=4, budget=64)
    engine.add([5] * 30, params(2))  # 2 blocks
    engine.add([5] * 50, params(2))  # 4 blocks
    engine.add([5], params(2))  # 1 block
    engine.step()
    assert batches(engine)[0] == [(0, 30)]
    run(engine)
    order = [request for batch in batches(engine) for request, _ in batch]
    assert sorted(set(order), key=order.index) == [0, 1, 2]


def test_the_token_budget_and_the_sequence_limit() -> None:
    engine = build(seqs=3, budget=10)
    for _ in range(7):
        engine.add([5] * 6, params(4))
    while engine.has_work():
        engine.step()
        assert len(engine.running) <= 3
        assert 1 <= sum(num for _, num in batches(engine)[-1]) <= 10
        assert len({request for request, _ in batches(engine)[-1]}) == len(batches(engine)[-1])


def test_more_decoding_than_the_budget_holds() -> None:
    """With more sequences than the budget has tokens, all of them come to an end."""
    engine = build(seqs=5, budget=2)
    sequences = [engine.add([5], params(4)) for _ in range(5)]
    run(engine)
    assert [sequence.num_output for sequence in sequences] == [4] * 5
    assert all(len(batch) <= 2 for batch in batches(engine))


def test_what_ends_a_sequence() -> None:
    def answer(token: int, **options: Any) -> Sequence:
        engine = build(FakeRunner(lambda sequence: token if sequence.num_output == 1 else 1))
        sequence = engine.add([5], params(4, **options))
        run(engine)
        return sequence

    assert (answer(7).finish_reason, answer(7).num_output) == ("length", 4)
    assert (answer(END).finish_reason, answer(END).output_token_ids) == ("stop", [1, END])
    assert (answer(END, ignore_eos=True).finish_reason, answer(END, ignore_eos=True).num_output) == ("length", 4)
    assert (answer(7, stop_token_ids=[7]).finish_reason, answer(7, stop_token_ids=[7]).num_output) == ("stop", 2)


def test_the_context_ends_a_sequence() -> None:
    engine = build(max_model_len=20, num_blocks=2)
    sequence = engine.add([5] * 15, params(500))
    run(engine)
    assert len(sequence.token_ids) == 20 and sequence.finish_reason == "length"


def test_what_can_never_be_served() -> None:
    engine = build(max_model_len=100, num_blocks=4)
    with pytest.raises(RequestError, match="empty"):
        engine.add([], params())
    for length in (100, 101):
        with pytest.raises(RequestError, match=rf"{length} tokens.*100"):
            engine.add([5] * length, params())
    with pytest.raises(RequestError, match=r"80 tokens.*64"):
        engine.add([5] * 60, params(20))
    assert not engine.has_work() and engine.blocks.num_free == 4
    engine.add([5] * 60, params(4))
    run(engine)
    assert engine.blocks.num_free == 4


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_finishing_twice_is_harmless(steps: int) -> None:
    """While it waits, in the middle of its prompt, and while it decodes."""
    engine = build(budget=8)
    sequence = engine.add([5] * 12, params(9))
    other = engine.add([5] * 12, params(2))
    for _ in range(steps):
        engine.step()
    engine.finish(sequence, "abort")
    engine.finish(sequence, "stop")
    assert sequence.finish_reason == "abort" and sequence.block_table == []
    run(engine)
    engine.finish(sequence, "abort")
    engine.finish(other, "abort")
    assert other.finish_reason == "length" and other.num_output == 2
    assert engine.blocks.num_free == 64


def test_a_runner_that_fails_loses_nothing() -> None:
    """An exception leaves every sequence where it was, and it can still be ended."""

    def fail(sequence: Sequence) -> int:
        raise RuntimeError("no")

    engine = build(FakeRunner(fail))
    sequence = engine.add([5], params())
    with pytest.raises(RuntimeError):
        engine.step()
    engine.finish(sequence, "abort")
    assert engine.blocks.num_free == 64 and not engine.has_work()
