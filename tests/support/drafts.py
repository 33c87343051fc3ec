"""Proposers that tests can rely on: they draft whatever the clock says, and wrongly at places that are known."""

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
    assert llm.engine.scheduler.speculation is not None
    proposer = llm.engine.scheduler.speculation.proposer
    assert isinstance(proposer, DraftModel)
    return proposer.engine


class Spoiled:
    """Changes what an LLM's proposer drafts: tiny models repeat themselves so well that all of it would be accepted.

    Time has no say any more. `places` counts, for each rejection, how many draft tokens were accepted before it.
    """

    def __init__(self, llm: LLM, every: int = 7, is_always_right: bool = False):
        """One token of each draft is wrong: the first, then the second, up to this one, and so on (0: none is).

        is_always_right: all that is not spoiled must be accepted.
        """
        assert llm.engine.scheduler.speculation is not None
        self.proposer = proposer = llm.engine.scheduler.speculation.proposer
        self.every, self.is_always_right, self.places = every, is_always_right, Counter[int]()
        self._propose, self._update_acceptance = proposer.propose, proposer.update_acceptance
        self._wrong: dict[Sequence, int] = {}
        self._count = count()
        proposer.propose = self.propose  # type: ignore[method-assign]
        proposer.update_acceptance = self.update_acceptance  # type: ignore[method-assign]
        proposer.record_step = lambda num_tokens, seconds: None  # type: ignore[method-assign]
        if isinstance(proposer, DraftModel):
            proposer._draft_length = lambda sequence, most, num_sequences: most  # type: ignore[method-assign]

    def propose(self, sequences: list[Sequence], max_draft_lens: list[int]) -> list[list[int]]:
        drafts = self._propose(sequences, max_draft_lens)
        for sequence, draft in zip(sequences, drafts, strict=True):
            at = next(self._count) % self.every if self.every else len(draft)
            self._wrong[sequence] = at
            if at < len(draft):
                draft[at] = (draft[at] + 1) % checkpoints.VOCAB
        return drafts

    def update_acceptance(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        self.places[num_accepted_tokens] += num_accepted_tokens < num_draft_tokens
        if self.is_always_right:
            expected = min(num_draft_tokens, self._wrong[sequence])
            assert num_accepted_tokens == expected, "a draft model that is the model itself knows what comes"
        self._update_acceptance(sequence, num_draft_tokens, num_accepted_tokens)


def assert_all_is_free(llm: LLM) -> None:
    """Nothing runs: every block and slot of the model, and of its draft model, is free."""
    engines = [llm.engine]
    speculation = llm.engine.scheduler.speculation
    if isinstance(speculation and speculation.proposer, DraftModel):
        engines.append(draft_of(llm))
    for engine in engines:
        scheduler, blocks = engine.scheduler, engine.scheduler.blocks
        assert not engine.has_work() and blocks.num_free == blocks.num_blocks
        assert len(scheduler._free_slots) == len(set(scheduler._free_slots))
        assert len(scheduler._free_slots) >= scheduler.max_num_seqs
