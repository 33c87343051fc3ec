"""From scheduled sequences to sampled tokens: builds the batch, runs the model, has it sampled. Owns the cache.

The highest floor that knows arrays. It does not choose what runs, and has never heard of text.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Protocol, TypeVar

import numpy as np

from tinyserve.models.base import DecoderModel
from tinyserve.models.batch import Batch
from tinyserve.models.cache_plan import CachePlan
from tinyserve.models.kv_cache import KVCache
from tinyserve.sampler import Sampler, logprobs_of
from tinyserve.scheduling.sequence import Sampled, Scheduled, Sequence
from tinyserve.tensor import _jit

Array = np.ndarray
T = TypeVar("T")

_ROWS = 64  # of a prompt's logits at a time: 13 MB for a vocabulary of 49,152


class ModelRunner:
    """Runs one model over one cache. One thread at a time may call it; of two runners in a process, one waits."""

    def __init__(
        self,
        model: DecoderModel,
        plan: CachePlan,
        num_threads: int | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ):
        """Take the memory that `plan` says; raises UserError where the system refuses it."""
        self.model, self.plan = model, plan
        self.num_threads = _jit.set_threads(num_threads)
        self.cache = KVCache(model.config, plan.num_blocks, plan.block_size, plan.kv_cache_dtype, plan.num_slots)
        self.sampler = Sampler(eos_token_ids)
        self.masks: Masks | None = None  # for sequences that have a grammar

    def execute(self, scheduled: list[Scheduled]) -> list[Sampled | None]:
        """Compute each sequence's next `num_tokens` tokens; a token is sampled where its newest one is reached."""
        complete = [i for i, (seq, num) in enumerate(scheduled) if seq.num_computed + num == len(seq.token_ids)]
        matchers = [scheduled[i].sequence.matcher for i in complete]
        filler = self.masks if any(matchers) else None
        if filler is not None:
            filler.start(matchers, [scheduled[i].sequence.draft for i in complete])  # while the model works
        with _jit.one_at_a_time(self.num_threads):
            batch = self._batch(scheduled)
            hidden = self.model(batch, self.cache)  # (tokens, hidden)
            for (sequence, num_tokens), first in zip(scheduled, batch.starts, strict=False):
                if sequence.params.prompt_logprobs is not None:
                    self._read_prompt(sequence, hidden[first : first + num_tokens])
            # What follows a sequence's last token, and each guess behind it.
            places = [(i, ahead) for i in complete for ahead in range(len(scheduled[i].sequence.draft) + 1)]
            rows = [batch.starts[i] + scheduled[i].num_tokens - 1 + ahead for i, ahead in places]
            logits = self.model.logits(hidden[rows])  # (places, vocab)
            sequences = [scheduled[i].sequence for i, _ in places]
            filled: Iterable[Array] = filler.wait() if filler is not None else []
            masks = [mask if s.matcher else None for mask, s in zip(filled, sequences, strict=False)]
            sampled = self.sampler.sample(sequences, logits, masks, [ahead for _, ahead in places])
        results: list[Sampled | None] = [None] * len(scheduled)
        chosen = iter(sampled)
        for i, matcher in zip(complete, matchers, strict=True):
            draft = scheduled[i].sequence.draft
            result = _followed(draft, [next(chosen) for _ in range(len(draft) + 1)])
            results[i] = result if matcher is None else _obeyed(matcher, result)
        return results

    def _read_prompt(self, sequence: Sequence, hidden: Array) -> None:
        """Log-probabilities of the prompt's tokens that follow these, if they are not known; hidden (tokens, H)."""
        prompt, known, start = sequence.prompt_token_ids, sequence.prompt_logprobs, sequence.num_computed
        end = min(start + len(hidden), len(prompt) - 1)
        for first in range(max(start, len(known) - 1), end, _ROWS):
            last = min(first + _ROWS, end)
            logits = self.model.logits(hidden[first - start : last - start])
            counts = [sequence.params.prompt_logprobs or 0] * (last - first)
            known += logprobs_of(logits, prompt[first + 1 : last + 1], counts)

    def copy_block(self, source: int, target: int) -> None:
        self.cache.copy_block(source, target)

    def copy_state(self, source: int, target: int) -> None:
        self.cache.copy_slot(source, target)

    def scratch(self, token_ids: list[int], blocks: list[int]) -> "Scratch":
        """A text to be read in blocks that no sequence holds; one at a time, as all have one state."""
        return Scratch(token_ids, blocks, state_slot=self.plan.scratch_slot)

    def read(self, text: "Scratch", chunk: int, of: Callable[[Array], T]) -> T:
        """What `of` makes of the hidden states (tokens, hidden) of a text's next tokens, `chunk` of them at most."""
        num_tokens = min(chunk, len(text.token_ids) - text.num_computed)
        with _jit.one_at_a_time(self.num_threads):
            made = of(self.model(self._batch([(text, num_tokens)]), self.cache))
        text.num_computed += num_tokens
        return made

    def compile_kernels(self, key: str, waiting: Callable[[], None]) -> None:
        """Run two tokens and draw, the first time on a machine: of two processes one compiles, the other waits for it.

        `key` names what the kernels depend on beside the processor: the architecture and the dtype. `waiting` is
        called when another process has the lock.
        """
        from filelock import FileLock, Timeout

        ready = _jit.cache_folder() / f"{key}.ready"
        if not ready.exists():
            lock = FileLock(_jit.cache_folder() / "compiling.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                waiting()
                lock.acquire()
            try:
                self.sampler.run_kernels(self.read(self.scratch([0, 0], blocks=[0]), 2, self.model.logits))
                ready.touch()
            finally:
                lock.release()

    def _batch(self, work: "Iterable[tuple[_Tokens, int]]") -> Batch:
        work, block_size = list(work), self.cache.block_size
        for sequence, _ in work:
            if sequence.num_computed == 0:
                self.cache.reset_slot(sequence.state_slot)
        starts, counts = np.array([(s.num_computed, num_tokens + len(s.draft)) for s, num_tokens in work]).T
        rows = np.concatenate(([0], np.cumsum(counts)))  # where each sequence's tokens begin
        parts = (s.token_ids[s.num_computed : s.num_computed + n] + s.draft for s, n in work)
        token_ids = np.fromiter(chain.from_iterable(parts), np.int64, rows[-1])
        sequence_of = np.repeat(np.arange(len(work)), counts)
        positions = np.arange(rows[-1]) + (starts - rows[:-1])[sequence_of]
        width = max(len(sequence.block_table) for sequence, _ in work)
        padding = [0] * width
        tables = np.array([(s.block_table + padding)[:width] for s, _ in work], np.int32)
        slots = tables[sequence_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
        state_slots = np.array([sequence.state_slot for sequence, _ in work])
        return Batch(token_ids, positions, slots, sequence_of, tables, rows, state_slots)


class Masks(Protocol):
    """Finds out which tokens come next, in a thread of its own."""

    def start(self, matchers: list[Any], drafts: list[list[int]]) -> None:
        """Begin; a matcher may be None, and has guesses behind its place."""

    def wait(self) -> Array:
        """The masks (places, words) uint32 of the last `start`: each matcher's own, and one behind each guess."""


def _followed(draft: list[int], sampled: list[Sampled]) -> Sampled:
    """The first token, and those after it as long as the guesses were right."""
    right = 0
    while right < len(draft) and sampled[right].token_id == draft[right] and sampled[right + 1].error is None:
        right += 1
    return sampled[0]._replace(then=tuple(sampled[1 : right + 1])) if right else sampled[0]


def _obeyed(matcher: Any, sampled: Sampled) -> Sampled:
    """The tokens, taken in by their grammar, as far as it goes; or why there is none."""
    for right, one in enumerate((sampled, *sampled.then)):
        if one.error is None:
            matcher.advance(one.token_id)
        if matcher.error is not None:  # the next step comes here again where there are tokens before
            return sampled._replace(then=sampled.then[: right - 1]) if right else Sampled(-1, error=matcher.error)
    return sampled


class _Tokens(Protocol):
    token_ids: list[int]
    num_computed: int
    block_table: list[int]
    state_slot: int
    draft: list[int]


class Scratch:
    """The part of a sequence that a batch is made from."""

    def __init__(self, token_ids: list[int], block_table: list[int], state_slot: int):
        self.token_ids, self.block_table, self.state_slot, self.num_computed = token_ids, block_table, state_slot, 0
        self.draft: list[int] = []
