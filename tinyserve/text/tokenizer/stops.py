"""Stop strings in a stream: text that may be the beginning of one is held back until it is clear.

Knows text only; that a match ends a request is the caller's business.
"""

from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string, wherever the pieces are cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Take in a piece and return the text that is certain; after a match, nothing more comes."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            at, self.matched = min(found)
            self._held = ""
            return text[:at]
        held = max(longest_beginning(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text still held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def longest_beginning(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
