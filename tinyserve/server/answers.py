"""Usage and log-probabilities in OpenAI's form, from the engine's metrics, tokens and logprobs."""

from collections.abc import Sequence as SequenceOf
from typing import Any

from tinyserve.scheduling.sequence import Logprob, Logprobs, Metrics
from tinyserve.text.request import StreamChunk
from tinyserve.text.tokenizer import Detokenizer, Tokenizer


def usage(metrics: Metrics, output_tokens: int, reasoning_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's usage of one prompt: how many of its tokens were in the cache, and of the answer's were thinking."""
    thought = {"completion_tokens_details": {"reasoning_tokens": reasoning_tokens}} if reasoning_tokens else {}
    return {
        "prompt_tokens": metrics.prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": metrics.prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": metrics.cached_tokens},
        **thought,
    }


def total(usages: SequenceOf[dict[str, Any]]) -> dict[str, Any]:
    """The usage of several prompts."""
    keys = ("prompt_tokens", "completion_tokens", "total_tokens")
    cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usages)
    return {key: sum(one[key] for one in usages) for key in keys} | {"prompt_tokens_details": {"cached_tokens": cached}}


class UsageCounter:
    """Adds up the chunks of one prompt's answers."""

    def __init__(self) -> None:
        self._tokens, self._reasoning_tokens, self._metrics = 0, 0, Metrics()
        self._seen: set[int] = set()

    def is_first(self, chunk: StreamChunk) -> bool:
        """Count a chunk; returns whether it is its answer's first."""
        self._tokens += len(chunk.token_ids)
        self._reasoning_tokens += chunk.reasoning_tokens
        self._metrics = chunk.metrics
        first = chunk.index not in self._seen
        self._seen.add(chunk.index)
        return first

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage of all of them."""
        return usage(self._metrics, self._tokens, self._reasoning_tokens)


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: SequenceOf[int], rows: SequenceOf[Logprobs], count: int
) -> dict[str, Any]:
    """Of each token: itself, and the `count` likeliest."""
    content = []
    for token, row in zip(token_ids, rows, strict=True):
        likeliest = [item for item in row.items() if item[1].rank <= count]
        tops = [_token(tokenizer, *item) for item in likeliest]
        content.append({**_token(tokenizer, token, row[token]), "top_logprobs": tops})
    return {"content": content, "refusal": None}


def _token(tokenizer: Tokenizer, token: int, logprob: Logprob) -> dict[str, Any]:
    spelled = list(tokenizer.token_bytes(token, skip_special_tokens=False))
    return {"token": logprob.decoded_token or "", "logprob": _finite(logprob), "bytes": spelled}


class TextOffsets:
    """Where in a text each of its tokens begins, in characters; one with the rest of a character, where that begins."""

    def __init__(self, detokenizer: Detokenizer | None, start: int = 0):
        self._detokenizer, self._at = detokenizer, start

    def of(self, tokens: SequenceOf[int]) -> list[int]:
        """The places of the next tokens."""
        places = []
        for token in tokens:
            places.append(max(0, self._at))
            if self._detokenizer is not None:
                self._at += len(self._detokenizer.push(token))
        return places


def completion_logprobs(
    tokens: SequenceOf[tuple[int, Logprobs | None]], names: SequenceOf[str], count: int, places: SequenceOf[int]
) -> dict[str, Any]:
    """The older form: four lists, as long as there are tokens, whose `places` in the text are the last.

    A prompt's first token has no log-probability: nothing is before it.
    """
    chosen: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token, row in tokens:
        if row is None:
            chosen.append(None)
            tops.append(None)
            continue
        chosen.append(_finite(row[token]))
        top: dict[str, float] = {}
        for other, logprob in row.items():
            if logprob.rank <= count or other == token:  # of two with one text, the likelier stays
                top.setdefault(logprob.decoded_token or "", _finite(logprob))
        tops.append(top)
    return {"tokens": list(names), "token_logprobs": chosen, "top_logprobs": tops, "text_offset": list(places)}


def _finite(logprob: float) -> float:
    """JSON has no infinities: a token that could not be drawn has OpenAI's -9999."""
    return max(float(logprob), -9999.0)
