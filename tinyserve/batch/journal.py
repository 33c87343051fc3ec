"""The journals of a job's workers: a line for each row that is answered, whatever becomes of who wrote it."""

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tinyserve.batch.disk import encoded
from tinyserve.batch.rows import Outcome


@dataclass
class Journal:
    """The finished rows of one shard, by one worker."""

    path: Path
    file: BinaryIO
    is_synced: bool = True

    def add(self, number: int, outcome: Outcome) -> None:
        """Write a row; it outlives this process at once, and the machine behind the next `sync`."""
        self.file.write(encoded([number, *outcome]))
        self.file.flush()
        self.is_synced = False

    def sync(self) -> None:
        if not self.is_synced and not self.file.closed:
            self.is_synced = True
            os.fsync(self.file.fileno())


def new_worker_name(run: str = "") -> str:
    """A name for a worker's journals that no other has, on any machine; `run` is a beginning that several share."""
    return f"{run}{os.getpid()}-{uuid.uuid4().hex[:8]}"


def read_journal(path: Path) -> dict[int, Outcome]:
    """The rows of a journal. What was torn is left out, wherever it is: its row is computed again."""
    found = dict[int, Outcome]()
    for line in path.read_bytes().split(b"\n")[:-1]:  # behind the last line feed is what was not written whole
        try:
            number, fields, is_failure, prompt_tokens, output_tokens = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(fields, dict) and all(type(one) is int for one in (number, prompt_tokens, output_tokens)):
            found[number] = Outcome(fields, bool(is_failure), prompt_tokens, output_tokens)
    return found
