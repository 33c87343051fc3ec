"""An explanation as a figure of matplotlib's. Knows how to draw; which arrays there are is told in explanation.py."""

from typing import TYPE_CHECKING

from tinyserve.errors import UserError
from tinyserve.explain.explanation import softmax
from tinyserve.text.glass_box import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tinyserve.explain.explanation import Explanation

GUESSES = 5  # lines of the logit lens
BESIDE = 6  # heads in a row


def plot(told: "Explanation", layer: int) -> "Figure":
    """The figure of `Explanation.plot`; raises UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("A figure needs matplotlib: pip install 'tinyserve[plot]'.") from None
    weights, decay = told.layers[layer].attention, told.layers[layer].decay
    heads = 1 if weights is None else len(weights)
    rows = -(-heads // BESIDE)
    figure = Figure(figsize=(9, 3.4 + 1.7 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, min(heads, BESIDE), height_ratios=[2, *[1] * rows])
    _lens(told, figure.add_subplot(grid[0, :]))
    words = [visible(piece) for piece in told.pieces]
    if weights is None:
        assert decay is not None
        axes = figure.add_subplot(grid[1, :])
        axes.imshow(decay.T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set(title=f"layer {layer}, Mamba2: share of its state that each head keeps", ylabel="head")
        axes.set_xticks(range(len(words)), words, rotation=90)
        return figure
    for head in range(heads):
        axes = figure.add_subplot(grid[1 + head // BESIDE, head % BESIDE])
        axes.imshow(weights[head], vmin=0, vmax=1, cmap="viridis")
        axes.set_title(f"layer {layer}, head {head}", fontsize="small")
        is_first = head % BESIDE == 0
        axes.set_yticks(range(len(words)) if is_first else [], words if is_first else [], fontsize="x-small")
        axes.set_xticks([])
    return figure


def _lens(told: "Explanation", axes: "Axes") -> None:
    """The probability of the likeliest next tokens behind each layer."""
    probabilities = softmax(told.lens())
    for guess in told.likeliest(probabilities[-1], GUESSES):
        axes.plot(probabilities[:, guess.token_id], marker=".", label=repr(guess.text))
    names = ["emb.", *map(str, range(len(told.layers)))]
    every = max(1, len(names) // 16)
    axes.set_xticks(range(0, len(names), every), names[::every])
    axes.set(title=f"What would follow {''.join(told.pieces)[-40:]!r}", xlabel="behind layer", ylabel="probability")
    axes.legend(fontsize="small")
