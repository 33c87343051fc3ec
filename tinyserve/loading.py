"""From a name to an engine: a model's files, opened; memory, planned; weights, read; a draft model beside it.

Knows what lies in a folder or a GGUF file and what only looks like it, and which parts an engine is built from.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from tinyserve.checkpoints import hub
from tinyserve.checkpoints.checkpoint import Checkpoint
from tinyserve.checkpoints.json_file import read_json
from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.engine import Engine
from tinyserve.engine_options import EngineOptions, check_load_format
from tinyserve.errors import CheckpointError, UserError
from tinyserve.model_runner import ModelRunner
from tinyserve.models import build_model, check_supported, check_weights
from tinyserve.models.cache_plan import MAX_SNAPSHOTS, CacheNeeds, CachePlan, plan_cache
from tinyserve.models.config import GenerationConfig, ModelConfig, parse_config, preset_config
from tinyserve.models.forward import ForwardPass
from tinyserve.models.kv_cache import KVCache
from tinyserve.models.lookup import load_raw_config
from tinyserve.pipeline.partition import cache_memory, partition
from tinyserve.pipeline.slice import Part
from tinyserve.pipeline.sliced import LocalSlices, SlicedCache, SlicedForwardPass, SlicedModel, Slices
from tinyserve.progress import Progress, default_progress
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.draft_model import DraftModel
from tinyserve.scheduling.prefix_cache import BlockPrefixCache, NoPrefixCache, StatePrefixCache
from tinyserve.scheduling.scheduler import Scheduler
from tinyserve.scheduling.speculative import MAX_DRAFTING_SEQS, NgramProposer, Proposer, Speculation, SpeculativeConfig
from tinyserve.tensor import _jit
from tinyserve.tensor.program import Planned, being_compiled
from tinyserve.text.chat_template import ChatTemplate, read_template
from tinyserve.text.tokenizer import Tokenizer

KERNELS_EACH = 9  # that an instruction compiles, itself among them: between 8 and 11, of all families
USUAL = 6  # instructions that this counts for
DRAFT_SNAPSHOTS = 3  # for each sequence: behind the text, behind the draft tokens, and while it reads a prompt


@dataclass(frozen=True)
class ModelFiles:
    """What was found under a model's name. No tokenizer: the weights are synthetic, and speak token ids only."""

    name: str
    path: Path | None
    config: ModelConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    generation: GenerationConfig
    end_tokens: Mapping[int, list[str]]  # the ids that end an answer, and where each is said to
    raw_config: dict[str, Any]

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end an answer, whoever says so."""
        return frozenset(self.end_tokens)

    @property
    def packed_dtype(self) -> str | None:
        """The dtype that `tinyserve quantize` packed the weights in; None for an ordinary checkpoint."""
        return (self.raw_config.get("quantization_config") or {}).get("dtype")


def open_model(
    model: str | PathLike[str],
    load_format: str = "auto",
    progress: Progress | None = None,
    chat_template: str | PathLike[str] | None = None,
) -> ModelFiles:
    """Find a model, downloading it if need be, and open its files; raises the errors of hub, config and checkpoint.

    `load_format="dummy"` makes synthetic weights from the config alone: no download. `progress` is that of
    `hub.resolve`. `chat_template`, a file or a text, takes the place of the checkpoint's; UserError where it is none.
    """
    check_load_format("load_format", load_format)
    ref = ModelRef.parse(model)
    given = read_template(chat_template) if chat_template is not None else None
    if ref.preset is not None:
        check_supported(preset_config(ref.preset.name))  # before gigabytes are downloaded for nothing
    if load_format == "dummy":
        return _synthetic(ref)
    path = hub.resolve(ref, progress=progress)
    files = _from_folder(ref.name, path) if path.is_dir() else _from_gguf(ref.name, path)
    if ref.preset is not None:
        generation = files.generation.with_recommended(ref.preset.generation_config, ref.preset.source)
        files = replace(files, generation=generation)
    return files if given is None else _with_chat_template(files, *given)


def _synthetic(ref: ModelRef) -> ModelFiles:
    from tinyserve.models.synthetic import synthetic_checkpoint

    raw, source = load_raw_config(ref)
    config = parse_config(raw, source)
    check_supported(config)
    ends = {token: ["config.json"] for token in config.eos_token_ids}
    generation = GenerationConfig(source="generation_config.json")
    return ModelFiles(ref.name, None, config, synthetic_checkpoint(config), None, None, generation, ends, raw)


def open_weights(model: str | PathLike[str], load_format: str = "auto") -> tuple[ModelConfig, Checkpoint]:
    """The config and the tensors of a model, as `open_model` finds them, and nothing else of it."""
    ref = ModelRef.parse(model)
    if load_format == "dummy":
        files = _synthetic(ref)
        return files.config, files.checkpoint
    path = hub.resolve(ref)
    if path.is_dir():
        return _folder_weights(path, _folder_config(path)[0])
    from tinyserve.checkpoints.gguf import open_gguf
    from tinyserve.models.gguf_config import hf_config

    file = open_gguf(path)
    return parse_config(hf_config(file), str(path)), file.tensors


def _folder_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not the folder of a Hugging Face checkpoint.")
    raw = read_json(folder / "config.json")
    config = parse_config(raw, str(folder / "config.json"))
    check_supported(config)
    return config, raw


def _from_folder(name: str, folder: Path) -> ModelFiles:
    config, raw = _folder_config(folder)
    file = folder / "generation_config.json"
    generation = GenerationConfig.parse(read_json(file) if file.is_file() else {}, str(file))
    tokenizer = Tokenizer.from_folder(folder)
    config, checkpoint = _folder_weights(folder, config)
    return _assemble(name, folder, config, checkpoint, tokenizer, generation, raw)


def _folder_weights(folder: Path, config: ModelConfig) -> tuple[ModelConfig, Checkpoint]:
    """The tensors of a folder, and its config with what they say about its head."""
    from tinyserve.checkpoints.safetensors import open_safetensors

    checkpoint = open_safetensors(folder)
    if config.tie_word_embeddings and "lm_head.weight" in checkpoint and checkpoint.is_copy("lm_head.weight"):
        checkpoint = checkpoint.without("lm_head.weight")  # the embedding, written twice
    elif config.tie_word_embeddings and "lm_head.weight" in checkpoint and not _has_embedding(checkpoint, config):
        checkpoint = checkpoint.renamed("lm_head.weight", _embedding(config))  # tied, and written under the other name
    elif config.tie_word_embeddings and any(key.startswith("lm_head.") for key in checkpoint):
        # Tied is many a config's default, and a head in the file may be another matrix: transformers reads it too.
        config = replace(config, tie_word_embeddings=False)
    return config, checkpoint


def _embedding(config: ModelConfig) -> str:
    return next(tensor.name for tensor in config.tensor_shapes() if tensor.component == "embedding")


def _has_embedding(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    """Under its name or a shorter or longer one: a checkpoint may be of a model, or of what lies around it."""
    last = ".".join(_embedding(config).split(".")[-2:])
    return any(f".{name}".endswith(f".{last}") for name in checkpoint)


def _from_gguf(name: str, path: Path) -> ModelFiles:
    from tinyserve.checkpoints.gguf import open_gguf
    from tinyserve.models.gguf_config import generation_config, hf_config

    file = open_gguf(path)
    raw = hf_config(file)
    config = parse_config(raw, str(path))
    check_supported(config)
    tokenizer = Tokenizer.from_gguf(file.metadata, str(path))
    generation = GenerationConfig.parse(generation_config(file), str(path))
    return _assemble(name, path, config, file.tensors, tokenizer, generation, raw)


def _assemble(
    name: str,
    path: Path,
    config: ModelConfig,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    generation: GenerationConfig,
    raw: dict[str, Any],
) -> ModelFiles:
    source = tokenizer.chat_template
    template = ChatTemplate(source, tokenizer.special_tokens, name) if source else None
    ends = _end_tokens(path, config, tokenizer, generation)
    return ModelFiles(name, path, config, checkpoint, tokenizer, template, generation, ends, raw)


def _with_chat_template(files: ModelFiles, source: str, name: str) -> ModelFiles:
    """The same model with this chat template alone, and the tokens with which it ends turns."""
    tokenizer, path = files.tokenizer, files.path
    assert tokenizer is not None and path is not None  # weights are not synthetic
    template = ChatTemplate(source, tokenizer.special_tokens, name)
    tokenizer.chat_templates = {"default": source}
    ends = _end_tokens(path, files.config, tokenizer, files.generation)
    return replace(files, chat_template=template, end_tokens=ends)


def _end_tokens(
    path: Path, config: ModelConfig, tokenizer: Tokenizer, generation: GenerationConfig
) -> dict[int, list[str]]:
    """The ids that end an answer, and where each is said to."""
    said: dict[str, Iterable[int]] = {
        "config.json": config.eos_token_ids,
        "generation_config.json": generation.eos_token_ids,
        # What the tokenizer knows by itself: it has read the two configs as well.
        "tokenizer": tokenizer.eos_token_ids.difference(config.eos_token_ids, generation.eos_token_ids),
    }
    if path.is_file():  # a GGUF file, whose metadata is all of these
        said = {"metadata": set().union(*said.values())}
    said["chat template"] = tokenizer.end_tokens() - tokenizer.eos_token_ids
    ends: dict[int, list[str]] = {}
    for origin, tokens in said.items():
        for token in sorted(tokens):
            ends.setdefault(token, []).append(origin)
    return ends


# --- from files to an engine ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LoadedEngine:
    """An engine with all that it was built from; `options` have dtypes by their own names."""

    files: ModelFiles
    options: EngineOptions
    plan: CachePlan
    engine: Engine
    progress: Progress  # the caller's, or the default that has shown the loading
    runners: tuple[ModelRunner, ...]  # the model's, and a draft model's
    slices: Slices | None  # where other processes have layers of the model; to be closed when the engine has ended

    @property
    def runner(self) -> ModelRunner:
        """The model's own."""
        return self.runners[0]


def load_engine(
    model: str | PathLike[str],
    options: EngineOptions,
    progress: Progress | None = None,
    reserve: Callable[[int], None] | None = None,
) -> LoadedEngine:
    """Open a model, plan its memory, load it with its draft model if there is one, and build its engine.

    `reserve` is called with the bytes that weights and cache will take on this machine, before they take any. Raises
    UserError, HubError, and what `reserve` raises.
    """
    files = open_model(model, options.load_format, progress, options.chat_template)
    given, options = options, options.resolved(files.packed_dtype)
    speculative = options.speculative
    draft = None
    if speculative and speculative.model:
        # Its cache has an "auto" of its own.
        draft = open_draft(speculative, files, replace(given, dtype=options.dtype), progress)
    for each in (files, *([draft.files] if draft else [])):
        check_weights(each.config, each.checkpoint)  # before memory is planned by sizes that no weights have
    needs = _cache_needs(files, options)
    if speculative:
        needs = replace(needs, num_rollback_slots=min(MAX_DRAFTING_SEQS, options.max_num_seqs))
    with ExitStack() as started:
        slices = None
        if options.pipeline_parallel_size > 1:
            with default_progress(progress, files.name) as shown:
                slices = started.enter_context(closing(start_slices(model, files, options, shown)))
        here, memory = [needs], options.kv_cache_memory
        if slices is not None:
            here, most = _share_out(slices, needs, draft.needs if draft else None)
            memory = most if memory is None else memory
        plan = plan_cache(needs, options.max_model_len, memory, draft.needs if draft else None)
        if reserve is not None:
            nbytes = draft.needs.weight_nbytes + plan.draft.nbytes if draft and plan.draft else 0
            for part in here:
                own = part.plan(plan.num_blocks, plan.max_model_len, plan.num_snapshots, None)
                nbytes += part.weight_nbytes + own.nbytes
            reserve(nbytes)
        runners: tuple[ModelRunner, ...] = ()
        proposer: Proposer | None = None
        with default_progress(progress, files.name) as shown, reported_kernels(shown):
            if draft and plan.draft:
                engine, runner = build_engine(draft.files, draft.options, plan.draft, shown)
                proposer, runners = DraftModel(engine, draft.num_tokens), (runner,)
            elif speculative:
                proposer = NgramProposer(
                    speculative.num_speculative_tokens, speculative.prompt_lookup_max, speculative.prompt_lookup_min
                )
            engine, runner = build_engine(files, options, plan, shown, proposer, slices)
        started.pop_all()
    return LoadedEngine(files, options, plan, engine, shown, (runner, *runners), slices)


def build_engine(
    files: ModelFiles,
    options: EngineOptions,
    plan: CachePlan,
    progress: Progress,
    proposer: Proposer | None = None,
    slices: Slices | None = None,
) -> tuple[Engine, ModelRunner]:
    """Load weights, take the memory as planned, have the kernels compiled, and build the engine above them.

    `options` are the model's own, with dtypes resolved; a draft model's engine is built in the same way. Where there
    are `slices`, the last layers alone are loaded here.
    """
    threads = options.num_threads
    if threads is not None:
        threads = min(threads, _jit.cores())  # more would wait for each other
    threads = _jit.set_threads(threads)
    layers = slices.layers[-1] if slices else None
    others = slices.load(plan) if slices else None
    with _jit.one_at_a_time(threads):
        model = build_model(files.config, files.checkpoint, options.dtype, plan.max_model_len, progress, layers=layers)
    if slices and others:
        whole = SlicedModel(model, others(), options.dtype)
        forward: ForwardPass = SlicedForwardPass(whole, SlicedCache(files.config, *plan.sizes, layers), slices, threads)
    else:
        forward = ForwardPass(model, KVCache(files.config, *plan.sizes))
    runner = ModelRunner(forward, plan, threads, files.eos_token_ids)
    runner.compile_kernels(options.dtype, progress)
    blocks = BlockManager(plan.num_blocks, plan.block_size)
    prefix_cache = NoPrefixCache(blocks)
    if options.enable_prefix_caching:
        prefix_cache = StatePrefixCache(blocks, plan.snapshot_slots) if plan.state_nbytes else BlockPrefixCache(blocks)
    speculation = None
    if proposer is not None:
        speculation = Speculation(proposer, plan.rollback_slots if plan.state_nbytes else None)
    scheduler = Scheduler(
        runner,
        blocks,
        plan.max_model_len,
        plan.running_slots,
        options.max_num_batched_tokens,
        prefix_cache,
        speculation,
    )
    return Engine(runner, scheduler, files.eos_token_ids), runner


def _cache_needs(files: ModelFiles, options: EngineOptions) -> CacheNeeds:
    snapshots = MAX_SNAPSHOTS if options.enable_prefix_caching else 0
    return CacheNeeds(
        files.config, options.dtype, options.kv_cache_dtype, options.block_size, options.max_num_seqs, snapshots
    )


# --- a model in several processes -------------------------------------------------------------------------------------


def start_slices(model: str | PathLike[str], files: ModelFiles, options: EngineOptions, progress: Progress) -> Slices:
    """The processes of all layers but the last ones, which are loaded here; none has loaded anything yet.

    Raises UserError for more slices than layers, and where there is no Ray or no machine for them.
    """
    layers = partition(files.config, options.dtype, options.pipeline_parallel_size)
    path = ModelRef.parse(model).path
    where = model if path is None else path.absolute()  # a slice may be started in another folder
    found = partial(open_weights, where, options.load_format)
    parts = [Part(found, files.config, options.dtype, each, options.num_threads) for each in layers]
    if options.distributed_executor_backend == "uni":
        return LocalSlices(parts)
    from tinyserve.pipeline.on_ray import RaySlices

    return RaySlices(parts, progress)


def _share_out(slices: Slices, needs: CacheNeeds, draft: CacheNeeds | None) -> tuple[list[CacheNeeds], int]:
    """What slices on this machine need, and the most that the caches of all may take; raises UserError."""
    each, places = [replace(needs, layers=layers) for layers in slices.layers], slices.places
    beside = [draft] if draft else []
    most = cache_memory([*each, *beside], [*places, *places[-1:] * len(beside)])
    return [one for one, place in zip(each, places, strict=True) if place.node == places[-1].node], most


@contextmanager
def reported_kernels(progress: Progress) -> Iterator[None]:
    """Within, each kernel that is compiled is reported: how many there have been, and about how many there will be.

    How many instructions there are is known, and how many kernels each compiles that it calls is guessed, from those
    that are done and, at first, from what is usual.
    """
    compiled = before = 0
    last: Collection[Planned] = ()

    def report(kernel: str) -> None:
        nonlocal compiled, before, last
        planned, total = being_compiled(), 0
        if planned is not last:
            last, before = planned, compiled
        compiled += 1
        if planned:  # else it packs weights
            done = sum(one.is_compiled for one in planned)
            each = (compiled - before + USUAL * KERNELS_EACH) / (done + USUAL)
            total = max(compiled, round(before + len(planned) * each))
        progress(f"compile {kernel}", compiled, total)

    with _jit.on_compile(report):
        yield


# --- a draft model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A draft model that is found and fits, not loaded yet."""

    files: ModelFiles
    options: EngineOptions
    needs: CacheNeeds
    num_tokens: int


def open_draft(
    config: SpeculativeConfig, target: ModelFiles, options: EngineOptions, progress: Progress | None = None
) -> Draft:
    """Find the draft model that a config names, and open its files; options are its target's but for the dtype.

    Raises UserError, with both models and both numbers, where it has another vocabulary; and the errors of
    `open_model`.
    """
    files = open_model(config.model, options.load_format, progress)
    check_vocabulary(files, target)
    own = replace(
        options,
        dtype=config.dtype or ("auto" if files.packed_dtype else options.dtype),
        max_num_seqs=min(MAX_DRAFTING_SEQS, options.max_num_seqs),
        enable_prefix_caching=True,  # it goes on from what it has computed of a text
        speculative_config=None,
        pipeline_parallel_size=1,  # it is small, and here
    ).resolved(files.packed_dtype)
    needs = replace(_cache_needs(files, own), max_snapshots=DRAFT_SNAPSHOTS * own.max_num_seqs)
    return Draft(files, own, needs, config.num_speculative_tokens)


def check_vocabulary(draft: ModelFiles, target: ModelFiles) -> None:
    """Raise UserError unless an id is the same token for both models."""
    sizes = draft.config.vocab_size, target.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{draft.name} cannot draft for {target.name}: its vocabulary has {sizes[0]} tokens and that of "
            f"{target.name} {sizes[1]}. Name a draft model of the same family."
        )
    if draft.tokenizer is None or target.tokenizer is None:
        return
    for token in range(sizes[0]):
        pieces = [tokenizer.token_bytes(token, False) for tokenizer in (draft.tokenizer, target.tokenizer)]
        if pieces[0] != pieces[1]:
            raise UserError(
                f"{draft.name} cannot draft for {target.name}: token {token} is {pieces[0]!r} to the one and "
                f"{pieces[1]!r} to the other. Name a draft model with the same tokenizer."
            )
