"""Beam search: the likeliest answers that are found by going on, at each token, with the likeliest few.

Knows token ids, log-probabilities and how answers are compared; each token is a request of its own to `generate`, and
the prefix cache sees to it that only what is new is computed.
"""

import math
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Protocol

from tinyserve.errors import RequestError
from tinyserve.progress import ProgressBar, is_shown
from tinyserve.sampling_params import BeamSearchParams, SamplingParams
from tinyserve.scheduling.sequence import Logprobs
from tinyserve.text.request import RequestOutput, RequestState
from tinyserve.text.short_repr import ShortRepr
from tinyserve.text.tokenizer import Tokenizer
from tinyserve.text.validation import Prompt

__all__ = ["BeamSearch", "BeamSearchOutput", "BeamSearchParams", "BeamSearchSequence", "beam_search"]


@dataclass(repr=False)
class BeamSearchSequence(ShortRepr):
    """One answer behind its prompt. `finish_reason` is "stop" (its last token is an end token), "length" or "abort".

    `logprobs` has for each new token those of the likeliest at its place; `cum_logprob` is the sum of the chosen ones,
    and `score` that by the number of new tokens ** length_penalty.
    """

    tokens: list[int]  # the prompt's among them
    logprobs: list[Mapping[int, float]] = field(default_factory=list, repr=False)
    cum_logprob: float = 0.0
    text: str = ""  # the prompt's with it
    finish_reason: str | None = None
    score: float = 0.0


@dataclass(repr=False)
class BeamSearchOutput(ShortRepr):
    """A prompt and what may follow it: `beam_width` sequences, or all there are, the best first."""

    sequences: list[BeamSearchSequence]
    prompt: str | None
    prompt_token_ids: list[int]


class Generator(Protocol):
    """What is asked of an `LLM`."""

    tokenizer: Tokenizer | None
    end_tokens: Mapping[int, list[str]]

    @property
    def max_model_len(self) -> int: ...

    def make_request(self, prompt: Prompt, params: SamplingParams) -> list[RequestState]: ...

    def generate(
        self, prompts: SequenceOf[Prompt], sampling_params: SamplingParams, *, progress_bar: bool
    ) -> list[RequestOutput]: ...


def beam_search(
    llm: Generator,
    prompts: SequenceOf[Prompt],
    params: BeamSearchParams,
    max_num_seqs: int,
    progress_bar: bool | None = None,
) -> list[BeamSearchOutput]:
    """The best answers to each prompt, whose beams share the engine's steps, which take `max_num_seqs` at once.

    Raises RequestError for params that are not BeamSearchParams, and for a prompt that cannot be served.
    """
    searches = [BeamSearch(llm, prompt, params) for prompt in prompts]  # what would not fit is refused here
    waiting, active = deque(searches), list[BeamSearch]()
    total = sum(search.max_tokens for search in searches)
    with ProgressBar(is_shown(progress_bar, len(prompts))) as bar:
        while waiting or active:
            # More than can run would gain nothing, and push what the others need out of the cache.
            while waiting and (not active or (len(active) + 1) * params.beam_width <= max_num_seqs):
                active.append(waiting.popleft())
            beams = [beam.tokens for search in active for beam in search.beams]
            answers = (output.outputs[0] for output in llm.generate(beams, active[0].step, progress_bar=False))
            for search in active:
                search.advance([next(answers).logprobs for _ in search.beams])
            active = [search for search in active if search.beams]
            # One that has ended early needs no more of its tokens; one that waits has its prompt for a beam.
            bar("tokens", sum(s.num_tokens if s.beams else s.max_tokens for s in searches), total)
    return [search.output() for search in searches]


class BeamSearch:
    """The beams of one prompt, the likeliest first, and the best of those that have ended.

    As long as there are `beams`, each is a prompt for a request of `step`, whose log-probabilities `advance` takes.

    The steps and the rule for stopping are those of transformers' `_beam_search` with early_stopping="never": the
    search ends when no beam can become better than the worst of `beam_width` finished ones, however it goes on.
    """

    def __init__(self, llm: Generator, prompt: Prompt, params: BeamSearchParams):
        if not isinstance(params, BeamSearchParams):
            raise RequestError(
                f"params is {params!r:.60}; beam search takes BeamSearchParams(beam_width=, max_tokens=).",
                param="params",
            )
        whole = SamplingParams(temperature=0.0, max_tokens=params.max_tokens)
        request = llm.make_request(prompt, whole)[0]
        self.params, self.tokenizer = params, llm.tokenizer
        self.prompt, self.prompt_token_ids = request.prompt, request.sequence.prompt_token_ids
        self.ends = frozenset() if params.ignore_eos else frozenset(llm.end_tokens)
        # The likeliest that do not end come behind the end tokens at worst.
        self.step = SamplingParams(temperature=0.0, max_tokens=1, logprobs=params.beam_width + len(self.ends))
        self.max_tokens = min(params.max_tokens, llm.max_model_len - len(self.prompt_token_ids))
        self.num_tokens = 0  # of each beam behind the prompt
        self.beams = [BeamSearchSequence(self.prompt_token_ids)]
        self.finished: list[BeamSearchSequence] = []  # by score

    def advance(self, logprobs: list[list[Logprobs] | None]) -> None:
        """Go on from each beam with the likeliest of its next tokens, and theirs are the `logprobs` of its answer."""
        candidates = [
            (beam.cum_logprob + logprob, beam, here, token)
            for beam, answer in zip(self.beams, logprobs, strict=True)
            for here in answer or ()
            for token, logprob in here.items()
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        self.num_tokens += 1
        width, self.beams = self.params.beam_width, []
        for rank, (total, beam, here, token) in enumerate(candidates):
            reason = self._finish_reason(token)
            if (rank if reason else len(self.beams)) >= width:
                continue  # an end counts as one of the likeliest, or not at all
            grown = BeamSearchSequence(
                [*beam.tokens, token], [*beam.logprobs, here], total, "", reason, self._score(total, self.num_tokens)
            )
            (self.finished if reason else self.beams).append(grown)
        self._keep_the_best()
        if self._is_decided():
            self.beams = []

    def abort(self) -> None:
        """End the search: the beams are answers as they are, beside those that have ended."""
        self.finished += [
            replace(beam, finish_reason="abort", score=self._score(beam.cum_logprob, max(1, self.num_tokens)))
            for beam in self.beams
        ]
        self._keep_the_best()
        self.beams = []

    def output(self) -> BeamSearchOutput:
        """What has been found, in text too."""
        for sequence in self.finished:
            sequence.text = self._text(sequence)
        return BeamSearchOutput(self.finished, self.prompt, self.prompt_token_ids)

    def _finish_reason(self, token: int) -> str | None:
        if token in self.ends:
            return "stop"
        return "length" if self.num_tokens >= self.max_tokens else None

    def _score(self, cum_logprob: float, num_tokens: int) -> float:
        return cum_logprob / math.pow(num_tokens, self.params.length_penalty)

    def _is_decided(self) -> bool:
        if len(self.finished) < self.params.beam_width or not self.beams:
            return False
        if self.params.beam_width == 1:  # greedy decoding ends at its first end token
            return True
        # Sums only fall; the length that makes the most of one is the longest, or with a penalty below 0 the shortest.
        length = self.max_tokens if self.params.length_penalty > 0 else self.num_tokens
        return self._score(self.beams[0].cum_logprob, length) <= self.finished[-1].score

    def _keep_the_best(self) -> None:
        self.finished.sort(key=lambda sequence: -sequence.score)
        del self.finished[self.params.beam_width :]

    def _text(self, sequence: BeamSearchSequence) -> str:
        """The prompt, as it was given where that was text, and what follows it."""
        if self.tokenizer is None:
            return ""
        ids, end = sequence.tokens, ""
        if sequence.finish_reason == "stop":
            shown = self.params.include_stop_str_in_output
            ids, end = ids[:-1], self.tokenizer.decode(ids[-1:], skip_special_tokens=False) if shown else ""
        if self.prompt is None:
            return self.tokenizer.decode(ids) + end
        return self.prompt + self.tokenizer.decode(ids[len(self.prompt_token_ids) :], continuation=True) + end
