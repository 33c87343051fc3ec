"""Stop strings: the text before the first of them comes out, wherever it is cut, and whatever is hidden in it."""

import random

import pytest

from tinyserve.text.tokenizer.stops import StopFilter

pytestmark = pytest.mark.fast


def through(stops: list[str], pieces: list[str], hidden: tuple[str, ...] = ("<x>", "<y>")) -> tuple[str, str | None]:
    """What comes out of pieces, of which those among `hidden` are hidden, and the stop string that was found."""
    filter = StopFilter(stops, hidden)
    text = "".join(filter.push_hidden(piece) if piece in hidden else filter.push(piece) for piece in pieces)
    return text + filter.finish(), filter.matched


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["<x>"], ["a", "<x>", "b"], ("a", "<x>")),
        (["<x>\n"], ["a", "<x>", "\nb"], ("a", "<x>\n")),
        (["\n<x>"], ["a", "\n", "<x>"], ("a", "\n<x>")),
        (["\n<x>"], ["a", "\n", "b", "<x>"], ("a\nb", None)),
        (["<x><y>"], ["a", "<x>", "b", "<x>", "<y>"], ("ab", "<x><y>")),
        (["<x>\n"], ["a", "<x>", "b"], ("ab", None)),
        (["ab"], ["a", "<x>", "b"], ("", "ab")),  # it does not name the token, and sees the text without it
        (["ab", "<x>b"], ["a", "<x>", "b"], ("", "ab")),
        (["ab", "<x>c"], ["a", "<x>", "c"], ("a", "<x>c")),
        (["<x>"], ["a<", "x>b"], ("a", "<x>")),  # the letters of it, written out
        ([], ["a", "b"], ("ab", None)),
    ],
)
def test_a_stop_string_that_names_a_hidden_token_sees_it(
    stops: list[str], pieces: list[str], expected: tuple[str, str | None]
) -> None:
    assert through(stops, pieces) == expected


def test_nothing_is_lost_and_nothing_hidden_comes_out() -> None:
    generator = random.Random(0)
    for _ in range(3000):
        stops = ["".join(generator.choices(["a", "b", "<x>"], k=generator.randint(1, 3))) for _ in range(2)]
        hidden = ("<x>",) if any("<x>" in stop for stop in stops) else ()
        pieces = generator.choices(["a", "b", "ab", "", *hidden], k=generator.randint(0, 8))
        full = "".join(pieces)
        # As a whole: the earliest match in the text that each stop string sees, counted in characters that are shown.
        shown = full.replace("<x>", "")
        ends = [shown.find(stop) if "<x>" not in stop else full.find(stop) for stop in stops]
        ends = [
            len(full[:at].replace("<x>", "")) if "<x>" in stop and at >= 0 else at
            for stop, at in zip(stops, ends, strict=True)
        ]
        found = [at for at in ends if at >= 0]
        text, matched = through(stops, pieces, hidden)
        assert (matched is not None) == bool(found)
        assert shown.startswith(text) and (found or text == shown) and len(text) >= min(found, default=0)
