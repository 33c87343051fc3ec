"""A stream of events that is gone on with by another replica, behind what the client has had.

Knows server-sent events as bytes; who sends them, and why another goes on, is for the caller.
"""

import hashlib
import json
from collections.abc import Iterator


class SeamError(Exception):
    """The events that are said anew are not those that were said: what follows cannot be joined to them."""


class Splice:
    """Passes a stream on in whole events, and after `begin_anew` drops as many as were passed, comparing their hash."""

    def __init__(self) -> None:
        self.count = 0  # events that were passed on, which comments are not
        self._hash = hashlib.sha256()
        self._again, self._seen = self._hash, 0
        self._rest = b""

    def begin_anew(self) -> None:
        """Expect the whole stream from its beginning."""
        self._again, self._seen, self._rest = hashlib.sha256(), 0, b""

    def take(self, data: bytes) -> bytes:
        """What goes to the client of the next bytes; raises SeamError."""
        return b"".join(self._new(data))

    def finish(self) -> None:
        """The stream has ended; raises SeamError where it is shorter than it was."""
        if self._seen < self.count or self._rest:
            raise SeamError

    def _new(self, data: bytes) -> Iterator[bytes]:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data:"):
                yield event + b"\n\n"  # a comment keeps the connection open
                continue
            if self._seen == self.count:
                self._hash.update(_what_is_said(event))
                self.count = self._seen = self.count + 1
                yield event + b"\n\n"
                continue
            self._again.update(_what_is_said(event))
            self._seen += 1
            if self._seen == self.count:
                if self._again.digest() != self._hash.digest():
                    raise SeamError
                self._again = self._hash


def _what_is_said(event: bytes) -> bytes:
    """An event without its usage: how much of a prompt was cached is another replica's own."""
    if b'"usage":{' in event:
        try:
            fields = json.loads(event.removeprefix(b"data:"))
            fields.pop("usage", None)
            event = json.dumps(fields).encode()
        except (ValueError, AttributeError):
            pass
    return event + b"\n\n"
