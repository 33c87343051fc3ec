"""Streams that another replica goes on with: cut anywhere, said anew, compared."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyserve.fleet.splice import SeamError, Splice

pytestmark = pytest.mark.fast

EVENTS = st.lists(
    st.text("ab\n\u2028", max_size=4).map(lambda text: f"data: {json.dumps(text)}\n\n".encode()), max_size=8
)
COMMENT = b": prefill 3/9\n\n"


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Bytes as a network may bring them."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(places)]


@given(EVENTS, st.lists(st.integers(0, 200), max_size=6), st.lists(st.integers(0, 200), max_size=3))
def test_a_stream_that_is_cut_anywhere_arrives_once(events: list[bytes], cuts: list[int], deaths: list[int]) -> None:
    whole, splice, got = b"".join(events), Splice(), b""
    for death in deaths:  # each says the stream from its beginning, up to somewhere
        for piece in pieces(whole[: death % (len(whole) + 1)], cuts):
            got += splice.take(piece)
        assert whole.startswith(got) and (not got or got.endswith(b"\n\n"))
        splice.begin_anew()
    for piece in pieces(whole, cuts):
        got += splice.take(piece)
    splice.finish()
    assert got == whole and splice.count == len(events)


@given(EVENTS.filter(bool), st.data())
def test_other_events_are_never_joined(events: list[bytes], data: st.DataObject) -> None:
    said = data.draw(st.integers(1, len(events)))
    changed = data.draw(st.integers(0, said - 1))
    splice = Splice()
    splice.take(b"".join(events[:said]))
    splice.begin_anew()
    other = [*events[:changed], b'data: "something else"\n\n', *events[changed + 1 :]]
    with pytest.raises(SeamError):
        splice.take(b"".join(other))


def test_a_stream_that_is_shorter_the_second_time_is_refused() -> None:
    splice = Splice()
    splice.take(b"data: 1\n\ndata: 2\n\n")
    splice.begin_anew()
    assert splice.take(b"data: 1\n\n") == b""
    with pytest.raises(SeamError):
        splice.finish()


def test_comments_pass_and_do_not_count() -> None:
    splice = Splice()
    assert splice.take(COMMENT + b"data: 1\n\n" + COMMENT) == COMMENT + b"data: 1\n\n" + COMMENT
    splice.begin_anew()
    assert splice.take(b": waiting\n\ndata: 1\n\ndata: 2\n\n") == b": waiting\n\ndata: 2\n\n"
    assert splice.count == 2


def test_half_an_event_is_not_sent() -> None:
    splice = Splice()
    assert splice.take(b"data: 1\n\ndata: tw") == b"data: 1\n\n"
    splice.begin_anew()
    assert splice.take(b"data: 1\n\ndata: two\n\n") == b"data: two\n\n"


def test_how_much_was_cached_may_differ() -> None:
    def end(cached: int) -> bytes:
        usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": cached}}
        return b"data: " + json.dumps({"choices": [], "usage": usage}, separators=(",", ":")).encode() + b"\n\n"

    splice = Splice()
    splice.take(b"data: 1\n\n" + end(0))
    splice.begin_anew()
    assert splice.take(b"data: 1\n\n" + end(8) + b"data: [DONE]\n\n") == b"data: [DONE]\n\n"
