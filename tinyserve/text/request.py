"""The output processor: one request's text so far, the chunks of a stream, the answer at the end.

Knows text and the updates of one sequence, which the engine may be ahead of; it does not know other requests.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tinyserve.engine import Update
from tinyserve.errors import IncompleteError
from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.sequence import Logprobs, Metrics, Sequence
from tinyserve.text.chat import OutputParser
from tinyserve.text.glass_box import answer_html, request_html
from tinyserve.text.short_repr import ShortRepr
from tinyserve.text.tokenizer import Detokenizer
from tinyserve.text.tokenizer.stops import StopFilter
from tinyserve.text.tool_parser import ToolCall, ToolCallDelta

MOST_SHOWN = 20  # outputs, in a notebook


@dataclass(repr=False)
class CompletionOutput(ShortRepr):
    """One answer. `finish_reason`: "stop" (an end token or a stop string), "tool_calls", "length", "abort" or "error".

    `stop_reason` is the stop string or the id among `stop_token_ids` that ended it, None for the model's own end.
    `text` leaves out `tool_calls`, and `reasoning`, what the model thought before it answered a conversation.
    "tool_calls" stands for "stop" where the model chose by itself to call tools.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = field(default=None, repr=False)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    metrics: Metrics = field(default_factory=Metrics, compare=False, repr=False)
    tool_calls: list[ToolCall] = field(default_factory=list)
    reasoning: str = ""
    reasoning_tokens: int = 0  # of token_ids

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of the whole answer, where `logprobs` were asked for."""
        if self.logprobs is None:
            return None
        return math.fsum(row[token] for token, row in zip(self.token_ids, self.logprobs, strict=True))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return answer_html(self)


@dataclass(repr=False)
class RequestOutput(ShortRepr):
    """A prompt with its answers, and the times of the first.

    `prompt_logprobs`, where asked for, has an entry for each token of the prompt, None for the first.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: Metrics = field(repr=False)
    prompt_logprobs: list[Logprobs | None] | None = field(default=None, repr=False)

    def _repr_html_(self) -> str:
        """What a notebook shows: the glass box."""
        return request_html(self)


class RequestOutputs(list[RequestOutput]):
    """A list, which a notebook shows as its members."""

    def _repr_html_(self) -> str:
        """The first ones, one below the other."""
        shown = "<hr>".join(output._repr_html_() for output in self[:MOST_SHOWN])
        return shown + (f"<hr>and {len(self) - MOST_SHOWN} more" if len(self) > MOST_SHOWN else "")


@dataclass(repr=False)
class StreamChunk(ShortRepr):
    """What came since the last chunk: printing the chunks one after the other prints the answer."""

    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = field(repr=False)
    finish_reason: str | None
    metrics: Metrics = field(repr=False)
    index: int = 0  # of the answer, where there are several
    stop_reason: str | int | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)  # each as soon as all of it is there
    tool_call_deltas: list[ToolCallDelta] = field(default_factory=list)  # the same in parts, as they come
    reasoning: str = ""
    reasoning_tokens: int = 0  # of token_ids

    def __str__(self) -> str:
        return self.text


class _Sent(NamedTuple):
    """How much a stream has handed out."""

    text: int = 0
    tokens: int = 0
    calls: int = 0
    deltas: int = 0
    reasoning: int = 0
    reasoning_tokens: int = 0


class RequestState:
    """The request state of one answer: detokenizes its sequence's updates, finds stop strings and tool calls."""

    def __init__(
        self,
        sequence: Sequence,
        prompt: str | None,
        detokenizer: Detokenizer | None,
        index: int = 0,
        text_of: Callable[[int], str] | None = None,
        parser: OutputParser | None = None,
        hidden: Mapping[int, str] | None = None,
    ):
        """`text_of` is the text of one token, for those that log-probabilities are of; `parser` finds tool calls.

        `hidden` are special tokens that are left out of the text, and that a stop string may name.
        """
        self.sequence, self.prompt, self.index = sequence, prompt, index
        self._parser = parser
        self._detokenizer, self._text_of = detokenizer, text_of
        self._hidden = hidden or {}
        self._stops = StopFilter(tuple(sequence.params.stop), tuple(self._hidden.values()))
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.num_computed = 0
        self.metrics = replace(sequence.metrics, token_times=[])
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.error: BaseException | None = None
        self.reasoning_tokens = 0
        self._sent = _Sent()

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls so far."""
        return [] if self._parser is None else self._parser.tool_calls

    @property
    def reasoning(self) -> str:
        """The thinking that is certain."""
        return "" if self._parser is None else self._parser.reasoning

    @property
    def is_reading(self) -> bool:
        """Whether its prompt is in chunked prefill: some chunks are computed, and not all."""
        return not self.token_ids and 0 < self.num_computed < self.metrics.prompt_tokens

    def take(self, update: Update) -> bool:
        """Take in what a step has brought; True where its text ended the answer, which the engine cannot know."""
        if self.finished:
            return False
        self.num_computed, self.error = update.num_computed, update.error
        metrics = self.sequence.metrics
        self.metrics.first_scheduled, self.metrics.cached_tokens = metrics.first_scheduled, metrics.cached_tokens
        self.metrics.preemptions = metrics.preemptions
        if update.token_id is not None:
            self._append(update, update.token_id)
        if not self._is_over() and update.finish_reason is None:
            return False
        self._close(update.finish_reason)
        return update.finish_reason is None

    def _is_over(self) -> bool:
        """Whether a stop string has come, or the only call there may be."""
        return self._stops.matched is not None or (self._parser is not None and self._parser.is_over)

    def _append(self, update: Update, token: int) -> None:
        self.token_ids.append(token)
        self.metrics.token_times.append(update.time)
        if update.logprobs is not None:
            self.logprobs.append(self._spelled(update.logprobs))
        if update.finish_reason != "stop":  # the text of an end token is no part of the answer
            if self._detokenizer is not None:
                is_thought = self._parser is not None and self._parser.is_thinking
                self._push(self._detokenizer.push(token), self._hidden.get(token, ""))
                self.reasoning_tokens += is_thought or (self._parser is not None and self._parser.is_thinking)
        elif token in self.sequence.params.stop_token_ids:
            self.stop_reason = token

    def _push(self, piece: str, hidden: str = "") -> None:
        """Go on with the text, and with what is left out of it; a stop string counts from `min_tokens` on."""
        if len(self.token_ids) < self.sequence.params.min_tokens:
            self._show(piece)
            return
        self._show(self._stops.push(piece))
        if hidden:
            self._show(self._stops.push_hidden(hidden))
        if self._stops.matched is not None and self.sequence.params.include_stop_str_in_output:
            self._show(self._stops.matched)

    def _show(self, piece: str) -> None:
        self.text += piece if self._parser is None else self._parser.push(piece)

    def _spelled(self, logprobs: Logprobs) -> Logprobs:
        if self._text_of is not None:
            for token, logprob in logprobs.items():
                logprob.decoded_token = self._text_of(token)
        return logprobs

    def _close(self, reason: str | None) -> None:
        """End the answer: flush the text that detokenizer, stop filter and parser hold back."""
        if self._detokenizer is not None and self._stops.matched is None:
            self._push(self._detokenizer.finish())
            self._show(self._stops.finish())
        if self._is_over():  # a stop string takes precedence over "length"
            reason, self.stop_reason = "stop", self._stops.matched
        if self._parser is not None:
            self.text += self._parser.finish()
            reason = self._parser.finish_reason(reason)
        self.finish_reason = reason

    def answer(self) -> CompletionOutput:
        logprobs = self.logprobs if self.sequence.params.logprobs is not None else None
        return CompletionOutput(
            self.index, self.text, self.token_ids, logprobs, self.finish_reason, self.stop_reason, self.metrics,
            self.tool_calls, self.reasoning, self.reasoning_tokens,
        )  # fmt: skip

    def prompt_logprobs(self) -> list[Logprobs | None] | None:
        """Of each token of the prompt, where they were asked for; the first has none."""
        if self.sequence.params.prompt_logprobs is None:
            return None
        return [row and self._spelled(row) for row in self.sequence.prompt_logprobs]

    def raise_error(self) -> None:
        """Raise why this request failed, if it did."""
        if self.error is not None:
            raise self.error

    def has_chunk(self) -> bool:
        """Whether something has come since the last chunk."""
        return self.finished or len(self.token_ids) > self._sent.tokens

    def chunk(self) -> StreamChunk:
        """What has come since the last chunk."""
        sent, parser = self._sent, self._parser
        deltas = parser.tool_call_deltas if parser is not None else []
        num_calls, calls = parser.num_whole_calls if parser is not None else 0, list[ToolCall]()
        if num_calls > sent.calls or self.finished:  # a call is put together once, and not with each of its parts
            calls = self.tool_calls[sent.calls : None if self.finished else num_calls]
        self._sent = _Sent(
            len(self.text),
            len(self.token_ids),
            sent.calls + len(calls),
            len(deltas),
            len(self.reasoning),
            self.reasoning_tokens,
        )
        return StreamChunk(
            self.text[sent.text :],
            self.token_ids[sent.tokens :],
            self.logprobs[sent.tokens :] if self.sequence.params.logprobs is not None else None,
            self.finish_reason,
            replace(self.metrics, token_times=list(self.metrics.token_times)),
            self.index,
            self.stop_reason,
            calls,
            deltas[sent.deltas :],
            self.reasoning[sent.reasoning :],
            self.reasoning_tokens - sent.reasoning_tokens,
        )


def output(answers: list[RequestState], n: int, keeps_logprobs: bool) -> RequestOutput:
    """One prompt's answers in order; of more than n (best_of) the n likeliest, the best first."""
    first, outputs = answers[0], [request.answer() for request in answers]
    if len(outputs) > n:
        outputs = sorted(outputs, key=lambda answer: -(answer.cumulative_logprob or 0.0))[:n]
        for i, answer in enumerate(outputs):
            answer.index = i
            answer.logprobs = answer.logprobs if keeps_logprobs else None
    return RequestOutput(
        first.sequence.request_id,
        first.prompt,
        first.sequence.prompt_token_ids,
        outputs,
        all(request.finished for request in answers),
        first.metrics,
        first.prompt_logprobs(),
    )


def outputs_of(submitted: list[list[RequestState]], params: list[SamplingParams]) -> list[RequestOutput]:
    """The answers to several prompts; raises why one failed, as an IncompleteError where others have answers."""
    outputs = RequestOutputs(
        output(answers, one.n, one.logprobs is not None) for answers, one in zip(submitted, params, strict=True)
    )
    errors = [next((request.error for request in answers if request.error), None) for answers in submitted]
    failed = [i for i, error in enumerate(errors) if error is not None]
    if not failed:
        return outputs
    first = errors[failed[0]]
    assert first is not None
    if len(failed) == len(outputs):
        raise first
    raise IncompleteError(
        f"{len(failed)} of {len(outputs)} prompts failed, the first of them prompts[{failed[0]}]: "
        f"{str(first) or type(first).__name__} The others' answers are in this error's `outputs`.",
        outputs,
    ) from first
