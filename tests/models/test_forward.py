"""A forward pass is captured once for each shape of batch, and replayed: with the bits of a new one."""

import gc
import weakref
from collections.abc import Callable
from random import Random
from typing import Any

import checkpoints
import pytest

from tinyserve import LLM
from tinyserve.models import forward
from tinyserve.models.base import DecoderModel
from tinyserve.models.batch import BatchShape
from tinyserve.models.forward import MOST_PROGRAMS, ForwardPass, Step
from tinyserve.models.kv_cache import KVCache
from tinyserve.scheduling.sequence import CacheState

Load = Callable[..., LLM]
BLOCK_SIZE, SLOTS, ROOM = 16, 4, 6  # a sequence has a state slot and, in this file, six blocks: 96 tokens
KINDS = [("llama-grouped", "float32"), ("granite-hybrid-moe", "w8a16"), ("falcon-alibi-grouped", "w4a16")]


def cache_for(model: DecoderModel, dtype: str = "bfloat16") -> KVCache:
    return KVCache(model.config, SLOTS * ROOM, BLOCK_SIZE, dtype, SLOTS)


def sequence(slot: int, num_computed: int = 0, blocks: int = ROOM) -> CacheState:
    """What a sequence in a slot holds of the cache; more blocks than it has are named twice."""
    table = [slot * ROOM + i % ROOM for i in range(blocks)]
    return CacheState(block_table=table, state_slot=slot, num_computed=num_computed)


def results(step: Step) -> tuple[bytes, bytes, bytes]:
    return step.hidden.tobytes(), step.logits.tobytes(), step.token_ids.tobytes()


@pytest.fixture
def captures(llm_of: Load, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arena of each capture; those that loading a model takes have been before."""
    for name, dtype in [("llama-grouped", "float32"), ("granite-hybrid-moe", "float32"), *KINDS]:
        llm_of(name, dtype)
    arenas: list[Any] = []
    capture = forward.capture

    def counting(arena: Any) -> Any:
        arenas.append(arena)
        return capture(arena)

    monkeypatch.setattr(forward, "capture", counting)
    return arenas


# --- which shapes are captured ----------------------------------------------------------------------------------------


def test_a_shape_is_captured_once(llm_of: Load, captures: list[Any]) -> None:
    model = llm_of("llama-grouped").model
    run = ForwardPass(model, cache_for(model))
    for i in range(10):
        run([([i], sequence(0, i))], [0])
    assert len(captures) == 1
    for i in range(3):  # other places, sequences and rows, and as many of them
        run([([5, 6, 7], sequence(i)), ([8], sequence(3, i))], [i, 3])
    assert len(captures) == 2
    run([([5, 6, 7], sequence(1)), ([8], sequence(3))], [3])
    run([([5, 6], sequence(1)), ([8, 9], sequence(3))], [3])
    assert len(captures) == 3  # the second of these has the shape of the first
    assert len({id(arena) for arena in captures}) == 1


def test_a_sequence_that_grows_seldom_needs_another_program(llm_of: Load, captures: list[Any]) -> None:
    model = llm_of("llama-grouped").model
    run = ForwardPass(model, cache_for(model))
    seen = []
    for blocks in range(1, 130):
        run([([1], sequence(0, blocks=blocks))], [0])
        seen.append(len(captures))
    assert [seen[blocks - 1] for blocks in (32, 33, 64, 65, 128, 129)] == [1, 2, 2, 3, 3, 4]


def test_the_shape_that_has_not_come_for_longest_is_forgotten(llm_of: Load, captures: list[Any]) -> None:
    model = llm_of("llama-grouped").model
    run = ForwardPass(model, cache_for(model))
    shapes = [BatchShape(tokens, 1, 32, 1) for tokens in range(1, MOST_PROGRAMS + 2)]
    steps = [run.step(shape) for shape in shapes[:-1]]
    assert run.step(shapes[0]) is steps[0]  # now the second is the oldest
    assert len(captures) == MOST_PROGRAMS
    run.step(shapes[-1])
    assert all(run.step(shape) is step for shape, step in zip(shapes, steps, strict=False) if shape != shapes[1])
    assert len(captures) == MOST_PROGRAMS + 1
    assert run.step(shapes[1]) is not steps[1]
    assert len(captures) == MOST_PROGRAMS + 2


# --- what replaying computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_replayed_batches_equal_new_ones(
    name: str, dtype: str, llm_of: Load, threads: int, captures: list[Any]
) -> None:
    """Chunks of prompts beside tokens that are decoded; sequences end, and others take over blocks and state."""
    model, random = llm_of(name, dtype).model, Random(threads)
    cache, own_cache = cache_for(model), cache_for(model)
    run, running = ForwardPass(model, cache), {slot: sequence(slot) for slot in range(SLOTS)}
    for _ in range(40):
        work: list[tuple[list[int], CacheState]] = []
        for slot in random.sample(range(SLOTS), random.randint(1, SLOTS)):
            state = running[slot]
            if state.num_computed > 80:  # it ends here
                state = running[slot] = sequence(slot)
            count = 1 if state.num_computed and random.random() < 0.7 else random.choice((1, 3, 8))
            work.append((random.choices(range(checkpoints.VOCAB), k=count), state))
        tokens = sum(len(token_ids) for token_ids, _ in work)
        rows = sorted(random.sample(range(tokens), random.choice((0, 1, tokens))))
        got = results(run(work, rows))
        assert got == results(ForwardPass(model, own_cache)(work, rows))
        for token_ids, state in work:
            state.num_computed += len(token_ids)
    assert len(captures) < 2 * 40  # half of them are the new ones, and some shapes came again
    for mine, other in zip(cache.layers, own_cache.layers, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_token_at_a_time_equals_a_prompt(name: str, dtype: str, llm_of: Load, threads: int) -> None:
    model, ids = llm_of(name, dtype).model, checkpoints.token_ids(70)
    run = ForwardPass(model, cache_for(model))
    whole = run([(ids, sequence(0))], range(70)).logits.copy()
    for i, token_id in enumerate(ids):
        step = run([([token_id], sequence(1, i))], [0])
        assert step.logits[0].tobytes() == whole[i].tobytes()
        assert step.token_ids[0] == whole[i].argmax()


WANTED = [
    *KINDS,
    ("gpt2", "w8a8"),
    ("falcon-11b", "float32"),
    ("mistral", "float32"),
    ("granite-hybrid", "float32"),
    ("llama-biases", "w4a8"),
    ("granite-moe", "w8a16"),
]


@pytest.mark.parametrize(("name", "dtype"), WANTED)
def test_tokens_that_nobody_listens_to_change_nothing_behind_them(
    name: str, dtype: str, llm_of: Load, threads: int
) -> None:
    """In the last block only wanted tokens go on: with the bits, and the cache, of all going on."""
    model, random = llm_of(name, dtype).model, Random(threads)
    cache, full_cache = cache_for(model), cache_for(model)
    run, full = ForwardPass(model, cache), ForwardPass(model, full_cache)
    for rows in ([], [69], [0], [3, 4, 5, 40, 69], [20, 68, 70, 71, 72, 73], sorted(random.sample(range(74), 30))):
        slots = random.sample(range(SLOTS), 2)
        work = [(random.choices(range(checkpoints.VOCAB), k=count), sequence(slots.pop())) for count in (70, 4)]
        step, all_hidden = run(work, rows), full(work, rows, all_hidden=True)
        assert step.hidden.shape == (len(rows), model.config.hidden_size)
        assert step.hidden.tobytes() == all_hidden.hidden[rows].tobytes()
        assert step.logits.tobytes() == all_hidden.logits.tobytes()
        assert step.token_ids.tobytes() == all_hidden.token_ids.tobytes()
    for mine, other in zip(cache.layers, full_cache.layers, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(mine, other, strict=True))


def test_without_rows_there_are_no_logits(llm_of: Load) -> None:
    model = llm_of("llama-grouped").model
    step = ForwardPass(model, cache_for(model))([([1, 2, 3], sequence(0))], [], all_hidden=True)
    assert step.hidden.shape == (3, model.config.hidden_size) and step.hidden.any()
    assert step.logits.shape == (0, checkpoints.VOCAB) and step.token_ids.shape == (0,)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_many_shapes_share_the_memory_of_the_largest(llm_of: Load, captures: list[Any]) -> None:
    model = llm_of("granite-hybrid-moe").model
    largest = BatchShape(2000, 4, 32, 500)
    alone = ForwardPass(model, cache_for(model))
    alone.step(largest)
    needed = captures[-1].nbytes
    run, random = ForwardPass(model, cache_for(model)), Random(0)
    shapes = [BatchShape(random.randint(1, 2000), 4, 32, random.randint(0, 500)) for _ in range(150)]
    for shape in [largest, *sorted(shapes), *shapes]:
        run.step(shape)
        assert captures[-1].nbytes <= 2 * needed
    after = captures[-1].nbytes
    for shape in shapes:  # forgotten meanwhile, and captured again
        run.step(shape)
    assert captures[-1].nbytes == after


def test_results_outlive_their_pass(llm_of: Load) -> None:
    model = llm_of("llama-grouped").model
    run = ForwardPass(model, cache_for(model))
    logits, arena = run([([1, 2, 3], sequence(0))], [2]).logits, weakref.ref(run._arena)
    expected = logits.tobytes()
    del run
    gc.collect()
    assert arena() is None
    assert logits.tobytes() == expected
