"""Texts as vectors: the mean of a language model's last hidden states.

What a model has in mind when it reads a text; one that was trained for search says more of what a text is about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyserve.errors import TinyserveError

if TYPE_CHECKING:
    import numpy as np


@dataclass(eq=False)
class EmbeddingOutput:
    """A text and its vector (hidden,) float32."""

    prompt: str | None
    prompt_token_ids: list[int]
    embedding: "np.ndarray"


def sum_of(hidden: "np.ndarray") -> "np.ndarray":
    """hidden (tokens, hidden) -> (hidden,) float64, so that it does not matter where a text was cut."""
    import numpy as np

    return np.asarray(hidden.sum(axis=0, dtype=np.float64))


def mean_of(sums: Sequence["np.ndarray"], tokens: int, normalize: bool) -> "np.ndarray":
    """The mean over all tokens (hidden,) float32 from the sums of chunks; if asked for, of length 1.

    Raises TinyserveError where it is no number.
    """
    import numpy as np

    mean = np.sum(sums, axis=0) / tokens
    length = np.linalg.norm(mean)
    if not np.isfinite(length):
        raise TinyserveError("The model computed hidden states that are not numbers: its weights are damaged.")
    return np.asarray(mean / length if normalize and length > 0 else mean, np.float32)
