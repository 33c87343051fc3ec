"""Guesses at what comes next, for the model to check many at once: what followed the last few tokens before.

Ints only. A guess costs time and never changes a token: the engine keeps those that the model would have chosen.
How many are tried is weighed by how often they were right, and by how long steps took.
Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from itertools import count
from time import perf_counter
from typing import Any, Protocol

from tinyserve.errors import UserError
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.sequence import Scheduled, Sequence

MOST_SEQUENCES = 8  # that guess in a step, of models that have states: each has a second one meanwhile
MOST_TOKENS = 64  # that `num_speculative_tokens` can be
MEMORY = 0.95  # of what was seen before, when one more thing is
LIKELY = (0.15, 0.35, 0.5, 0.65, 0.72, 0.78)  # that a text goes on as it did behind the same 1, 2, ... tokens
MOST_DEMANDED = 16  # guesses that a structure demands, such as the keys of an object
MOST_ROWS = 128  # of a step that says what guesses cost: longer ones read prompts


class Proposer(Protocol):
    """Who guesses. It may remember what it likes of a sequence until it is told to forget it."""

    def propose(self, sequences: list[Sequence], rooms: list[int]) -> list[list[int]]:
        """For each of those that decode in this step, up to so many tokens that may follow; often none."""

    def learn(self, sequence: Sequence, guessed: int, right: int) -> None:
        """So many of the sequence's guesses were checked, and so many of them, from the first on, were right."""

    def measure(self, rows: int, seconds: float) -> None:
        """The model's step of so many tokens, guesses among them, took so long, without what `propose` took."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence does not run any more; it may come back."""


class Average:
    """What something has been, the latest most."""

    def __init__(self, expected: float, weight: float = 6.0):
        """`weight`: how many would have to be seen to count as much as what was expected."""
        self._sum, self._weight = expected * weight, weight

    @property
    def value(self) -> float:
        return self._sum / self._weight

    def note(self, seen: float) -> None:
        self._sum = MEMORY * self._sum + seen
        self._weight = MEMORY * self._weight + 1


class StepTimes:
    """How long a step of so many tokens takes: a line through those that were, and how far each number is from it.

    Kernels work on several rows at a time, so that two may take as long as three.
    """

    def __init__(self) -> None:
        self._rows = self._seconds = self._variance = self._covariance = 0.0  # means, and spread around them
        self._factors: dict[int, Average] = {}

    def note(self, rows: int, seconds: float) -> None:
        """A step of so many tokens took so long. What is far from what was expected was disturbed by something else."""
        if rows > MOST_ROWS:
            return
        expected = self.seconds(rows)
        if not self._rows or 2 * seconds < expected:  # those before were disturbed
            self._rows, self._seconds, self._variance, self._covariance = float(rows), seconds, 0.0, 0.0
            self._factors = {}
            return
        seconds = min(seconds, 2 * expected)
        more, longer = rows - self._rows, seconds - self._seconds
        self._rows += (1 - MEMORY) * more
        self._seconds += (1 - MEMORY) * longer
        self._variance = MEMORY * (self._variance + (1 - MEMORY) * more * more)
        self._covariance = MEMORY * (self._covariance + (1 - MEMORY) * more * longer)
        self._factors.setdefault(rows, Average(1.0, 2.0)).note(seconds / self._on_the_line(rows))

    def seconds(self, rows: int) -> float:
        """What such a step should take; 0 as long as nothing is known."""
        factor = self._factors.get(rows)
        return self._on_the_line(rows) * (factor.value if factor else 1.0)

    def _on_the_line(self, rows: int) -> float:
        # A quarter of a step of one for each, until there is more to tell by.
        assumed = self._seconds / (self._rows + 3)
        slope = max(0.0, (self._covariance + assumed) / (self._variance + 1))
        return max(0.1 * self._seconds, self._seconds + slope * (rows - self._rows))


def most_useful(chances: Iterable[float], costs: Iterable[float]) -> int:
    """How many guesses bring most tokens for their time; none where none is faster.

    chances: that each is right where those before it were. costs: of so many in all, in parts of a token's time
    without guesses.
    """
    tokens = best = likely = 1.0
    most = 0
    for i, (chance, cost) in enumerate(zip(chances, costs, strict=False)):
        likely *= chance
        tokens += likely
        if tokens > best * (1 + cost):
            best, most = tokens / (1 + cost), i + 1
    return most


def extra_costs(times: StepTimes, rows: int, a_token: float) -> Iterator[float]:
    """What 1, 2, ... tokens beside `rows` cost, in parts of a token's time; a quarter each where nothing is known."""
    for more in count(1):
        yield (times.seconds(rows + more) - times.seconds(rows)) / a_token if a_token else 0.25 * more


@dataclass
class _Text:
    """Where a sequence's n-grams have ended last, and how likely it goes on as it did behind one of each length."""

    chances: dict[int, Average]
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    length: int = 0  # tokens whose n-grams are known


class NgramProposer:
    """Prompt lookup: goes on as the text did where its last `shortest` to `longest` tokens stood before.

    What it would have guessed is compared with what came whether it was tried or not, so that nothing is tried to
    find out.
    """

    def __init__(self, num_tokens: int = 11, longest: int = 6, shortest: int = 1):
        self.num_tokens, self.longest, self.shortest = num_tokens, longest, shortest
        self.times = StepTimes()
        self._texts: dict[Sequence, _Text] = {}

    def propose(self, sequences: list[Sequence], rooms: list[int]) -> list[list[int]]:
        drafts, rows = [], len(sequences)
        a_token = self.times.seconds(rows) / max(1, rows)
        for sequence, room in zip(sequences, rooms, strict=True):
            drafts.append(self._guesses(sequence, room, extra_costs(self.times, rows, a_token)))
            rows += len(drafts[-1])
        return drafts

    def learn(self, sequence: Sequence, guessed: int, right: int) -> None:
        """Nothing that is not seen in the text."""

    def measure(self, rows: int, seconds: float) -> None:
        self.times.note(rows, seconds)

    def forget(self, sequence: Sequence) -> None:
        self._texts.pop(sequence, None)

    def _guesses(self, sequence: Sequence, room: int, costs: Iterable[float]) -> list[int]:
        tokens, text = sequence.token_ids, self._read(sequence)
        n, end = self._find(text, tokens, len(tokens))
        if not n:
            return []
        # Behind each guess that is right, one token more has stood there before.
        chances = (text.chances[min(n + i, self.longest)].value for i in range(min(room, self.num_tokens)))
        guesses: list[int] = []
        for i in range(end, end + most_useful(chances, costs)):  # past the end of the text, round and round
            guesses.append(tokens[i] if i < len(tokens) else guesses[i - len(tokens)])
        return guesses

    def _read(self, sequence: Sequence) -> _Text:
        """The sequence's text, with all n-grams but the last ones, which nothing has followed yet."""
        text, tokens = self._texts.get(sequence), sequence.token_ids
        if text is None:
            chances = {n: Average(LIKELY[min(n, len(LIKELY)) - 1]) for n in range(1, self.longest + 1)}
            text = self._texts[sequence] = _Text(chances)
        for end in range(max(text.length, 1), len(tokens)):
            if text.length:  # the beginning, which is mostly a prompt, says little about the answer
                n, before = self._find(text, tokens, end)
                if n:
                    text.chances[n].note(tokens[before] == tokens[end])
            for n in range(self.shortest, min(self.longest, end) + 1):
                text.ends[tuple(tokens[end - n : end])] = end
        text.length = len(tokens)
        return text

    def _find(self, text: _Text, tokens: list[int], end: int) -> tuple[int, int]:
        """How many of the tokens up to `end` stood before, and where they ended last; 0 where too few did."""
        for n in range(min(self.longest, end - 1), self.shortest - 1, -1):
            before = text.ends.get(tuple(tokens[end - n : end]))
            if before is not None:
                return n, before
        return 0, 0


class Speculation:
    """Which guesses go into a step: a proposer's, as far as there are room, blocks and a place for states."""

    def __init__(
        self,
        proposer: Proposer,
        blocks: BlockManager,
        max_model_len: int,
        copy_state: Callable[[int, int], None],
        spare_slots: SequenceOf[int] | None = None,
    ):
        """`spare_slots` are for states while guesses are checked; None where a model has no states."""
        self.proposer, self.blocks, self.max_model_len = proposer, blocks, max_model_len
        self.copy_state, self.spare_slots = copy_state, spare_slots
        self._proposing = 0.0  # seconds of this step
        self._demanded: dict[Sequence, Average] = {}  # how often what structures demanded was said
        self._demands: set[Sequence] = set()  # whose guesses of this step are such

    def add_guesses(self, scheduled: list[Scheduled], num_running: int, left: int) -> int:
        """Give those that decode guesses to check, and returns how many: at most as many as the step has tokens left.

        They do not take the block that each of those that run may need next.
        """
        self._proposing = 0.0
        self._demands.clear()
        for sequence, _ in scheduled:
            sequence.draft, sequence.spare_slot = [], None  # a step may have failed before it checked them
        rooms = {work.sequence: room for work in scheduled if (room := self._room(work, left)) > 0}
        if not rooms or num_running > MOST_SEQUENCES:
            return 0
        spares = None if self.spare_slots is None else list(self.spare_slots)
        start = perf_counter()
        drafts = self.proposer.propose([*rooms], [*rooms.values()])
        self._proposing = perf_counter() - start
        for sequence, draft in zip(rooms, drafts, strict=True):
            if sequence.matcher is not None:
                draft = self._structured(sequence, draft, rooms[sequence])
            draft = self._with_blocks(sequence, draft[:left], num_running)
            if not draft or spares == []:
                continue
            if spares:
                sequence.spare_slot = spares.pop()
                self.copy_state(sequence.state_slot, sequence.spare_slot)
            sequence.draft = draft
            left -= len(draft)
        return sum(len(sequence.draft) for sequence in rooms)

    def learn(self, sequence: Sequence, guessed: int, right: int) -> None:
        """So many of the sequence's guesses were checked, and so many of them, from the first on, were right."""
        if sequence not in self._demands:
            self.proposer.learn(sequence, guessed, right)
            return
        for is_right in [True] * right + [False] * (right < guessed):
            self._demanded[sequence].note(is_right)

    def forget(self, sequence: Sequence) -> None:
        """A sequence does not run any more."""
        self._demanded.pop(sequence, None)
        self.proposer.forget(sequence)

    def measure(self, rows: int, seconds: float) -> None:
        """A step of so many tokens took so long, with the time to find guesses for it."""
        self.proposer.measure(rows, seconds - self._proposing)

    def _structured(self, sequence: Sequence, draft: list[int], room: int) -> list[int]:
        """What a structure allows of the guesses; or what it demands, if that is more and the model mostly says so.

        The same text can be other tokens than those that the tokenizer would make of it.
        """
        draft = draft[: sequence.matcher.count_valid(draft)]
        demanded = sequence.matcher.forced_tokens()[: min(room, MOST_DEMANDED)]
        if len(demanded) > len(draft) and self._demanded.setdefault(sequence, Average(0.9)).value > 0.5:
            self._demands.add(sequence)
            return list(demanded)
        return draft

    def _room(self, work: Scheduled, left: int) -> int:
        """How many guesses behind a sequence's last token could be of use; none where it is still reading."""
        sequence, length = work.sequence, len(work.sequence.token_ids)
        if sequence.num_computed + work.num_tokens < length or sequence.num_output == 0:
            return 0
        return min(left, self.max_model_len - length - 1, sequence.params.max_tokens - sequence.num_output - 1)

    def _with_blocks(self, sequence: Sequence, draft: list[int], num_running: int) -> list[int]:
        """As many of the guesses as have blocks: new ones where one is left for each that runs."""
        length, table = len(sequence.token_ids), sequence.block_table
        needed = self.blocks.blocks_for(length + len(draft)) - len(table)
        if needed > 0 and needed + num_running <= self.blocks.num_free:
            table += self.blocks.allocate(needed)
        return draft[: len(table) * self.blocks.block_size - length]


@dataclass(frozen=True)
class SpeculativeConfig:
    """How to guess, under vLLM's names; `dtype` is the draft model's, None is that of the model itself."""

    method: str = "ngram"
    num_speculative_tokens: int = 11
    prompt_lookup_max: int = 6
    prompt_lookup_min: int = 1
    model: str = ""
    dtype: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> "SpeculativeConfig | None":
        """What a `speculative_config` asks for; raises UserError."""
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise UserError(f"speculative_config is {given!r:.200}; it is a mapping with {', '.join(_OF['ngram'])}.")
        method = given.get("method", "draft_model" if "model" in given else "ngram")
        if method not in _OF:
            raise UserError(f"speculative_config: method is {method!r}; there are {' and '.join(_OF)}.")
        if unknown := [name for name in given if name not in _OF[method]]:
            raise UserError(
                f"speculative_config has {unknown[0]!r}; with the method {method} it has {', '.join(_OF[method])}."
            )
        default = cls() if method == "ngram" else cls(method, num_speculative_tokens=6)
        config = replace(default, **given)
        config._check()
        return config

    def _check(self) -> None:
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
                raise UserError(
                    f"speculative_config: {name} is {value!r}; it must be a whole number from 1 to {MOST_TOKENS}."
                )
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise UserError(
                f"speculative_config: prompt_lookup_min is {self.prompt_lookup_min} and prompt_lookup_max "
                f"{self.prompt_lookup_max}: the one cannot be above the other."
            )
        if self.method == "draft_model" and not (self.model and isinstance(self.model, str)):
            raise UserError(
                f"speculative_config: model is {self.model!r}; with the method draft_model it names a smaller model "
                "with the same vocabulary: a preset, a repo id, a folder or a .gguf file."
            )


_OF = {
    "ngram": ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"),
    "draft_model": ("method", "model", "num_speculative_tokens", "dtype"),
}
