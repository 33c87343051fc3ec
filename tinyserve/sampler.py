"""Chooses the next token of each sequence from its row of logits, as its request asks, whoever else is in the batch.

Knows SamplingParams and where each of them has its place in the chain (tensor/sampling.py); not how logits came to be.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from weakref import WeakKeyDictionary

import numpy as np

from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.random_numbers import uniform
from tinyserve.scheduling.sequence import Logprob, Logprobs, Sampled, Sequence
from tinyserve.tensor.logits_processors import allow, penalise
from tinyserve.tensor.sampling import FILTERS, PROCESSORS, SETTINGS, log_probabilities, sample

Array = np.ndarray

DAMAGED = "The model computed logits that are not numbers: its weights are damaged."
NOTHING_LEFT = (
    "No token is left to choose from: the grammar, allowed_token_ids, banned_token_ids, bad_words and min_tokens "
    "together forbid all of them."
)


class Sampler:
    """Samples for one runner. `eos_token_ids` end an answer, and wait for `min_tokens` where they are not ignored."""

    def __init__(self, eos_token_ids: frozenset[int] = frozenset()):
        self.eos_token_ids = eos_token_ids
        self._processors: WeakKeyDictionary[Sequence, LogitsProcessors] = WeakKeyDictionary()

    def sample(
        self,
        sequences: SequenceOf[Sequence],
        logits: Array,
        masks: SequenceOf[Array | None] = (),
        drafts: SequenceOf[SequenceOf[int]] = (),
        largest: tuple[Array, Array] | None = None,
    ) -> list[Sampled]:
        """The next token of each sequence; logits (sequences, vocab) float32 are overwritten.

        masks: none, or for each row None or the tokens that its grammar allows, bits in words of uint32 (as `allow`
        takes them). drafts: the draft tokens that stand before each row's token, none by default; all is done as if
        they had been sampled. largest: what `find_largest` says of the logits, if somebody has asked. Log-probabilities
        are of the logits as they came.
        """
        params = [sequence.params for sequence in sequences]
        drafts = drafts or [()] * len(params)
        wanted = [row for row, p in enumerate(params) if p.logprobs is not None]
        own = logits[wanted]
        if any(mask is not None for mask in masks) or any(p.changes_logits for p in params):
            self._process(sequences, logits, masks, drafts)
            largest = None
        token_ids = sample(logits, settings_of(sequences, drafts), largest)
        results = [Sampled(token) for token in token_ids.tolist()]
        for row in np.flatnonzero(token_ids < 0).tolist():
            forbids = params[row].changes_logits or (masks and masks[row] is not None)
            is_empty = forbids and logits[row].max() == -np.inf
            results[row] = Sampled(-1, error=NOTHING_LEFT if is_empty else DAMAGED, is_request_error=bool(is_empty))
        healthy = [i for i, row in enumerate(wanted) if token_ids[row] >= 0]
        rows = [wanted[i] for i in healthy]
        found = logprobs_of(own[healthy], token_ids[rows], [params[row].logprobs or 0 for row in rows])
        for row, logprobs in zip(rows, found, strict=True):
            results[row] = results[row]._replace(logprobs=logprobs)
        return results

    def take_largest(self, token_ids: Array) -> list[Sampled]:
        """The same where every row asks for its largest logit and nothing else; token_ids (rows,) as the model chose
        them, -1 where its logits are no numbers.
        """
        return [Sampled(token) if token >= 0 else Sampled(-1, error=DAMAGED) for token in token_ids.tolist()]

    def run_kernels(self, logits: Array) -> None:
        """Sample two rows (2, vocab) in every way, so that whoever comes later has all kernels."""
        everything = np.full((logits.shape[1] + 31) // 32, 0xFFFFFFFF, np.uint32)
        for temperature in (0.0, 1.0):
            params = SamplingParams(temperature=temperature, presence_penalty=1.0, logprobs=1)
            self.sample([Sequence(i, [0], params) for i in range(2)], logits.copy(), [everything, everything])

    def _process(
        self,
        sequences: SequenceOf[Sequence],
        logits: Array,
        masks: SequenceOf[Array | None],
        drafts: SequenceOf[SequenceOf[int]],
    ) -> None:
        masked = [(row, mask) for row, mask in enumerate(masks) if mask is not None]
        if masked:
            allow(logits, np.array([row for row, _ in masked]), np.stack([mask for _, mask in masked]))
        for row, sequence in enumerate(sequences):
            if sequence.params.changes_logits:
                processors = self._processors.get(sequence)
                if processors is None:
                    processors = LogitsProcessors(sequence, self.eos_token_ids, logits.shape[1])
                    self._processors[sequence] = processors
                processors(logits[row], sequence, drafts[row])


def settings_of(sequences: SequenceOf[Sequence], drafts: SequenceOf[SequenceOf[int]]) -> Array:
    """What `sample` is asked for, a row of SETTINGS each; zeros but for the temperature where all are greedy."""
    settings = np.zeros(len(sequences), SETTINGS)
    settings["temperature"] = [sequence.params.temperature for sequence in sequences]
    if settings["temperature"].any():
        for name in FILTERS:
            # A whole number has no bound, a float64 has.
            settings[name] = [min(getattr(sequence.params, name), 1e300) for sequence in sequences]
        settings["uniform"] = [
            uniform(sequence.seed, sequence.num_output + len(draft))
            for sequence, draft in zip(sequences, drafts, strict=True)
        ]
    return settings


def logprobs_of(logits: Array, chosen: Array | list[int], counts: list[int]) -> list[Logprobs]:
    """For each row of logits the log-probabilities of the chosen token and of the counts[i] likeliest."""
    if not counts:
        return []
    found = log_probabilities(logits, np.asarray(chosen, np.int64), np.array(counts, np.int64))
    return [{token: Logprob(*one) for token, one in row.items()} for row in found]


class LogitsProcessors:
    """The logits processors of one request: a method for each of PROCESSORS, with its lists as arrays."""

    def __init__(self, sequence: Sequence, eos_token_ids: frozenset[int], vocab: int):
        self.params = params = sequence.params
        bias = params.logit_bias or {}
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self.allowed = None if params.allowed_token_ids is None else _ids(params.allowed_token_ids, vocab)
        self.banned, self.ends = _ids(params.banned_token_ids, vocab), _ids(ends, vocab)
        self.words = [word for word in sequence.bad_words if max(word) < vocab]
        self.biased = _ids(bias, vocab)
        self.bias = np.array([bias[token] for token in self.biased], np.float32)
        self.prompt = _ids(sequence.prompt_token_ids if params.has_penalties else (), vocab)
        # Beyond this a logit of a billion would be an infinity.
        self.repetition = np.float32(min(1e29, max(1e-29, params.repetition_penalty)))

    def __call__(self, row: Array, sequence: Sequence, draft: SequenceOf[int]) -> None:
        """Change a row (vocab,) of logits, behind these draft tokens."""
        said = [*sequence.output_token_ids, *draft]
        for name in PROCESSORS:
            getattr(self, name)(row, said)

    def allowed_token_ids(self, row: Array, said: list[int]) -> None:
        if self.allowed is not None:
            allowed = row[self.allowed]
            row.fill(-np.inf)
            row[self.allowed] = allowed

    def banned_token_ids(self, row: Array, said: list[int]) -> None:
        row[self.banned] = -np.inf

    def bad_words(self, row: Array, said: list[int]) -> None:
        if self.words:
            row[completing(self.words, said)] = -np.inf

    def logit_bias(self, row: Array, said: list[int]) -> None:
        row[self.biased] += self.bias

    def min_tokens(self, row: Array, said: list[int]) -> None:
        if len(said) < self.params.min_tokens:
            row[self.ends] = -np.inf

    def penalties(self, row: Array, said: list[int]) -> None:
        if self.params.has_penalties:
            others = np.float32(self.params.frequency_penalty), np.float32(self.params.presence_penalty)
            penalise(row, self.prompt, np.array(said, np.int64), self.repetition, *others)


def completing(words: Iterable[list[int]], said: list[int]) -> list[int]:
    """The last token of each word whose other tokens were said last."""
    return [word[-1] for word in words if said[max(0, len(said) - len(word) + 1) :] == word[:-1]]


def _ids(token_ids: Iterable[int], vocab: int) -> Array:
    """Those that the model has a logit for."""
    return np.array([token for token in token_ids if token < vocab], np.int64)
