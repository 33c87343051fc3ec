"""Beam search: the likeliest answers that are found by going on, at each token, with the likeliest few.

Knows token ids, log-probabilities and how answers are compared; each token is a request of its own to `generate`, and
the prefix cache sees to it that only what is new is computed.
"""

import math
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from tinyserve.answer_bar import is_shown, make_bar
from tinyserve.arguments import Prompt
from tinyserve.errors import RequestError
from tinyserve.request import Request, RequestOutput
from tinyserve.sampling_params import BeamSearchParams, SamplingParams
from tinyserve.tokenizer import Tokenizer

__all__ = ["BeamSearchOutput", "BeamSearchParams", "BeamSearchSequence", "beam_search"]


@dataclass
class BeamSearchSequence:
    """One answer behind its prompt. `finish_reason` is "stop" (an end token, the last of `tokens`) or "length".

    `logprobs` has for each new token those of the likeliest at its place; `cum_logprob` is the sum of the chosen ones,
    and `score` that by the number of new tokens ** length_penalty.
    """

    tokens: list[int]  # the prompt's among them
    logprobs: list[Mapping[int, float]] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str = ""  # the prompt's with it
    finish_reason: str | None = None
    score: float = 0.0


@dataclass
class BeamSearchOutput:
    """A prompt and what may follow it: `beam_width` sequences, or all there are, the best first."""

    sequences: list[BeamSearchSequence]
    prompt: str | None
    prompt_token_ids: list[int]


class Generator(Protocol):
    """What is asked of an `LLM`."""

    tokenizer: Tokenizer | None
    max_model_len: int
    end_tokens: Mapping[int, list[str]]

    def make_request(self, prompt: Prompt, params: SamplingParams) -> list[Request]: ...

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
    if not isinstance(params, BeamSearchParams):
        raise RequestError(f"params is {params!r:.60}; beam search takes BeamSearchParams(beam_width=, max_tokens=).")
    whole = SamplingParams(temperature=0.0, max_tokens=params.max_tokens)
    requests = [llm.make_request(prompt, whole)[0] for prompt in prompts]  # what would not fit is refused here
    ends = frozenset() if params.ignore_eos else frozenset(llm.end_tokens)
    searches = [_Search(request.sequence.prompt_token_ids, params, ends, llm.max_model_len) for request in requests]
    # The likeliest that do not end come behind the end tokens at worst.
    step = SamplingParams(temperature=0.0, max_tokens=1, logprobs=params.beam_width + len(ends))
    waiting, active = deque(searches), list[_Search]()
    with make_bar("tokens", shown=is_shown(progress_bar, len(prompts))) as bar:
        task = bar.add_task("", total=sum(search.max_tokens for search in searches))
        while waiting or active:
            # More than can run would gain nothing, and push what the others need out of the cache.
            while waiting and (not active or (len(active) + 1) * params.beam_width <= max_num_seqs):
                active.append(waiting.popleft())
            beams = [beam.tokens for search in active for beam in search.beams]
            outputs = iter(llm.generate(beams, step, progress_bar=False))
            for search in active:
                search.advance([_logprobs(next(outputs)) for _ in search.beams])
            active = [search for search in active if search.beams]
            # One that has ended early needs no more of its tokens; one that waits has its prompt for a beam.
            bar.update(task, completed=sum(s.num_tokens if s.beams else s.max_tokens for s in searches))
    for request, search in zip(requests, searches, strict=True):
        for sequence in search.finished:
            sequence.text = _text(sequence, request, llm.tokenizer, params.include_stop_str_in_output)
    return [
        BeamSearchOutput(search.finished, request.prompt, request.sequence.prompt_token_ids)
        for request, search in zip(requests, searches, strict=True)
    ]


class _Search:
    """The beams of one prompt, the likeliest first, and the best of those that have ended.

    The steps and the rule for stopping are those of transformers' `_beam_search` with early_stopping="never": the
    search ends when no beam can become better than the worst of `beam_width` finished ones, however it goes on.
    """

    def __init__(self, prompt: list[int], params: BeamSearchParams, ends: frozenset[int], max_model_len: int):
        self.params, self.ends = params, ends
        self.max_tokens = min(params.max_tokens, max_model_len - len(prompt))
        self.num_tokens = 0  # of each beam behind the prompt
        self.beams = [BeamSearchSequence(prompt)]
        self.finished: list[BeamSearchSequence] = []  # by score

    def advance(self, logprobs: list[Mapping[int, float]]) -> None:
        """Go on from each beam with the likeliest of its next tokens, and theirs are `logprobs`."""
        candidates = [
            (beam.cum_logprob + logprob, beam, here, token)
            for beam, here in zip(self.beams, logprobs, strict=True)
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
        self.finished.sort(key=lambda sequence: -sequence.score)
        del self.finished[width:]
        if self._is_decided():
            self.beams = []

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


def _logprobs(output: RequestOutput) -> Mapping[int, float]:
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None  # they were asked for
    return logprobs[0]


def _text(sequence: BeamSearchSequence, request: Request, tokenizer: Tokenizer | None, with_end: bool) -> str:
    """The prompt, as it was given where that was text, and what follows it."""
    if tokenizer is None:
        return ""
    ids, end = sequence.tokens, ""
    if sequence.finish_reason == "stop":
        ids, end = ids[:-1], tokenizer.decode(ids[-1:], skip_special_tokens=False) if with_end else ""
    if request.prompt is None:
        return tokenizer.decode(ids) + end
    return request.prompt + tokenizer.decode(ids[len(request.sequence.prompt_token_ids) :], continuation=True) + end
