"""A model for a command, while a line on stderr says how far it is."""

import sys
from typing import TYPE_CHECKING, Any

from tinyserve.errors import UserError
from tinyserve.progress import LoadProgress

if TYPE_CHECKING:
    from tinyserve.llm import LLM


def load(model: str, dtype: str, threads: int | None, **options: Any) -> "tuple[LLM, LoadProgress]":
    """An LLM with a progress line, which knows the seconds it took from here."""
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}; it must be at least 1.")
    with LoadProgress(model) as line:
        from tinyserve.llm import LLM

        llm = LLM(model, dtype=dtype, num_threads=threads, progress=line, **options)
    if threads is not None and llm.num_threads < threads:
        print(f"tinyserve: this process has {llm.num_threads} of the {threads} threads asked for", file=sys.stderr)
    return llm, line


def default_load_format(model: str) -> str:
    """What a command that measures takes: synthetic weights of a preset that is not on this disk, else the model's."""
    from tinyserve.checkpoints import hub
    from tinyserve.checkpoints.model_ref import ModelRef

    ref = ModelRef.parse(model)
    return "dummy" if ref.preset and not hub.is_cached(ref) else "auto"
