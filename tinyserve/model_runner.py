"""From scheduled sequences to sampled tokens: builds the batch, runs the model, has it sampled. Owns the cache.

The highest layer that makes arrays: above, they are only handed on. It neither chooses what runs nor knows text.
"""

import hashlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from tinyserve.models.cache_plan import CachePlan
from tinyserve.models.forward import ForwardPass, Step
from tinyserve.progress import Progress
from tinyserve.sampler import Sampler, logprobs_of
from tinyserve.scheduling.sequence import CacheState, PrefillOnlySequence, Sampled, Scheduled, Sequence
from tinyserve.tensor import _jit
from tinyserve.tensor.program import compiling, plan

Array = np.ndarray
T = TypeVar("T")

_ROWS = 64  # rows of a prompt's logits computed at a time: 13 MB for a vocabulary of 49,152


class ModelRunner:
    """Runs one model over its cache. One thread at a time may call it; of two runners in a process, one waits."""

    def __init__(
        self,
        forward: ForwardPass,
        plan: CachePlan,
        num_threads: int | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ):
        """`plan` is what the cache of the forward pass is divided into."""
        self.forward, self.plan = forward, plan
        self.model, self.cache = forward.model, forward.cache
        self.num_threads = _jit.set_threads(num_threads)
        self.sampler = Sampler(eos_token_ids)
        self.masks: Masks | None = None  # for sequences that have a grammar

    def execute(self, scheduled: list[Scheduled]) -> list[list[Sampled]]:
        """Compute what is scheduled. For each sequence the tokens that follow: none in the middle of its prompt, else
        the accepted draft tokens, as if each had been sampled after those before it, and one more.
        """
        places = _places_to_sample(scheduled)
        filler = self._start_masks(scheduled)  # while the model works
        all_hidden = any(work.sequence.params.prompt_logprobs is not None for work in scheduled)
        with _ended(filler):
            begun = self.forward.begin(
                [(work.token_ids, work.sequence.cache) for work in scheduled],
                [place.row for place in places],
                all_hidden,
            )
        with _jit.one_at_a_time(self.num_threads):
            with _ended(filler):
                step = self.forward(begun.work, begun.rows, all_hidden, begun.stream)
            self._add_prompts_logprobs(scheduled, step)
            masks = list[Array | None]()
            if filler is not None:
                filled = zip(places, filler.wait(), strict=True)
                masks = [mask if place.sequence.matcher else None for place, mask in filled]
            sampled = self._sample(places, step, masks)
        if filler is None and len(sampled) == len(scheduled) == step.batch.token_ids.size:
            return [[one] for one in sampled]  # all decode, and nothing was guessed
        results, end = list[list[Sampled]](), 0
        for work in scheduled:
            first, end = end, end + (len(work.draft_tokens) + 1 if work.is_complete else 0)
            tokens = accept_draft(work.draft_tokens, sampled[first:end])
            matcher = work.sequence.matcher
            results.append(tokens if matcher is None else advance_grammar(matcher, tokens))
        return results

    def _start_masks(self, scheduled: list[Scheduled]) -> "Masks | None":
        if self.masks is None:
            return None
        complete = [work for work in scheduled if work.is_complete]
        if not any(work.sequence.matcher for work in complete):
            return None
        self.masks.start([work.sequence.matcher for work in complete], [work.draft_tokens for work in complete])
        return self.masks

    def _sample(self, places: "list[_Place]", step: Step, masks: list[Array | None]) -> list[Sampled]:
        sequences = [place.sequence for place in places]
        if not masks and all(sequence.params.takes_largest for sequence in sequences):
            return self.sampler.take_largest(step.token_ids)
        drafts = [place.draft_tokens for place in places]
        return self.sampler.sample(sequences, step.logits, masks, drafts, step.largest)

    def _add_prompts_logprobs(self, scheduled: list[Scheduled], step: Step) -> None:
        first = 0
        for work in scheduled:
            if work.sequence.params.prompt_logprobs is not None:
                self._add_prompt_logprobs(work.sequence, step.hidden[first : first + work.num_tokens])
            first += work.num_tokens + len(work.draft_tokens)

    def _add_prompt_logprobs(self, sequence: Sequence, hidden: Array) -> None:
        """Append prompt log-probabilities of the tokens after these positions, unless known; hidden (tokens, H)."""
        prompt, known, start = sequence.prompt_token_ids, sequence.prompt_logprobs, sequence.cache.num_computed
        end = min(start + len(hidden), len(prompt) - 1)
        for first in range(max(start, len(known) - 1), end, _ROWS):
            last = min(first + _ROWS, end)
            logits = self.model.logits(hidden[first - start : last - start])
            counts = [sequence.params.prompt_logprobs or 0] * (last - first)
            known += logprobs_of(logits, prompt[first + 1 : last + 1], counts)

    def copy_block(self, source: int, target: int) -> None:
        self.cache.copy_block(source, target)

    def copy_state(self, source: int, target: int) -> None:
        self.cache.copy_state(source, target)

    @property
    def scratch_slot(self) -> int:
        """The state slot of a text that is only read; one at a time."""
        return self.plan.scratch_slot

    def recover(self) -> None:
        """After a CacheLostError, have an empty cache again; raises EngineDeadError."""
        self.forward.recover()

    def prefill(
        self, sequence: PrefillOnlySequence, max_tokens: int, reduce: Callable[[Array, int], T]
    ) -> tuple[int, T]:
        """Compute a text's next tokens, at most so many: the first one's place in the text, and what `reduce` makes of
        their hidden states (tokens, hidden) and that place.
        """
        start = sequence.cache.num_computed
        token_ids = sequence.token_ids[start : start + max_tokens]
        begun = self.forward.begin([(token_ids, sequence.cache)], [], all_hidden=True)
        with _jit.one_at_a_time(self.num_threads):
            reduced = reduce(self.forward(begun.work, [], True, begun.stream).hidden, start)
        sequence.cache.num_computed += len(token_ids)
        return start, reduced

    def compile_kernels(self, dtype: str, progress: Progress) -> None:
        """Run some tokens and draw, the first time on a machine: of two processes one compiles, the other waits for it.

        `dtype` is that of the weights. `progress` hears ("wait", 0, 0) when another process has the lock.
        """
        _jit.compile_once(self._kernels(dtype), self._run_kernels, lambda: progress("wait", 0, 0))

    def _run_kernels(self) -> None:
        cache = CacheState([0], self.scratch_slot)
        steps = (([0] * 3, [2]), ([0], [0]), ([0, 0], [0, 1]))  # a single row has kernels of its own
        with _jit.one_at_a_time(self.num_threads):
            with plan() as planned:
                for token_ids, rows in steps:
                    self.forward.record([(token_ids, cache)], len(rows))
                self.sampler.run_kernels(np.zeros((2, self.model.config.vocab_size), np.float32))
            with compiling(planned):
                *_, step = [self._run((token_ids, cache), rows) for token_ids, rows in steps]
                self.sampler.run_kernels(step.logits)

    def _run(self, tokens: tuple[list[int], CacheState], rows: list[int]) -> Step:
        begun = self.forward.begin([tokens], rows)
        return self.forward(begun.work, begun.rows, stream=begun.stream)

    def _kernels(self, dtype: str) -> str:
        """A key for the set of kernels that this model compiles; models that may need others get another key.

        They follow from the dtypes, the whole config (layers of several kinds have one model_type) and the bits of
        each matrix, which a GGUF file decides: the bytes of all weights tell those apart.
        """
        config, kv_cache_dtype = self.model.config, self.cache.dtype
        told = f"{config!r} {self.model.nbytes} {self.model.layers}"
        return f"{config.model_type}-{dtype}-{kv_cache_dtype}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


class Masks(Protocol):
    """Fills grammar masks (token bitmasks) in a thread of its own."""

    def start(self, matchers: list[Any], drafts: SequenceOf[SequenceOf[int]]) -> None:
        """Begin; a matcher may be None, and has draft tokens behind its place."""

    def wait(self) -> Array:
        """The masks (places, words) uint32 of the last `start`: each matcher's own, and one behind each draft token."""


@contextmanager
def _ended(filler: Masks | None) -> Iterator[None]:
    """Where the block fails wait for the masks: until then nobody else may touch their matchers, and these go on."""
    try:
        yield
    except BaseException:
        if filler is not None:
            filler.wait()
        raise


class _Place(NamedTuple):
    """A position to sample at (vLLM's logits_indices): after a sequence's last token, or after a draft token."""

    sequence: Sequence
    row: int  # of the batch: the token before it
    draft_tokens: SequenceOf[int]


def _places_to_sample(scheduled: list[Scheduled]) -> list[_Place]:
    places, start = list[_Place](), 0
    for work in scheduled:
        drafts, last = len(work.draft_tokens), start + work.num_tokens - 1
        if work.is_complete:
            places += [_Place(work.sequence, last + i, work.draft_tokens[:i]) for i in range(drafts + 1)]
        start = last + 1 + drafts
    return places


def accept_draft(draft_tokens: SequenceOf[int], sampled: list[Sampled]) -> list[Sampled]:
    """The accepted draft tokens and one token more; `sampled[i]` was sampled in the place of `draft_tokens[i]`.

    A draft token is accepted where it is what was sampled in its place (greedily, or with the request's own random
    numbers), which keeps every answer as it would be without it.
    """
    for i, draft_token in enumerate(draft_tokens):
        if sampled[i].token_id != draft_token or sampled[i + 1].error is not None:
            return sampled[: i + 1]
    return sampled


def advance_grammar(matcher: Any, sampled: list[Sampled]) -> list[Sampled]:
    """Advance a grammar by sampled tokens: returns those it took, or its error where it took none."""
    for i, one in enumerate(sampled):
        if one.error is None:
            matcher.advance(one.token_id)
        if matcher.error is not None:  # where there are tokens before, the next step comes here again
            return sampled[:i] or [Sampled(-1, error=matcher.error, is_request_error=True)]
    return sampled
