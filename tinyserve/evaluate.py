"""What fewer bits cost: perplexity, and how far one model's predictions are from another's, on the same text.

Works on logits and token ids; it does not know how the numbers behind them are kept. Sums are in float64: the
differences of interest are thousandths of a nat.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinyserve.errors import UserError

if TYPE_CHECKING:
    from tinyserve.llm import LLM

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


def compare(reference: "LLM", other: "LLM", token_ids: Sequence[int], window: int = 1024) -> Comparison:
    """Predict every token of a text but the first with both models, from at most `window` tokens before it.

    The text is cut into windows that know nothing of each other, so that memory holds the logits of one window of
    each model. Raises UserError if the models' vocabularies differ, or if there is nothing to predict.
    """
    if (ours := other.config.vocab_size) != (theirs := reference.config.vocab_size):
        raise UserError(
            f"{other.name} has {ours} tokens and {reference.name} {theirs}: models of one vocabulary can be compared."
        )
    if len(token_ids) < 2 or window < 1:
        raise UserError(f"A comparison needs 2 or more tokens, not {len(token_ids)}, and a window of 1, not {window}.")
    window = min(window, reference.max_model_len, other.max_model_len)
    counts, means = [], []
    for start in range(0, len(token_ids) - 1, window):
        ids = list(token_ids[start : start + window + 1])
        counts.append(len(ids) - 1)
        means.append(_differences(reference.logits(ids[:-1]), other.logits(ids[:-1]), ids[1:]))
    entropy_reference, entropy, kl, top1 = map(float, np.average(means, axis=0, weights=counts))
    return Comparison(sum(counts), float(np.exp(entropy_reference)), float(np.exp(entropy)), kl, top1)


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
