"""One request as the user sees it: the text so far, the pieces of a stream, the answer at the end.

Knows text and one sequence; it does not know when the next token comes, or that there are other requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tinyserve.errors import TinyserveError
from tinyserve.sequence import Metrics, Sequence
from tinyserve.tokenizer import Detokenizer
from tinyserve.tokenizer.stops import StopFilter


@dataclass
class CompletionOutput:
    """One answer. `finish_reason` is "stop" (an end token or a stop string), "length" or "abort".

    `stop_reason` is the stop string or the id among `stop_token_ids` that ended it, None for the model's own end.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Mapping[int, float]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """A prompt with its answers, and the times of the first."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: Metrics


@dataclass
class StreamChunk:
    """What came since the last chunk: printing the chunks one after the other prints the answer."""

    text: str
    token_ids: list[int]
    logprobs: list[Mapping[int, float]] | None
    finish_reason: str | None
    metrics: Metrics

    def __str__(self) -> str:
        return self.text


class Request:
    """A sequence in the engine, and its text as far as it is certain."""

    def __init__(self, sequence: Sequence, prompt: str | None, detokenizer: Detokenizer | None):
        self.sequence, self.prompt = sequence, prompt
        self._detokenizer = detokenizer
        self._stops = StopFilter(sequence.params.stop_strings)
        self.text = ""
        self.sent_text, self.sent_tokens = 0, 0  # what a stream has handed out
        self.stop_reason: str | int | None = None

    def advance(self) -> bool:
        """Take in the sequence's newest token; True when a stop string was completed by it."""
        sequence = self.sequence
        if self._detokenizer is None or sequence.finish_reason == "error":
            return False
        token = sequence.token_ids[-1]
        if sequence.finish_reason != "stop":  # the text of an end token is no part of the answer
            self.text += self._stops.push(self._detokenizer.push(token))
        elif token in sequence.params.stop_token_ids:
            self.stop_reason = token
        return self._matched()

    def close(self) -> None:
        """The sequence is finished: what was held back is certain now."""
        if self._detokenizer is not None:
            self.text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
            if self._matched():
                self.sequence.finish_reason = "stop"

    def _matched(self) -> bool:
        if self._stops.matched is not None:
            self.stop_reason = self._stops.matched
        return self._stops.matched is not None

    def answer(self, index: int = 0) -> CompletionOutput:
        sequence = self.sequence
        logprobs = sequence.logprobs if sequence.params.logprobs is not None else None
        return CompletionOutput(
            index, self.text, sequence.output_token_ids, logprobs, sequence.finish_reason, self.stop_reason
        )

    @property
    def finished(self) -> bool:
        return self.sequence.finish_reason is not None

    def raise_error(self) -> None:
        """Raise TinyserveError if this request failed."""
        if self.sequence.error is not None:
            raise TinyserveError(self.sequence.error)

    def has_news(self) -> bool:
        return self.sequence.finish_reason is not None or self.sequence.num_output > self.sent_tokens

    def chunk(self) -> StreamChunk:
        sequence, tokens = self.sequence, self.sequence.output_token_ids
        logprobs = sequence.logprobs[self.sent_tokens :] if sequence.params.logprobs is not None else None
        chunk = StreamChunk(
            self.text[self.sent_text :],
            tokens[self.sent_tokens :],
            logprobs,
            sequence.finish_reason,
            replace(sequence.metrics),
        )
        self.sent_text, self.sent_tokens = len(self.text), len(tokens)
        return chunk


def output(answers: list[Request]) -> RequestOutput:
    """All answers to one prompt."""
    first = answers[0].sequence
    return RequestOutput(
        first.request_id,
        answers[0].prompt,
        first.prompt_token_ids,
        [request.answer(i) for i, request in enumerate(answers)],
        all(request.finished for request in answers),
        first.metrics,
    )
