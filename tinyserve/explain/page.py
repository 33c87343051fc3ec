"""The page of an explanation: one HTML document without external resources, assembled from this folder's files."""

import json
from base64 import b64encode
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyserve.explain.explanation import softmax

if TYPE_CHECKING:
    from tinyserve.explain.explanation import Array, Explanation, Guess

FOLDER = Path(__file__).parent
GUESSES = 5  # of each layer
MOST_POSITIONS = 128  # that can be clicked: the last ones


def page(explanation: "Explanation") -> str:
    """The HTML, with its style, its script and its numbers inside."""
    # Nothing in the numbers ends the element that they stand in, or begins a comment.
    numbers = json.dumps(shown(explanation), ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return template().replace("{numbers}", numbers)


@cache
def template() -> str:
    """The page, with {numbers} where they belong."""
    return (FOLDER / "page.html").read_text(encoding="utf-8")


def shown(explanation: "Explanation") -> dict[str, Any]:
    """What the page shows, as JSON has it: rounded, with heat maps as bytes in base64."""
    tokens = len(explanation.pieces)
    first = max(0, tokens - MOST_POSITIONS)
    return {
        "model": explanation.model,
        "pieces": explanation.pieces,
        "ids": explanation.prompt_token_ids,
        "first": first,
        "layers": [_layer(explanation, i) for i in range(len(explanation.layers))],
        "lens": [position(explanation, at) for at in range(first, tokens)],
        "sampling": [
            {
                "name": step.name,
                "value": step.value,
                "changed": step.changed,
                "removed": step.removed,
                "left": step.left,
                "likeliest": guesses(explanation.likeliest(step.probabilities, GUESSES)),
            }
            for step in explanation.sampling
        ],
        "costs": [cost._asdict() for cost in explanation.costs],
    }


def position(explanation: "Explanation", at: int) -> dict[str, Any]:
    """At one token: the stream's norm, and what each layer would answer."""
    probabilities = softmax(explanation.lens(at))
    return {
        "norms": [_rounded(norm) for norm in explanation.norms(at)],
        "guesses": [guesses(explanation.likeliest(row, GUESSES)) for row in probabilities],
    }


def guesses(likeliest: "list[Guess]") -> list[list[Any]]:
    """[text, probability] of each."""
    return [[guess.text, _rounded(guess.probability)] for guess in likeliest]


def _layer(explanation: "Explanation", i: int) -> dict[str, Any]:
    layer = explanation.layers[i]
    if layer.attention is not None:
        return {"kind": "attention", "heads": len(layer.attention), "weights": _bytes(layer.attention)}
    assert layer.decay is not None
    half_life = [_rounded(value) if np.isfinite(value) else None for value in explanation.half_life(i)]
    return {"kind": "mamba2", "heads": layer.decay.shape[1], "kept": _bytes(layer.decay.T), "half_life": half_life}


def _bytes(shares: "Array") -> str:
    """Shares from 0 to 1 as bytes, whose square roots they are: small ones can be told apart."""
    return b64encode(np.rint(255 * np.sqrt(shares)).astype(np.uint8).tobytes()).decode()


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
