"""What a step costs and how many draft tokens pay: estimates from the engine's own steps, ints and floats only.

With draft tokens each accepted with probability p_i where those before it were, a step with k of them brings

    T(k) = 1 + p_1 + p_1 p_2 + ... + p_1 ... p_k

tokens on average, and takes 1 + c(k) times as long as one without. `best_draft_length` is the k with the largest
T(k) / (1 + c(k)). The p_i are moving averages of what was accepted; c(k) is from `StepCostModel`.
"""

from collections.abc import Iterable, Iterator
from itertools import count

EMA_DECAY = 0.95
MAX_SAMPLE_TOKENS = 128  # larger steps are prefill, and say nothing about the cost of draft tokens
ASSUMED_TOKEN_COST = 0.25  # of another token, as a share of a step of one, as long as nothing was measured


class EMA:
    """An exponential moving average: each new sample weighs 1, and all before it EMA_DECAY times what they did."""

    def __init__(self, prior: float, weight: float = 6.0):
        """`prior` is the value before there are samples, and counts as much as `weight` of them."""
        self._sum, self._weight = prior * weight, weight

    @property
    def value(self) -> float:
        return self._sum / self._weight

    def update(self, sample: float) -> None:
        self._sum = EMA_DECAY * self._sum + sample
        self._weight = EMA_DECAY * self._weight + 1

    def update_acceptance(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """A sample of 1 for each accepted draft token, and of 0 for the first rejected; none for those behind it."""
        for is_accepted in [1.0] * num_accepted_tokens + [0.0] * (num_accepted_tokens < num_draft_tokens):
            self.update(is_accepted)


class StepCostModel:
    """The seconds of a step of n tokens: (mean + slope · (n - mean n)) · factor(n).

    Means and slope are those of a linear regression in which samples decay by EMA_DECAY; factor(n) is the EMA of
    measured over predicted by the line, because kernels work on several rows at a time: 2 may take as long as 3.
    """

    def __init__(self) -> None:
        self._mean_tokens = self._mean_seconds = self._variance = self._covariance = 0.0
        self._factors: dict[int, EMA] = {}

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """Add a sample. One far from the prediction is clipped to twice that: something else had the processor."""
        if num_tokens > MAX_SAMPLE_TOKENS:
            return
        predicted = self.predict(num_tokens)
        if not self._mean_tokens or 2 * seconds < predicted:  # it was the samples before that were disturbed
            self._mean_tokens, self._mean_seconds = float(num_tokens), seconds
            self._variance = self._covariance = 0.0
            self._factors = {}
            return
        seconds = min(seconds, 2 * predicted)
        more, longer = num_tokens - self._mean_tokens, seconds - self._mean_seconds
        self._mean_tokens += (1 - EMA_DECAY) * more
        self._mean_seconds += (1 - EMA_DECAY) * longer
        self._variance = EMA_DECAY * (self._variance + (1 - EMA_DECAY) * more * more)
        self._covariance = EMA_DECAY * (self._covariance + (1 - EMA_DECAY) * more * longer)
        self._factors.setdefault(num_tokens, EMA(1.0, 2.0)).update(seconds / self._linear(num_tokens))

    def predict(self, num_tokens: int) -> float:
        """The seconds of a step of so many tokens; 0 as long as there is no sample."""
        factor = self._factors.get(num_tokens)
        return self._linear(num_tokens) * (factor.value if factor else 1.0)

    def _linear(self, num_tokens: int) -> float:
        # ASSUMED_TOKEN_COST until the variance outweighs it; at least a tenth of the mean.
        assumed = self._mean_seconds * ASSUMED_TOKEN_COST / (1 + ASSUMED_TOKEN_COST * (self._mean_tokens - 1))
        slope = max(0.0, (self._covariance + assumed) / (self._variance + 1))
        return max(0.1 * self._mean_seconds, self._mean_seconds + slope * (num_tokens - self._mean_tokens))


def draft_costs(model: StepCostModel, num_tokens: int, token_seconds: float) -> Iterator[float]:
    """What 1, 2, ... draft tokens cost beside `num_tokens` others, in units of `token_seconds`."""
    for drafts in count(1):
        if token_seconds:
            yield (model.predict(num_tokens + drafts) - model.predict(num_tokens)) / token_seconds
        else:
            yield ASSUMED_TOKEN_COST * drafts


def best_draft_length(acceptance: Iterable[float], costs: Iterable[float]) -> int:
    """The number k of draft tokens with the most tokens for their time; 0 where none is faster.

    acceptance: p_1, p_2, ...: that each is accepted where those before it were; costs: c(1), c(2), ... of so many in
    all (see the top of this file). The shorter of the two bounds k.
    """
    tokens = best = accepted = 1.0
    length = 0
    for i, (probability, cost) in enumerate(zip(acceptance, costs, strict=False)):
        accepted *= probability
        tokens += accepted
        if tokens > best * (1 + cost):
            best, length = tokens / (1 + cost), i + 1
    return length
