"""Stop strings in a stream: text that may be the beginning of one is held back until it is clear.

Knows text only, and that some of it is hidden; that a match ends a request is the caller's business.
"""

from bisect import bisect_left
from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string, wherever the pieces are cut.

    The text of a special token is hidden: it never comes out, and only stop strings that name such a token see it.
    """

    def __init__(self, stops: Sequence[str], hidden: Sequence[str] = ()) -> None:
        """`hidden` are the texts that `push_hidden` may be given."""
        self._stops = {stop: any(text in stop for text in hidden) for stop in stops}  # whether it sees what is hidden
        self._held = ""
        self._shown: list[bool] = []  # of each character held
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Take in a piece and return the text that is certain; after a match, nothing more comes."""
        return self._push(piece, is_shown=True) if self._stops else piece

    def push_hidden(self, piece: str) -> str:
        """Take in the text of a token that is left out of the answer; returns what has become certain before it."""
        return self._push(piece, is_shown=False)

    def finish(self) -> str:
        """The text still held back: no stop string came of it."""
        text = _visible(self._held, self._shown)
        self._held, self._shown = "", []
        return text

    def _push(self, piece: str, is_shown: bool) -> str:
        if self.matched is not None:
            return ""
        full, shown = self._held + piece, self._shown + [is_shown] * len(piece)
        everywhere = list(range(len(full)))
        places, visible = everywhere, full
        if not all(shown):
            places, visible = [i for i in everywhere if shown[i]], _visible(full, shown)
        found, keep = [], len(full)
        for stop, sees_hidden in self._stops.items():
            text, at = (full, everywhere) if sees_hidden else (visible, places)
            if stop in text:
                found.append((at[text.find(stop)], stop))
            elif begun := longest_beginning(text, stop):
                keep = min(keep, at[len(text) - begun])
        if found:
            keep, self.matched = min(found)
        self._held, self._shown = ("", []) if found else (full[keep:], shown[keep:])
        return visible[: bisect_left(places, keep)]


def _visible(text: str, shown: Sequence[bool]) -> str:
    return "".join(character for character, is_shown in zip(text, shown, strict=True) if is_shown)


def longest_beginning(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
