"""What a model makes of a text, as arrays: the residual stream, what each layer would answer, where its heads look.

Knows a model's face and its taps; how it is shown is told in terminal.py and page.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinyserve.explain.sampling_steps import SamplingStep
from tinyserve.explain.taps import LayerTap
from tinyserve.models.matrix import Matrix
from tinyserve.text.short_repr import ShortRepr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tinyserve.models.base import DecoderModel

Array = np.ndarray


class Guess(NamedTuple):
    """A token that could come next."""

    token_id: int
    text: str
    probability: float


class Cost(NamedTuple):
    """What one token costs in a part of the model, whatever the machine."""

    part: str  # "embedding", "layer 3 attention", "head"
    nbytes: int  # of weights that are read
    operations: int  # multiplications and additions with weights


@dataclass(eq=False, repr=False)
class Explanation(ShortRepr):
    """One forward pass over a prompt, and what follows from it; arrays are float32 unless they say otherwise.

    `stream[0]` is what the first layer reads, and `stream[i + 1]` is `stream[i]` and what layer i has added to it, its
    `mixer` and its `mlp`.
    """

    model: str
    prompt: str | None
    prompt_token_ids: list[int]
    pieces: list[str]
    """The text of each token."""
    stream: Array
    """(layers + 1, tokens, hidden): the residual stream."""
    layers: list[LayerTap] = field(repr=False)
    logits: Array
    """(tokens, vocab): what follows each token."""
    sampling: list[SamplingStep] = field(repr=False)
    """From the last token's logits to what the next one is drawn from."""
    costs: list[Cost] = field(repr=False)
    text_of: Callable[[int], str] = field(repr=False)
    read_out: Callable[[Array], Array] = field(repr=False)
    """The last norm and the head: hidden states (rows, hidden) -> logits (rows, vocab)."""

    def lens(self, position: int = -1) -> Array:
        """The logit lens: what the head says behind every layer at one token, (layers + 1, vocab).

        nostalgebraist 2020, "interpreting GPT: the logit lens". The first row is the embedding's, the last `logits`'.
        """
        return self.read_out(np.ascontiguousarray(self.stream[:, position]))

    def guesses(self, logits: Array, count: int = 5) -> list[Guess]:
        """The likeliest tokens of logits (vocab,), the likeliest first."""
        return self.likeliest(softmax(logits), count)

    def likeliest(self, probabilities: Array, count: int = 5) -> list[Guess]:
        """The likeliest tokens of a distribution (vocab,) that have any probability."""
        best = np.argsort(-probabilities, kind="stable")[:count]
        return [Guess(int(i), self.text_of(int(i)), float(probabilities[i])) for i in best if probabilities[i] > 0]

    def norms(self, position: int = -1) -> Array:
        """The length of the residual stream before, between and behind the layers, (layers + 1,)."""
        return np.asarray(np.linalg.norm(self.stream[:, position].astype(np.float64), axis=1))

    def half_life(self, layer: int) -> Array:
        """In how many tokens each head of a Mamba2 layer forgets half of its state, (heads,) float64; inf is never.

        Raises ValueError for an attention layer, which forgets nothing.
        """
        decay = self.layers[layer].decay
        if decay is None:
            raise ValueError(f"Layer {layer} is an attention layer: it keeps all tokens, and forgets none.")
        with np.errstate(divide="ignore"):
            kept = -np.log2(decay).mean(axis=0)  # halvings a token
            return np.asarray(1 / kept)

    def plot(self, layer: int | None = None) -> "Figure":
        """Draw where a layer's heads look, by default the last attention layer's, and what the layers would answer.

        A matplotlib figure (the extra `plot`): the probability of the likeliest next tokens behind each layer, and
        below it a heat map for each head; of a Mamba2 layer one, with the share of its state that each head keeps.
        """
        from tinyserve.explain.plot import plot

        return plot(self, self.last_attention if layer is None else layer)

    @property
    def last_attention(self) -> int:
        """The last layer with attention, or the last layer where there is none."""
        found = (i for i, layer in enumerate(self.layers) if layer.attention is not None)
        return max(found, default=len(self.layers) - 1)

    def _repr_html_(self) -> str:
        """What a notebook shows: the page, in a frame of its own."""
        from html import escape

        from tinyserve.explain.page import page

        return (
            f'<iframe srcdoc="{escape(page(self))}" sandbox="allow-scripts" title="explanation" '
            'style="width: 100%; height: 46rem; border: 1px solid #8884"></iframe>'
        )

    def html(self) -> str:
        """One page that needs nothing else: no server, no network."""
        from tinyserve.explain.page import page

        return page(self)


def softmax(logits: Array) -> Array:
    """logits (..., vocab) -> probabilities (..., vocab) float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def costs_of(model: "DecoderModel") -> list[Cost]:
    """The parts of a model in their order; of a mixture the experts that a token is sent to."""
    head = model.head.matrix
    row = model.embedding.matrix
    found = [Cost("embedding", row.nbytes // row.shape[0], 0)]
    for i, block in enumerate(model.blocks):
        kind = type(block.mixer).__name__.lower()
        for name, part in ((kind, block.mixer), (type(block.mlp).__name__.lower(), block.mlp)):
            matrices = list(_matrices(part))
            nbytes = sum(int(matrix.nbytes * share) for matrix, share in matrices)
            numbers = sum(int(np.prod(matrix.shape) * share) for matrix, share in matrices)
            found.append(Cost(f"layer {i} {name}", nbytes, 2 * numbers))
    return [*found, Cost("head", head.nbytes, 2 * int(np.prod(head.shape)))]


def _matrices(part: Any) -> Iterator[tuple[Matrix, float]]:
    """The matrices of a part of a layer, and the share of each that one token needs."""
    from tinyserve.models.layers import Experts, Linear

    for value in vars(part).values():
        if isinstance(value, Linear):
            yield value.matrix, 1.0
        elif isinstance(value, Experts):
            yield value.matrix, part.top_k / part.count
        elif hasattr(value, "up") and hasattr(value, "down"):  # the MLP that every token passes through
            yield from _matrices(value)
