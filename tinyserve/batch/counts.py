"""What has come of rows, in numbers, and how far a batch is."""

from collections.abc import Callable
from dataclasses import dataclass

from tinyserve.batch.rows import Outcome


@dataclass
class Counts:
    """What has come of some rows."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: "Counts") -> None:
        self.rows += other.rows
        self.failed += other.failed
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens

    @classmethod
    def of(cls, outcome: Outcome) -> "Counts":
        return cls(1, int(outcome.is_failure), outcome.prompt_tokens, outcome.output_tokens)


@dataclass
class BatchProgress:
    """How far a batch is: rows of `total`, of which `resumed` were answered before; tokens are of this run."""

    total: int
    rows: int = 0
    resumed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0

    def add(self, counts: Counts, is_old: bool) -> None:
        """Count rows in; `is_old` for those of an earlier run."""
        self.rows += counts.rows
        self.failed += counts.failed
        if not is_old:
            self.prompt_tokens += counts.prompt_tokens
            self.output_tokens += counts.output_tokens


OnProgress = Callable[[BatchProgress], None]
OnRow = Callable[[Counts, bool], None]  # what came of some rows, and whether that was in an earlier run
