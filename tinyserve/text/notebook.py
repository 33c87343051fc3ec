"""A stream in a notebook's cell: the answer grows where it stands."""

from collections.abc import Iterable
from html import escape
from time import monotonic

EVERY = 0.1  # seconds between two drawings


def show_stream(chunks: Iterable[object]) -> None:
    """Read a stream to its end, and show in the cell what there is of it; a cell that is interrupted keeps that."""
    from IPython.display import HTML, display

    handle, text, drawn = display(HTML(_html("")), display_id=True), "", 0.0
    try:
        for chunk in chunks:
            text += str(chunk)
            if (now := monotonic()) >= drawn + EVERY:
                handle.update(HTML(_html(text)))
                drawn = now
    finally:
        handle.update(HTML(_html(text)))


def _html(text: str) -> str:
    return f'<div style="white-space:pre-wrap;max-width:46rem">{escape(text)}</div>'
