"""The user's API: text in, text out. The only floor that knows text and ids both.

Builds the runner and the engine and hands them down; knows nothing of kernels, files or the network beyond whom to ask.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from os import PathLike
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from tinyserve.engine import Engine, EngineStats
from tinyserve.engine_thread import EngineThread, Update
from tinyserve.errors import RequestError, UserError
from tinyserve.progress import Progress, default_progress
from tinyserve.sampling_params import BeamSearchParams, SamplingParams
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.prefix_cache import BlockPrefixCache, NoPrefixCache, StatePrefixCache
from tinyserve.scheduling.speculative import MOST_SEQUENCES, NgramProposer, Proposer, Speculation, SpeculativeConfig
from tinyserve.text.answer_bar import AnswerBar
from tinyserve.text.beam_search import BeamSearchOutput, beam_search
from tinyserve.text.chat import ChatFormat, ChatRequest, ToolOptions
from tinyserve.text.embedding import EmbeddingOutput, mean_of, sum_of
from tinyserve.text.input_processor import RequestMaker
from tinyserve.text.pooling import TextReader
from tinyserve.text.request import CompletionOutput, Request, RequestOutput, StreamChunk, outputs_of
from tinyserve.text.validation import Prompt, as_params, as_priorities, as_prompts, check_options

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LLM", "CompletionOutput", "EmbeddingOutput", "RequestOutput", "StreamChunk"]

Message = Mapping[str, Any]

logger = logging.getLogger("tinyserve")


class LLM:
    """A model that is ready to answer.

    `model` is a preset, a Hugging Face repo id, a folder of safetensors or a .gguf file. Raises UserError for an
    option or a file that is wrong, HubError when a download fails; every message says what to do.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
        kv_cache_memory: int | None = None,
        kv_cache_dtype: str = "auto",
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        speculative_config: Mapping[str, Any] | None = None,
        num_threads: int | None = None,
        seed: int | None = None,
        load_format: str = "auto",
        progress: Progress | None = None,
        reserve: Callable[[int], None] | None = None,
        **unknown: Any,
    ):
        """Load `model`.

        dtype: "float32"; "bfloat16"; "w8a16" (also "int8" and "auto"): 8-bit weights, 16-bit activations; "w8a8";
            "w4a16" (also "int4"); "w4a8".
        max_model_len: tokens of prompt and answer together; by default the model's own limit, or what memory holds.
        max_num_seqs, max_num_batched_tokens: how many requests run at once, and how many tokens one step computes.
        kv_cache_memory: bytes for keys, values and states; by default at most half of what is free.
        kv_cache_dtype: "float32", "bfloat16", "int8", or "auto": bfloat16 unless dtype is float32.
        block_size: tokens in a block of the cache, a multiple of 16.
        enable_prefix_caching: keep what finished requests have computed while nobody else needs its room, and take it
            over where a prompt begins with the same tokens; no answer changes by a bit.
        speculative_config: {"method": "ngram"} lets an answer that repeats what was said come several tokens a step,
            {"method": "draft_model", "model": ...} one that a smaller model guesses; no token changes. Also
            num_speculative_tokens (at most 11 and 6), prompt_lookup_max (6), prompt_lookup_min (1), the draft's dtype.
        num_threads: by default the cores this process may use.
        seed: makes requests that have no seed of their own repeatable.
        load_format: "auto", or "dummy" for synthetic weights of the right shapes without a download.
        progress: called with ("download NAME", bytes done, bytes in all) and ("load", numbers packed, numbers in all);
            the first time on a machine with ("compile KERNEL", how many, 0); with ("wait", 0, 0) or ("wait download
            NAME", 0, 0) while another process compiles or downloads; and for a prompt that takes several steps with
            ("prefill", tokens done, tokens in all). By default all but the last is shown on stderr while it lasts, and
            where that is no terminal, a line tells of a download and of compiling.
        reserve: called with the bytes that weights (but for padding) and cache will take, before they take any; what it
            raises ends the loading.
        """
        check_options(
            unknown,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_threads=num_threads,
            kv_cache_memory=kv_cache_memory,
            seed=seed,
        )
        if not isinstance(enable_prefix_caching, bool):
            raise UserError(f"enable_prefix_caching is {enable_prefix_caching!r}; it must be True or False.")
        from tinyserve.draft_loader import open_draft
        from tinyserve.loading import open_model
        from tinyserve.model_runner import ModelRunner, plan_cache, resolve_kv_cache_dtype
        from tinyserve.models import build_model
        from tinyserve.models.config.costs import weight_bytes
        from tinyserve.models.matrix import resolve_dtype
        from tinyserve.tensor import _jit

        if not isinstance(model, str | PathLike) or not str(model):
            raise UserError(f"model is {model!r}; it must be a preset, a repo id, a folder or a .gguf file.")
        speculative = SpeculativeConfig.parse(speculative_config)
        resolve_dtype(dtype)  # before anything is downloaded
        if speculative and speculative.dtype is not None:
            resolve_dtype(speculative.dtype)
        resolve_kv_cache_dtype(kv_cache_dtype, dtype)
        files = open_model(model, load_format, progress)
        self.dtype = resolve_dtype(dtype, files.packed_dtype)
        self.kv_cache_dtype = resolve_kv_cache_dtype(kv_cache_dtype, self.dtype)
        self.name, self.path, self.config = files.name, files.path, files.config
        self.tokenizer, self.chat_template = files.tokenizer, files.chat_template
        self.generation_config, self.end_tokens = files.generation, files.end_tokens
        self.num_threads = _jit.set_threads(num_threads)
        draft = None
        if speculative and speculative.model:
            draft = open_draft(speculative, files, self.dtype, kv_cache_dtype, max_num_seqs, load_format, progress)
        self.cache_plan = plan = plan_cache(
            files.config, self.dtype, block_size, max_model_len, max_num_seqs, kv_cache_memory,
            self.kv_cache_dtype, enable_prefix_caching, min(MOST_SEQUENCES, max_num_seqs) if speculative else 0,
            draft.needs if draft else None,
        )  # fmt: skip
        self.max_model_len = plan.max_model_len
        if reserve is not None:
            reserve(weight_bytes(files.config, self.dtype) + (draft.needs.weight_nbytes if draft else 0) + plan.nbytes)
        self._compiled = 0
        with default_progress(progress, self.name) as self._progress, _jit.on_compile(self._report_kernel):
            with _jit.one_at_a_time(self.num_threads):
                self.model = build_model(files.config, files.checkpoint, self.dtype, self.max_model_len, self._progress)
            self._runner = ModelRunner(
                self.model, plan.num_blocks, block_size, self.num_threads, self.kv_cache_dtype, plan.num_states,
                files.eos_token_ids,
            )  # fmt: skip
            self._runner.compile_kernels(self.dtype, self._progress)
            runners = [self._runner]
            proposer: Proposer | None = None
            if draft:
                proposer, runner = draft.load(plan, max_num_batched_tokens, self.num_threads, self._progress)
                runners.append(runner)
            elif speculative:
                proposer = NgramProposer(
                    speculative.num_speculative_tokens, speculative.prompt_lookup_max, speculative.prompt_lookup_min
                )
        blocks = BlockManager(plan.num_blocks, block_size)
        prefixes = NoPrefixCache(blocks)
        if enable_prefix_caching and plan.state_nbytes:
            prefixes = StatePrefixCache(blocks, range(max_num_seqs, max_num_seqs + plan.num_snapshots))
        elif enable_prefix_caching:
            prefixes = BlockPrefixCache(blocks)
        speculation = None
        if proposer is not None:
            spares = range(plan.num_states - plan.num_spares, plan.num_states) if plan.state_nbytes else None
            speculation = Speculation(proposer, blocks, self.max_model_len, self._runner.copy_state, spares)
        self._engine = Engine(
            self._runner, blocks, files.eos_token_ids, self.max_model_len, max_num_seqs, max_num_batched_tokens,
            prefixes, speculation,
        )  # fmt: skip
        self._maker = RequestMaker(
            self.name, self.tokenizer, self.config.vocab_size, self._engine, runners, seed
        )  # fmt: skip
        self.thread = EngineThread(self._engine)
        self._reader = TextReader(self.thread, self._engine, self._runner)
        weakref.finalize(self, self.thread.close)  # also when the interpreter ends
        logger.info("%s: cache of %s", self.name, plan)

    def __repr__(self) -> str:
        return f"LLM({self.name!r}, dtype={self.dtype!r}, max_model_len={self.max_model_len})"

    def _report_kernel(self, kernel: str) -> None:
        self._compiled += 1
        self._progress(f"compile {kernel}", self._compiled, 0)

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        priority: SequenceOf[int] | int = 0,
        progress_bar: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt, a text or a list of token ids; the answers come in the order of the prompts.

        One SamplingParams serves all prompts, a list has one for each; without, the model's own do. Those of a lower
        `priority`, one number or one for each, are computed first. On a terminal several prompts have a progress bar,
        unless `progress_bar` says otherwise. Raises RequestError for a prompt that cannot be served, before any is, and
        why a request failed; where others did not, an IncompleteError that has their answers.
        """
        batch = as_prompts(prompts)
        params = self._params(sampling_params, len(batch))
        priorities = as_priorities(priority, len(batch))
        submitted = [self.make_request(*one) for one in zip(batch, params, priorities, strict=True)]
        requests = {request.sequence: request for answers in submitted for request in answers}
        news: SimpleQueue[list[Update]] = SimpleQueue()
        try:
            self.thread.submit([answers[0].sequence for answers in submitted], news)
            with AnswerBar(len(requests), progress_bar) as bar:
                while bar.answered < len(requests):
                    for update in news.get():
                        request = requests[update.sequence]
                        if not request.finished:  # a stop string may have ended it, and the engine gone on
                            self.take(request, update)
                            bar.update(request)
        finally:
            for request in requests.values():
                self.cancel(request)
        return outputs_of(submitted, params)

    def beam_search(
        self, prompts: Prompt | SequenceOf[Prompt], params: BeamSearchParams, progress_bar: bool | None = None
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt, the best first, as beam search finds them.

        Prompts, `progress_bar` and errors are those of `generate`.
        """
        return beam_search(self, as_prompts(prompts), params, self._engine.max_num_seqs, progress_bar)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Complete one prompt, yielding each piece of the answer as soon as it is certain.

        A chunk never splits a character, nor lets the beginning of a stop string through. Leaving the loop early
        cancels the request.
        """
        params = self.resolve(sampling_params)
        for name in ("n", "best_of"):
            if (count := getattr(params, name) or 1) > 1:
                raise RequestError(f"A stream is one answer, and {name} is {count}: use generate, or several streams.")
        (request,) = self.make_request(prompt, params)
        news: SimpleQueue[list[Update]] = SimpleQueue()
        self.thread.submit([request.sequence], news)
        stream = self._stream(request, news)
        next(stream)  # up to its `try`: a stream that nobody reads is cancelled too
        return stream

    def chat(
        self,
        messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, by the model's own chat template.

        Options and errors are those of `chat_request`: tools among them, whose calls come as `tool_calls`.
        """
        if isinstance(messages, Mapping):
            messages = [messages]
        single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        params = self._params(sampling_params, len(conversations))
        requests = [self.chat_request(*one, **options) for one in zip(conversations, params, strict=True)]
        return self.generate([request.prompt for request in requests], [request.params for request in requests])

    def stream_chat(
        self, messages: SequenceOf[Message], sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[StreamChunk]:
        """The same for one conversation, as a stream."""
        return self.stream(*self.chat_request(messages, sampling_params, **options))

    def chat_request(
        self,
        messages: SequenceOf[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: SequenceOf[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        tool_format: str | None = None,
        **template_variables: Any,
    ) -> ChatRequest:
        """What a conversation becomes, for `generate`, `stream` and those of an `AsyncEngine`; any thread may ask.

        tools: OpenAI's list of functions, shown to the model by its template; calls of them are read out of answers.
        tool_choice: "auto" (also None), "none", "required", or an object that names a function, as OpenAI has it.
        parallel_tool_calls: an answer may have several calls; else it ends behind the first.
        tool_format: how calls are written, where the chat template does not tell (`tools.FORMATS`).

        Raises RequestError for a malformed message, tool or choice, UserError for a model that has no chat template.
        """
        for name in template_variables.keys() & SamplingParams.__dataclass_fields__.keys():
            raise RequestError(f"{name} is a sampling parameter: give it as SamplingParams({name}=...).")
        options = ToolOptions(tools, tool_choice, parallel_tool_calls, tool_format)
        return self._chats.request(messages, self.resolve(sampling_params), options, template_variables)

    def chat_prompt(self, messages: SequenceOf[Message], **template_variables: Any) -> list[int]:
        """The token ids that a conversation becomes: the template's text, with no second BOS."""
        return self._chats.prompt(messages, template_variables)

    @cached_property
    def _chats(self) -> ChatFormat:
        if self.tokenizer is None or self.chat_template is None:
            raise UserError(
                f"{self.name} has no chat template: it continues text and does not chat. Use generate or stream."
            )
        return ChatFormat(self.name, self.tokenizer, self.chat_template)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for; SamplingParams() where it does not ask to sample."""
        return SamplingParams(**self.generation_config.sampling())

    def resolve(self, given: SamplingParams | None) -> SamplingParams:
        """These parameters, or the model's own; raises RequestError for anything else."""
        return self._params(given, 1)[0]

    def _params(self, given: SamplingParams | SequenceOf[SamplingParams] | None, count: int) -> list[SamplingParams]:
        return as_params(self.get_default_sampling_params() if given is None else given, count)

    def logits(self, token_ids: Prompt, last: int | None = None) -> "np.ndarray":
        """The logits (tokens, vocab) float32 of every position of one prefill, or of the `last`, for evaluation."""
        import numpy as np

        ids = self._maker.token_ids(token_ids)
        unwanted = 0 if last is None else len(ids) - last  # positions to come that nobody asks for

        def of(hidden: np.ndarray) -> np.ndarray:
            nonlocal unwanted
            first, unwanted = max(0, unwanted), unwanted - len(hidden)
            return self.model.logits(hidden[first:])

        return np.concatenate(self._reader.read(ids, of))

    def embed(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        *,
        normalize: bool = True,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[EmbeddingOutput]:
        """Each text as a vector: the mean of the model's last hidden states, of length 1 unless `normalize` is False.

        Texts are read one after the other, in chunks between the engine's steps; `is_cancelled` is asked before each.
        Raises RequestError for a text that cannot be read, before any is.
        """
        if not isinstance(normalize, bool):
            raise RequestError(f"normalize is {normalize!r:.60}; it must be True or False.")
        batch = as_prompts(prompts)
        texts = [self._reader.checked(self._maker.token_ids(prompt)) for prompt in batch]
        outputs = []
        for prompt, ids in zip(batch, texts, strict=True):
            sums = self._reader.read(ids, lambda hidden: sum_of(self.model.normed(hidden)), is_cancelled)
            text = prompt if isinstance(prompt, str) else None
            outputs.append(EmbeddingOutput(text, ids, mean_of(sums, len(ids), normalize)))
        return outputs

    def make_request(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> list[Request]:
        """The answers to be of one prompt, not yet queued: `thread.submit` takes the first's sequence.

        Raises RequestError for a prompt that cannot be served.
        """
        return self._maker.make(prompt, params, priority)

    def cancel(self, request: Request) -> None:
        """End a request that has not ended: its blocks are free before the next step."""
        if not request.finished:
            self.thread.finish(request.sequence, "abort")

    def stats(self) -> EngineStats:
        """What the engine is doing, and what it has done."""
        return self.thread.stats()

    def close(self) -> None:
        """End the engine and its thread; requests that are open fail with EngineDeadError, as do later ones."""
        self.thread.close()

    def take(self, request: Request, update: Update) -> None:
        """Let a request take in its news, and the engine know where a stop string has ended it."""
        if request.take(update):
            self.thread.finish(request.sequence, "stop")
        if request.is_reading:
            self._progress("prefill", request.num_computed, request.metrics.prompt_tokens)

    def _stream(self, request: Request, news: "SimpleQueue[list[Update]]") -> Iterator[StreamChunk]:
        try:
            yield request.chunk()  # for `stream`, which drops it
            while not request.finished:
                for update in news.get():
                    self.take(request, update)
                request.raise_error()
                if request.has_news():
                    yield request.chunk()
        finally:
            self.cancel(request)
