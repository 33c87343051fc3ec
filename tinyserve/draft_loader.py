"""A draft model's files and engine: opened beside those of the model that it drafts for, and checked against it.

Knows files and memory; when draft tokens are proposed is for draft_model.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tinyserve.engine import Engine
from tinyserve.errors import UserError
from tinyserve.loading import ModelFiles, open_model
from tinyserve.model_runner import CachePlan, DraftNeeds, ModelRunner, resolve_kv_cache_dtype
from tinyserve.models import build_model
from tinyserve.models.matrix import resolve_dtype
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.draft_model import DraftModel
from tinyserve.scheduling.prefix_cache import BlockPrefixCache, StatePrefixCache
from tinyserve.scheduling.scheduler import Scheduler
from tinyserve.scheduling.speculative import MAX_DRAFTING_SEQS, SpeculativeConfig
from tinyserve.tensor import _jit

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Draft:
    """A draft model that is found and fits, not loaded yet."""

    files: ModelFiles
    needs: DraftNeeds
    num_tokens: int

    def load(
        self, plan: CachePlan, max_num_batched_tokens: int, num_threads: int, progress: Progress
    ) -> tuple[DraftModel, ModelRunner]:
        """Its weights, its cache as planned, and an engine of its own; the proposer, and the runner below."""
        files, needs = self.files, self.needs
        max_model_len = min(plan.max_model_len, files.config.max_position_embeddings)
        with _jit.one_at_a_time(num_threads):
            load = partial(progress, "load")
            model = build_model(files.config, files.checkpoint, needs.dtype, max_model_len, load)
        runner = ModelRunner(
            model, plan.num_blocks, plan.block_size, num_threads, needs.kv_cache_dtype, needs.num_states,
            files.eos_token_ids,
        )  # fmt: skip
        runner.compile_kernels(
            f"{files.config.model_type}-{needs.dtype}-{needs.kv_cache_dtype}", lambda: progress("wait", 0, 0)
        )
        blocks = BlockManager(plan.num_blocks, plan.block_size)
        prefix_cache = BlockPrefixCache(blocks)
        if needs.state_nbytes:
            prefix_cache = StatePrefixCache(blocks, range(needs.max_num_seqs, needs.num_states))
        scheduler = Scheduler(
            runner, blocks, max_model_len, needs.max_num_seqs, max_num_batched_tokens, prefix_cache
        )  # fmt: skip
        return DraftModel(Engine(runner, scheduler, files.eos_token_ids), self.num_tokens), runner


def open_draft(
    config: SpeculativeConfig, target: ModelFiles, dtype: str, kv_cache_dtype: str, max_num_seqs: int, load_format: str
) -> Draft:
    """Find the draft model that a config names, and open its files; dtypes are those of the target, where it has none.

    Raises UserError, with both models and both numbers, where it has another vocabulary; and the errors of
    `open_model`.
    """
    files = open_model(config.model, load_format, progress=True)
    check_vocabulary(files, target)
    own = resolve_dtype(config.dtype or ("auto" if files.packed_dtype else dtype), files.packed_dtype)
    needs = DraftNeeds(
        files.config, own, resolve_kv_cache_dtype(kv_cache_dtype, own), min(MAX_DRAFTING_SEQS, max_num_seqs)
    )
    return Draft(files, needs, config.num_speculative_tokens)


def check_vocabulary(draft: ModelFiles, target: ModelFiles) -> None:
    """Raise UserError unless an id is the same token for both models."""
    sizes = draft.config.vocab_size, target.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{draft.name} cannot guess for {target.name}: its vocabulary has {sizes[0]} tokens and that of "
            f"{target.name} {sizes[1]}. Name a draft model of the same family."
        )
    if draft.tokenizer is None or target.tokenizer is None:
        return
    for token in range(sizes[0]):
        pieces = [tokenizer.token_bytes(token, False) for tokenizer in (draft.tokenizer, target.tokenizer)]
        if pieces[0] != pieces[1]:
            raise UserError(
                f"{draft.name} cannot guess for {target.name}: token {token} is {pieces[0]!r} to the one and "
                f"{pieces[1]!r} to the other. Name a draft model with the same tokenizer."
            )
