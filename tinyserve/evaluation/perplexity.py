"""What fewer bits cost: perplexity, and how far one model's predictions are from another's, on the same text.

Works on logits and token ids; it does not know how the numbers behind them are kept. Sums are in float64: the
differences of interest are thousandths of a nat.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinyserve.errors import UserError
from tinyserve.progress import Progress, renamed, silent

if TYPE_CHECKING:
    from tinyserve.llm import LLM
    from tinyserve.loading import ModelFiles

Array = np.ndarray
ROWS = 16  # positions in float64 at a time: 6 MB for a vocabulary of 49,152


@dataclass(frozen=True)
class Comparison:
    """A model beside its reference, on `tokens` predicted tokens of a text."""

    tokens: int
    perplexity_reference: float
    perplexity: float
    kl: float  # nats a token
    top1: float  # the share of tokens, 0 to 1

    @property
    def perplexity_change(self) -> float:
        """How much higher the perplexity is, as a fraction of the reference's."""
        return self.perplexity / self.perplexity_reference - 1


@dataclass(frozen=True)
class Text:
    """A text in a model's tokens, all but the first of which are predicted."""

    token_ids: list[int]
    num_bytes: int  # of the predicted tokens, in UTF-8; special tokens have none, a space put before the text has one

    @classmethod
    def encode(cls, files: "ModelFiles", text: str, limit: int | None = None) -> "Text":
        """The first `limit` tokens of `text`; raises UserError when that leaves nothing to predict."""
        if files.tokenizer is None:
            raise UserError(f"{files.name} has synthetic weights and no tokenizer: there is no text it could read.")
        token_ids = files.tokenizer.encode(text)[:limit]
        num_bytes = sum(len(files.tokenizer.token_bytes(token)) for token in token_ids[1:])
        if num_bytes == 0:
            raise UserError(
                f"The text comes to {len(token_ids)} token{'s' * (len(token_ids) != 1)} of {files.name}, and the first "
                f"is not predicted: give a text with 2 or more that are not special."
            )
        return cls(token_ids, num_bytes)


@dataclass(frozen=True)
class Row:
    """What one dtype makes of a text; the last three are None for the reference itself, and where there is none."""

    dtype: str
    perplexity: float
    bits_per_byte: float  # cross entropy of all predicted tokens in bits, over their bytes
    perplexity_change: float | None = None
    kl: float | None = None  # nats a token
    top1: float | None = None


def run(
    load: Callable[[str], "LLM"],
    text: Text,
    dtypes: Sequence[str],
    reference: str | None = "float32",
    window: int = 1024,
    progress: Progress = silent,
) -> Iterator[Row]:
    """Evaluate a model in each of `dtypes`, loading one after the other; the reference comes first and stays.

    At most two models are in memory, and the logits of a window of each. `progress` hears of the dtype that is being
    evaluated, of the tokens done and of all. Raises UserError as `compare` does.
    """

    def row(dtype: str, perplexity: float, *differences: float) -> Row:
        entropy = math.log2(perplexity) * (len(text.token_ids) - 1)
        return Row(dtype, perplexity, entropy / text.num_bytes, *differences)

    def load_next(dtype: str) -> "LLM":
        gc.collect()  # nobody names the model before this one, but it may be part of a cycle
        return load(dtype)

    names = list(dict.fromkeys(dtypes))
    if reference is None or names == [reference]:
        for dtype in names:
            yield row(dtype, perplexity_of(load_next(dtype), text.token_ids, window, renamed(progress, dtype)))
        return
    model, others = load(reference), [dtype for dtype in names if dtype != reference]
    for dtype in others:
        got = compare(model, load_next(dtype), text.token_ids, window, renamed(progress, dtype))
        if dtype == others[0]:
            yield row(reference, got.perplexity_reference)
        yield row(dtype, got.perplexity, got.perplexity_change, got.kl, got.top1)


def perplexity_of(llm: "LLM", token_ids: Sequence[int], window: int = 1024, progress: Progress = silent) -> float:
    """The perplexity of a text's tokens but the first, each predicted from at most `window` tokens before it."""
    windows = _windows([llm], token_ids, window, progress)
    total = sum(cross_entropy(llm.logits(ids), targets) * len(ids) for ids, targets in windows)
    return float(np.exp(total / (len(token_ids) - 1)))


def compare(
    reference: "LLM",
    other: "LLM",
    token_ids: Sequence[int],
    window: int = 1024,
    progress: Progress = silent,
) -> Comparison:
    """Predict every token of a text but the first with both models, from at most `window` tokens before it.

    The text is cut into windows that know nothing of each other, so that memory holds the logits of one window of
    each model; `progress` hears ("evaluate", tokens done, tokens in all) before the first and after each. Raises
    UserError if the models' vocabularies differ, or if there is nothing to predict.
    """
    if (ours := other.config.vocab_size) != (theirs := reference.config.vocab_size):
        raise UserError(
            f"{other.name} has {ours} tokens and {reference.name} {theirs}: models of one vocabulary can be compared."
        )
    counts, means = [], []
    for ids, targets in _windows([reference, other], token_ids, window, progress):
        counts.append(len(ids))
        means.append(_differences(reference.logits(ids), other.logits(ids), targets))
    entropy_reference, entropy, kl, top1 = map(float, np.average(means, axis=0, weights=counts))
    return Comparison(sum(counts), float(np.exp(entropy_reference)), float(np.exp(entropy)), kl, top1)


def _windows(
    models: Sequence["LLM"], token_ids: Sequence[int], window: int, progress: Progress
) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of each window that all models can read, and the ones that came after each."""
    if len(token_ids) < 2 or window < 1:
        raise UserError(f"An evaluation needs 2 or more tokens, not {len(token_ids)}, and a window of 1, not {window}.")
    if (largest := max(token_ids)) >= (size := models[0].config.vocab_size):
        raise UserError(f"Token id {largest} is outside {models[0].name}'s vocabulary of {size}.")
    window, total = min(window, *(model.max_model_len for model in models)), len(token_ids) - 1
    progress("evaluate", 0, total)
    for start in range(0, total, window):
        ids = list(token_ids[start : start + window + 1])
        yield ids[:-1], ids[1:]
        progress("evaluate", start + len(ids) - 1, total)


def _differences(reference_logits: Array, logits: Array, targets: list[int]) -> tuple[float, float, float, float]:
    """Both cross entropies, the divergence and the agreement over one window."""
    return (
        cross_entropy(reference_logits, targets),
        cross_entropy(logits, targets),
        kl_divergence(reference_logits, logits),
        top1_agreement(reference_logits, logits),
    )


def perplexity(logits: Array, token_ids: Sequence[int]) -> float:
    """The perplexity of a text (tokens,) of two tokens or more by its own logits (tokens, vocab)."""
    return float(np.exp(cross_entropy(logits[:-1], token_ids[1:])))


def cross_entropy(logits: Array, targets: Sequence[int]) -> float:
    """The mean of -log p(target) in nats, for logits (positions, vocab) and the token that came at each."""
    ids = np.asarray(targets, np.int64)
    total = 0.0
    for rows in _chunks(logits, ids):
        log_p = _log_softmax(logits[rows])
        total -= float(np.take_along_axis(log_p, ids[rows, None], axis=1).sum())
    return total / len(logits)


def kl_divergence(reference_logits: Array, logits: Array) -> float:
    """The mean over positions of KL(reference ‖ other) = Σ p · (log p - log q) in nats; both are (positions, vocab)."""
    total = 0.0
    for rows in _chunks(reference_logits, logits):
        log_p, log_q = _log_softmax(reference_logits[rows]), _log_softmax(logits[rows])
        total += float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return total / len(logits)


def top1_agreement(reference_logits: Array, logits: Array) -> float:
    """The share of positions at which both (positions, vocab) find the same token likeliest."""
    return float(np.mean(reference_logits.argmax(axis=1) == logits.argmax(axis=1)))


def _chunks(a: Array, b: Array) -> Iterator[slice]:
    """Slices of a few rows each, over two arrays of one length."""
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"there are {len(a)} and {len(b)} positions; they must be as many, and at least one")
    return (slice(start, start + ROWS) for start in range(0, len(a), ROWS))


def _log_softmax(logits: Array) -> Array:
    """(positions, vocab) -> log probabilities, float64; the largest logit is taken off first, so nothing overflows."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
