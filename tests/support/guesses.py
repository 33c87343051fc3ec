"""Proposers that tests can rely on: they guess whatever the clock says, and wrongly at places that are known."""

from collections import Counter
from itertools import count

import checkpoints

from tinyserve import LLM
from tinyserve.engine import Engine
from tinyserve.scheduling.draft_model import DraftModel
from tinyserve.scheduling.sequence import Sequence

NGRAM = {"method": "ngram"}


def draft_of(llm: LLM) -> Engine:
    """The engine of an LLM's draft model."""
    assert llm.engine.speculation is not None
    proposer = llm.engine.speculation.proposer
    assert isinstance(proposer, DraftModel)
    return proposer.engine


class Spoiled:
    """Changes what an LLM's proposer guesses: tiny models repeat themselves so well that all of it would be right.

    Time has no say any more. `places` counts how many of the guesses that were checked stood before a spoiled one.
    """

    def __init__(self, llm: LLM, every: int = 7, is_always_right: bool = False):
        """One of each sequence's guesses is wrong, the first, then the second, up to this one, and so on (0: none is).

        is_always_right: all that is not spoiled must be.
        """
        assert llm.engine.speculation is not None
        self.proposer = proposer = llm.engine.speculation.proposer
        self.every, self.is_always_right, self.places = every, is_always_right, Counter[int]()
        self._propose, self._learn = proposer.propose, proposer.learn
        self._wrong: dict[Sequence, int] = {}
        self._count = count()
        proposer.propose, proposer.learn = self.propose, self.learn  # type: ignore[method-assign]
        proposer.measure = lambda rows, seconds: None  # type: ignore[method-assign]
        if isinstance(proposer, DraftModel):
            proposer._worth = lambda sequence, room, together: room  # type: ignore[method-assign]

    def propose(self, sequences: list[Sequence], rooms: list[int]) -> list[list[int]]:
        drafts = self._propose(sequences, rooms)
        for sequence, draft in zip(sequences, drafts, strict=True):
            at = next(self._count) % self.every if self.every else len(draft)
            self._wrong[sequence] = at
            if at < len(draft):
                draft[at] = (draft[at] + 1) % checkpoints.VOCAB
        return drafts

    def learn(self, sequence: Sequence, guessed: int, right: int) -> None:
        self.places[right] += right < guessed
        if self.is_always_right:
            assert right == min(guessed, self._wrong[sequence]), "a draft that is the model itself knows what comes"
        self._learn(sequence, guessed, right)


def assert_all_is_free(llm: LLM) -> None:
    """Nothing runs: every block and slot of the model, and of its draft model, is free."""
    engines = [llm.engine]
    if isinstance(llm.engine.speculation and llm.engine.speculation.proposer, DraftModel):
        engines.append(draft_of(llm))
    for engine in engines:
        assert not engine.has_work() and engine.blocks.num_free == engine.blocks.num_blocks
        assert len(engine._free_slots) == len(set(engine._free_slots))
        assert len(engine._free_slots) >= engine.max_num_seqs
