"""What fronts and replicas say to each other: a request, and what comes back of its answer, piece by piece.

Plain data, which travels by pickle; nothing here knows HTTP, Ray or an engine.
"""

from typing import NamedTuple

from tinyserve.engine import EngineStats


class Call(NamedTuple):
    """A request as a front sends it on."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    answer: tuple[str, int] | None = None  # the number and the time of its answer, which the front has chosen


class Identity(NamedTuple):
    """Who has taken a request: the first that comes back of it."""

    name: str  # of the replica
    actor: str  # the name of its process with Ray
    fingerprint: str  # equal where the same bits are computed


class Began(NamedTuple):
    """The head of a response."""

    status: int
    headers: list[tuple[bytes, bytes]]


class Ended(NamedTuple):
    """The last of a response that is whole."""

    prompt_tokens: int
    output_tokens: int


class Report(NamedTuple):
    """What a replica is doing."""

    identity: Identity
    stats: EngineStats
    version: str  # of what it was told


# bytes are of the response's body, None is a beat: the replica lives and has nothing to say yet.
Item = Identity | Began | bytes | Ended | None
