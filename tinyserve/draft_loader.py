"""A draft model's files and engine: opened beside those of the model that it guesses for, and checked against it.

Knows files and memory; when guesses are made is for draft_model.py.
"""

from dataclasses import dataclass

from tinyserve.engine import Engine
from tinyserve.errors import UserError
from tinyserve.loading import ModelFiles, open_model
from tinyserve.model_runner import CachePlan, DraftNeeds, ModelRunner, resolve_kv_cache_dtype
from tinyserve.models import build_model
from tinyserve.models.matrix import resolve_dtype
from tinyserve.progress import Progress
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.draft_model import DraftModel
from tinyserve.scheduling.prefix_cache import BlockPrefixCache, StatePrefixCache
from tinyserve.scheduling.speculative import MOST_SEQUENCES, SpeculativeConfig
from tinyserve.tensor import _jit


@dataclass(frozen=True)
class Draft:
    """A draft model that is found and fits, not loaded yet."""

    files: ModelFiles
    needs: DraftNeeds
    num_tokens: int

    def load(
        self, plan: CachePlan, max_num_batched_tokens: int, num_threads: int, progress: Progress
    ) -> tuple[DraftModel, ModelRunner]:
        """Its weights, its cache as planned, and an engine of its own; who guesses, and the runner below."""
        files, needs = self.files, self.needs
        max_model_len = min(plan.max_model_len, files.config.max_position_embeddings)
        with _jit.one_at_a_time(num_threads):
            model = build_model(files.config, files.checkpoint, needs.dtype, max_model_len, progress)
        runner = ModelRunner(
            model, plan.num_blocks, plan.block_size, num_threads, needs.kv_cache_dtype, needs.num_states,
            files.eos_token_ids,
        )  # fmt: skip
        runner.compile_kernels(needs.dtype, progress)
        blocks = BlockManager(plan.num_blocks, plan.block_size)
        prefixes = BlockPrefixCache(blocks)
        if needs.state_nbytes:
            prefixes = StatePrefixCache(blocks, range(needs.max_num_seqs, needs.num_states))
        engine = Engine(
            runner, blocks, files.eos_token_ids, max_model_len, needs.max_num_seqs, max_num_batched_tokens, prefixes
        )
        return DraftModel(engine, self.num_tokens), runner


def open_draft(
    config: SpeculativeConfig,
    target: ModelFiles,
    dtype: str,
    kv_cache_dtype: str,
    max_num_seqs: int,
    load_format: str,
    progress: Progress | None = None,
) -> Draft:
    """Find the draft model that a config names, and open its files; dtypes are those of the target, where it has none.

    Raises UserError, with both models and both numbers, where it has another vocabulary; and the errors of
    `open_model`.
    """
    files = open_model(config.model, load_format, progress)
    check_vocabulary(files, target)
    own = resolve_dtype(config.dtype or ("auto" if files.packed_dtype else dtype), files.packed_dtype)
    needs = DraftNeeds(
        files.config, own, resolve_kv_cache_dtype(kv_cache_dtype, own), min(MOST_SEQUENCES, max_num_seqs)
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
