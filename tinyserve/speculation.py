"""Guesses at what comes next, for the model to check many at once: what followed the last few tokens before.

Ints only. A guess costs time and never changes a token: the engine keeps those that the model would have chosen.
Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from tinyserve.errors import UserError
from tinyserve.sequence import Sequence

MOST_SEQUENCES = 4  # beside more than these, a guess takes the room of a token that is sure
FIRST = 4  # tokens of a sequence's first guess
LONGEST_PAUSE = 64  # steps without a guess, after those that were all wrong


@dataclass
class _Text:
    """Where a sequence's n-grams have ended last, and how its guesses fare."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    length: int = 0  # tokens whose n-grams are known
    num_tokens: int = FIRST
    pause: int = 0
    waits: int = 0  # steps


class NgramProposer:
    """Prompt lookup: goes on as the text did where its last `shortest` to `longest` tokens stood before.

    A sequence's guesses grow to `num_tokens` while they are right; after wrong ones it waits, longer each time.
    """

    def __init__(self, num_tokens: int = 16, longest: int = 4, shortest: int = 2):
        self.num_tokens, self.longest, self.shortest = num_tokens, longest, shortest
        self._texts: WeakKeyDictionary[Sequence, _Text] = WeakKeyDictionary()

    def propose(self, sequence: Sequence, room: int) -> list[int]:
        """Up to `room` tokens that may follow; often none."""
        text = self._texts.setdefault(sequence, _Text())
        if text.waits:
            text.waits -= 1
            return []
        tokens = sequence.token_ids
        self._read(text, tokens)
        for n in range(self.longest, self.shortest - 1, -1):
            end = text.ends.get(tuple(tokens[-n:])) if len(tokens) > n else None
            if end is not None:
                guesses: list[int] = []
                for i in range(end, end + min(room, text.num_tokens)):  # past the end of the text, round and round
                    guesses.append(tokens[i] if i < len(tokens) else guesses[i - len(tokens)])
                return guesses
        return []

    def learn(self, sequence: Sequence, guessed: int, right: int) -> None:
        """So many of the guessed tokens were right."""
        text = self._texts.setdefault(sequence, _Text())
        if right == guessed:
            text.num_tokens, text.pause = min(2 * text.num_tokens, self.num_tokens), 0
        elif 2 * right < guessed:
            text.num_tokens = max(2, text.num_tokens // 2)
            text.pause = 0 if right else min(max(4, 2 * text.pause), LONGEST_PAUSE)
            text.waits = text.pause

    def _read(self, text: _Text, tokens: list[int]) -> None:
        """Note all n-grams but the last ones, which nothing has followed yet."""
        for end in range(max(text.length, self.shortest), len(tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                text.ends[tuple(tokens[end - n : end])] = end
        text.length = len(tokens)


def proposer_of(config: Mapping[str, Any] | None) -> NgramProposer | None:
    """What a `speculative_config`, under vLLM's names, asks for; raises UserError."""
    if config is None:
        return None
    defaults: dict[str, Any] = {
        "method": "ngram",
        "num_speculative_tokens": 16,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    if not isinstance(config, Mapping) or config.keys() - defaults.keys():
        raise UserError(f"speculative_config is {config!r:.200}; it is a mapping with {', '.join(defaults)}.")
    values = defaults | dict(config)
    if values["method"] != "ngram":
        raise UserError(f"speculative_config: method is {values['method']!r}; there is ngram.")
    for name in list(defaults)[1:]:
        if not isinstance(values[name], int) or isinstance(values[name], bool) or not 1 <= values[name] <= 64:
            raise UserError(f"speculative_config: {name} is {values[name]!r}; it must be a whole number from 1 to 64.")
    if values["prompt_lookup_min"] > values["prompt_lookup_max"]:
        raise UserError(
            f"speculative_config: prompt_lookup_min is {values['prompt_lookup_min']} and prompt_lookup_max "
            f"{values['prompt_lookup_max']}: the one cannot be above the other."
        )
    return NgramProposer(values["num_speculative_tokens"], values["prompt_lookup_max"], values["prompt_lookup_min"])
