"""What a runner keeps of what was sampled: accepted draft tokens, as far as the grammar goes."""

from tinyserve.model_runner import accept_draft, advance_grammar
from tinyserve.scheduling.sequence import Sampled


def tokens(*ids: int) -> list[Sampled]:
    return [Sampled(token) for token in ids]


def test_draft_tokens_are_accepted_up_to_the_first_rejection() -> None:
    assert accept_draft([], []) == [], "the prompt is not finished"
    assert accept_draft([], tokens(5)) == tokens(5)
    assert accept_draft([5, 6], tokens(5, 6, 7)) == tokens(5, 6, 7), "all of them, and the one behind"
    assert accept_draft([5, 6], tokens(5, 8, 7)) == tokens(5, 8), "what is behind a rejection was computed for nothing"
    assert accept_draft([5, 6], tokens(4, 6, 7)) == tokens(4)


def test_an_error_behind_a_draft_token_is_left_to_the_next_step() -> None:
    """What is not a number behind draft tokens may be another number without them."""
    broken = Sampled(-1, error="no number")
    assert accept_draft([5, 6], [Sampled(5), broken, broken]) == tokens(5)
    assert accept_draft([5], [broken, Sampled(6)]) == [broken]


class Grammar:
    """Gives up behind some tokens."""

    def __init__(self, patience: int):
        self.patience, self.said, self.error = patience, list[int](), None

    def advance(self, token: int) -> None:
        self.said.append(token)
        if len(self.said) > self.patience:
            self.error = "no text matches it"


def test_a_grammar_takes_in_what_it_allows() -> None:
    grammar = Grammar(9)
    assert advance_grammar(grammar, tokens(5, 6)) == tokens(5, 6) and grammar.said == [5, 6]
    assert advance_grammar(grammar, []) == []
    broken = Sampled(-1, error="no number")
    assert advance_grammar(grammar, [broken]) == [broken] and grammar.said == [5, 6]
    assert advance_grammar(Grammar(1), tokens(5, 6, 7)) == tokens(5)
    assert advance_grammar(Grammar(0), tokens(5, 6)) == [Sampled(-1, error="no text matches it", is_request_error=True)]
