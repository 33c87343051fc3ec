"""The user's API: text in, text out.

The engine is built by loading.py and stepped by its own thread; nothing is known here of kernels, files or the network.
"""

import logging
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from inspect import signature
from os import PathLike
from queue import SimpleQueue
from random import Random
from typing import TYPE_CHECKING, Any, Never, Self, Unpack

from tinyserve.engine import EngineStats, EngineThread, Update
from tinyserve.engine_options import EngineKeywords, EngineOptions, takes_engine_options
from tinyserve.errors import RequestError, UserError
from tinyserve.progress import Progress
from tinyserve.sampling_params import DEFAULT_MAX_TOKENS, BeamSearchParams, SamplingParams, StructuredOutputs
from tinyserve.text.answer_bar import AnswerBar
from tinyserve.text.beam_search import BeamSearchOutput, beam_search
from tinyserve.text.chat import ChatFormat, ChatRequest, ToolOptions
from tinyserve.text.input_processor import InputProcessor
from tinyserve.text.pooling import EmbeddingOutput, PoolingRunner, mean_pool, sum_pool
from tinyserve.text.request import CompletionOutput, RequestOutput, RequestState, StreamChunk, outputs_of
from tinyserve.text.validation import Prompt, as_params, as_priorities, as_prompts

if TYPE_CHECKING:
    import numpy as np

    from tinyserve.explain import Explanation
    from tinyserve.pipeline.sliced import Slices

__all__ = ["LLM", "CompletionOutput", "EmbeddingOutput", "RequestOutput", "Stream", "StreamChunk"]

Message = Mapping[str, Any]

logger = logging.getLogger("tinyserve")

FINGERPRINT_TOKENS = 32


class LLM:
    """A model that is ready to answer.

    `model` is a preset, a Hugging Face repo id, a folder of safetensors or a .gguf file. Raises UserError for an
    option or a file that is wrong, HubError when a download fails; every message says what to do.
    """

    @takes_engine_options
    def __init__(
        self,
        model: str | PathLike[str],
        *,
        progress: Progress | None = None,
        reserve: Callable[[int], None] | None = None,
        **options: Unpack[EngineKeywords],
    ):
        """Load `model`.

        {options}
        progress: called with ("download NAME", bytes done, bytes in all) and ("load", numbers packed, numbers in all);
            the first time on a machine with ("compile KERNEL", how many, about how many in all); with ("wait", 0, 0) or
            ("wait download NAME", 0, 0) while another process compiles or downloads; and for a prompt that takes
            several steps with ("prefill", tokens done, tokens in all). By default all but the last is shown on stderr
            while it lasts, and where that is no terminal, a line tells of a download and of compiling.
        reserve: called with the bytes that weights (but for padding) and cache will take, before they take any; what it
            raises ends the loading.
        """
        given = EngineOptions.of(options, others=("progress", "reserve"))
        if not isinstance(model, str | PathLike) or not str(model):
            raise UserError(f"model is {model!r}; it must be a preset, a repo id, a folder or a .gguf file.")
        from tinyserve.loading import load_engine

        loaded = load_engine(model, given, progress, reserve)
        files, self.engine, self._progress = loaded.files, loaded.engine, loaded.progress
        self.options, self.cache_plan, self.model = loaded.options, loaded.plan, loaded.runner.model
        self.num_threads = loaded.runner.num_threads
        self.name, self.path, self.config = files.name, files.path, files.config
        self.tokenizer, self.chat_template = files.tokenizer, files.chat_template
        self.generation_config, self.end_tokens = files.generation, files.end_tokens
        self._input_processor = InputProcessor(
            self.name, self.tokenizer, self.config.vocab_size, self.engine, loaded.runners, given.seed
        )
        self.thread = EngineThread(self.engine)
        self.slices = loaded.slices  # of the model in other processes, where it is cut
        self._close = weakref.finalize(self, _close, self.thread, self.slices)  # also when the interpreter ends
        self._pooling = PoolingRunner(self.thread, self.engine.scheduler, loaded.runner)
        logger.info("%s: cache of %s", self.name, self.cache_plan)

    @property
    def dtype(self) -> str:
        """The dtype of the weights, by its own name."""
        return self.options.dtype

    @property
    def kv_cache_dtype(self) -> str:
        """The dtype of keys and values."""
        return self.options.kv_cache_dtype

    @property
    def max_model_len(self) -> int:
        """The tokens that a prompt and its answer can come to."""
        return self.cache_plan.max_model_len

    def __repr__(self) -> str:
        return f"LLM({self.name!r}, dtype={self.dtype!r}, max_model_len={self.max_model_len})"

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        priority: SequenceOf[int] | int = 0,
        progress_bar: bool | None = None,
        **unknown: Never,
    ) -> list[RequestOutput]:
        """Complete each prompt, a text or a list of token ids; the answers come in the order of the prompts.

        Give one SamplingParams for all prompts or a list of them; by default the model's own. Prompts of a lower
        `priority`, one number or one for each, are computed first. On a terminal several prompts have a progress bar,
        unless `progress_bar` says otherwise. Raises RequestError before any work where a prompt is refused; the
        first error where all requests failed; where only some did, an IncompleteError that has the outputs of all.
        """
        _refuse("generate", unknown)
        batch = as_prompts(prompts)
        params = self._params(sampling_params, len(batch))
        priorities = as_priorities(priority, len(batch))
        submitted = [self.make_request(*one) for one in zip(batch, params, priorities, strict=True)]
        requests = {request.sequence: request for answers in submitted for request in answers}
        updates: SimpleQueue[list[Update]] = SimpleQueue()
        try:
            self.thread.submit([answers[0].sequence for answers in submitted], updates)
            with AnswerBar(len(requests), progress_bar) as bar:
                while bar.answered < len(requests):
                    for update in updates.get():
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
        return beam_search(self, as_prompts(prompts), params, self.engine.scheduler.max_num_seqs, progress_bar)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None, **unknown: Never) -> "Stream":
        """Complete one prompt: an iterator of the pieces of its answer, each as soon as it is certain.

        A chunk never splits a character, nor lets the beginning of a stop string through. Leaving the loop early
        cancels the request.
        """
        _refuse("stream", unknown)
        params = self.resolve(sampling_params)
        for name in ("n", "best_of"):
            if (count := getattr(params, name) or 1) > 1:
                raise RequestError(
                    f"A stream is one answer, and {name} is {count}: use generate, or several streams.", param=name
                )
        (request,) = self.make_request(prompt, params)
        return Stream(self, request)

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
    ) -> "Stream":
        """Answer one conversation as a stream; options and errors are those of `chat_request`."""
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
        add_special_tokens: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> ChatRequest:
        """What a conversation becomes, for `generate`, `stream` and those of an `AsyncEngine`; any thread may ask.

        tools: OpenAI's list of functions, shown to the model by its template; calls of them are read out of answers.
        tool_choice: "auto" (also None), "none", "required", or an object that names a function, as OpenAI has it.
        parallel_tool_calls: an answer may have several calls; else it ends behind the first.
        tool_format: how calls are written, where the chat template does not tell (`tools.FORMATS`).
        add_special_tokens: add the model's BOS, if it has one, to a template that does not write it.
        chat_template_kwargs: what else the template reads, such as enable_thinking; keywords that are not among these
            are the same, and add_generation_prompt (by default True) and continue_final_message (the model goes on with
            the last message) among them. A reasoning_effort of "none" is enable_thinking=False as well.

        What a model thinks before it answers, between <think> and </think>, comes as `reasoning`; tool calls and
        structured outputs begin behind it.

        Raises RequestError for a malformed message, tool or choice, and for a model that has no chat template.
        """
        _refuse_sampling(template_variables)
        options = ToolOptions(tools, tool_choice, parallel_tool_calls, tool_format)
        variables = _template_variables(chat_template_kwargs, template_variables)
        return self._chats.request(messages, self.resolve(sampling_params), options, variables, add_special_tokens)

    def chat_prompt(
        self,
        messages: SequenceOf[Message],
        *,
        add_special_tokens: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> list[int]:
        """The token ids that a conversation becomes: the template's text, with no second BOS."""
        variables = _template_variables(chat_template_kwargs, template_variables)
        return self._chats.prompt(messages, variables, add_special_tokens)

    def chat_text(
        self,
        messages: SequenceOf[Message],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> str:
        """The text that a conversation becomes."""
        return self._chats.text(messages, _template_variables(chat_template_kwargs, template_variables))

    def new_call_id(self, random: Random | None = None) -> str:
        """An id for a tool call, for a client that sends it back: one that the model's own template takes."""
        return self._chats.new_call_id(random)

    @cached_property
    def _chats(self) -> ChatFormat:
        if self.tokenizer is None or self.chat_template is None:
            raise RequestError(
                f"{self.name} has no chat template: it continues text and does not chat. Use generate or stream.",
                param="messages",
            )
        return ChatFormat(self.name, self.tokenizer, self.chat_template, self.max_model_len)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for, else what its makers recommend, as its preset knows it.

        Where nobody says how long an answer may be, it is DEFAULT_MAX_TOKENS.
        """
        return SamplingParams(**{"max_tokens": DEFAULT_MAX_TOKENS, **self.generation_config.defaults()})

    def resolve(self, given: SamplingParams | None) -> SamplingParams:
        """These parameters, or the model's own; raises RequestError for anything else."""
        return self._params(given, 1)[0]

    def _params(self, given: SamplingParams | SequenceOf[SamplingParams] | None, count: int) -> list[SamplingParams]:
        return as_params(self.get_default_sampling_params() if given is None else given, count)

    def logits(self, token_ids: Prompt, last: int | None = None) -> "np.ndarray":
        """The logits (tokens, vocab) float32 of every position of one prefill, or of the `last`, for evaluation."""
        import numpy as np

        ids = self._input_processor.token_ids(token_ids)
        first = 0 if last is None else max(0, len(ids) - last)

        def wanted_logits(hidden: np.ndarray, start: int) -> np.ndarray:
            return self.model.logits(hidden[max(0, first - start) :])

        return np.concatenate(self._pooling.run(ids, wanted_logits))

    def explain(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> "Explanation":
        """One forward pass over a prompt with all that is in it: residual stream, attention weights, states, lens.

        What is computed is the engine's: `logits` are those of `LLM.logits`, bit for bit. Raises RequestError for a
        prompt that is refused or has more than 512 tokens, for structured outputs, and for a model cut into slices.
        """
        from tinyserve.explain.explain import Subject, explain
        from tinyserve.models.base import DecoderModel

        if not isinstance(self.model, DecoderModel):
            raise RequestError(
                f"{self.name} is cut into slices, and a whole model is explained: load it in one process.",
                param="prompt",
            )
        (request, *_) = self.make_request(prompt, self.resolve(sampling_params))
        text_of = (lambda token: f"<{token}>") if self.tokenizer is None else self.tokenizer.text_of
        eos_token_ids = self.engine.eos_token_ids
        subject = Subject(
            self.name, self.model, self.kv_cache_dtype, self.thread, self.num_threads, text_of, eos_token_ids, self
        )
        return explain(subject, request.sequence, prompt if isinstance(prompt, str) else None)

    def fingerprint(self) -> str:
        """A hash of the logits of a fixed prompt: engines that have the same one compute the same bits of answers."""
        from hashlib import blake2b

        tokens = [i * 7919 % self.config.vocab_size for i in range(min(FINGERPRINT_TOKENS, self.max_model_len - 1))]
        return blake2b(self.logits(tokens).tobytes(), digest_size=8).hexdigest()

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
            raise RequestError(f"normalize is {normalize!r:.60}; it must be True or False.", param="normalize")
        batch = as_prompts(prompts)
        texts = [self._pooling.checked(self._input_processor.token_ids(prompt)) for prompt in batch]
        outputs = []
        for prompt, ids in zip(batch, texts, strict=True):
            sums = self._pooling.run(ids, lambda hidden, _: sum_pool(self.model.normed(hidden)), is_cancelled)
            text = prompt if isinstance(prompt, str) else None
            outputs.append(EmbeddingOutput(text, ids, mean_pool(sums, len(ids), normalize)))
        return outputs

    def compile_grammar(self, spec: StructuredOutputs, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Compile what answers are to match ahead of the requests that do; raises RequestError for what cannot be."""
        self._input_processor.compile(spec, is_cancelled)

    def knows_grammar(self, spec: StructuredOutputs) -> bool:
        """Whether this grammar is compiled, and nobody waits for it."""
        return self._input_processor.knows(spec)

    def make_request(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> list[RequestState]:
        """A RequestState for each answer to a prompt, not queued yet: `thread.submit` takes the first one's sequence.

        Raises RequestError for a prompt that cannot be served.
        """
        return self._input_processor.make(prompt, params, priority)

    def cancel(self, request: RequestState) -> None:
        """End a request that has not ended: its blocks are free before the next step."""
        if not request.finished:
            self.thread.finish(request.sequence, "abort")

    def stats(self) -> EngineStats:
        """What the engine is doing, and what it has done."""
        return self.thread.stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and its thread; requests that are open fail with EngineDeadError, as do later ones."""
        self._close()

    def take(self, request: RequestState, update: Update) -> None:
        """Apply an update to a request; where a stop string has ended it, finish its sequence in the engine."""
        if request.take(update):
            self.thread.finish(request.sequence, "stop")
        if request.is_reading:
            self._progress("prefill", request.num_computed, request.metrics.prompt_tokens)


def _close(thread: EngineThread, slices: "Slices | None") -> None:
    thread.close()
    if slices is not None:
        slices.close()


# What is said beside `chat_template_kwargs`, and by other means.
_RESERVED = (
    signature(LLM.chat_request).parameters.keys() - {"template_variables"}
    | {"add_generation_prompt", "continue_final_message"}
    | SamplingParams.__dataclass_fields__.keys()
)


def _template_variables(kwargs: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a chat template; raises RequestError for `chat_template_kwargs` that other fields set."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise RequestError(
            f"chat_template_kwargs is {kwargs!r:.60}; it must be an object with the template's variables.",
            param="chat_template_kwargs",
        )
    for name in others.keys() & EngineOptions.__dataclass_fields__.keys():
        raise RequestError(f"{name} is an option of the model: give it as LLM(..., {name}=...).", param=name)
    for name in kwargs or ():
        if not isinstance(name, str) or name in _RESERVED:
            field = f"chat_template_kwargs.{name}"
            raise RequestError(f"{field} is given, and it is no variable for the template: leave it out.", param=field)
    variables = {**others, **(kwargs or {})}
    if variables.get("reasoning_effort") == "none":
        variables.setdefault("enable_thinking", False)
    return variables


def _refuse_sampling(keywords: Mapping[str, Any]) -> None:
    for name in keywords.keys() & SamplingParams.__dataclass_fields__.keys():
        raise RequestError(f"{name} is a sampling parameter: give it as SamplingParams({name}=...).", param=name)


def _refuse(method: str, keywords: Mapping[str, Any]) -> None:
    _refuse_sampling(keywords)
    for name in keywords:
        raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")


class Stream:
    """The pieces of one answer; one that is not read to its end is cancelled by `close`, or when it is collected."""

    def __init__(self, llm: LLM, request: RequestState):
        """Queue the request; raises EngineDeadError."""
        self._llm, self._request = llm, request
        self._updates: SimpleQueue[list[Update]] = SimpleQueue()
        self._untaken = deque[Update]()
        self._is_closed = False
        llm.thread.submit([request.sequence], self._updates)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> StreamChunk:
        """Wait for the next piece; raises why the request failed."""
        try:
            while not self._is_closed and not self._request.finished:
                if not self._untaken:
                    self._untaken += self._updates.get()
                self._llm.take(self._request, self._untaken.popleft())
                self._request.raise_error()
                if self._request.has_chunk():
                    return self._request.chunk()
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def _ipython_display_(self) -> None:
        """In a notebook, show the answer in its cell as it is written."""
        from tinyserve.text.notebook import show_stream

        show_stream(self)

    def close(self) -> None:
        """End the request before the engine's next step, if it has not ended; nothing comes any more."""
        self._is_closed = True
        self._llm.cancel(self._request)

    def __del__(self) -> None:
        self.close()
