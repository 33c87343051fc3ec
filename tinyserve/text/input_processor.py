"""The input processor: from a prompt and its parameters to a request (tokens, grammar, seed, detokenizer).

Knows text and ids both. What it makes is not queued: that is its caller's business.
"""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import lru_cache
from operator import index
from threading import Lock
from typing import TYPE_CHECKING, cast

from tinyserve.engine import Engine
from tinyserve.errors import RequestError
from tinyserve.sampling_params import SamplingParams, StructuredOutputs
from tinyserve.text.chat import ChatPrompt, OutputParser
from tinyserve.text.reasoning import Thinking, thinking_after
from tinyserve.text.request import RequestState
from tinyserve.text.tokenizer import Detokenizer, Tokenizer
from tinyserve.text.validation import Prompt

if TYPE_CHECKING:
    from tinyserve.model_runner import ModelRunner
    from tinyserve.text.grammar import Grammar, GrammarCompiler
    from tinyserve.text.masks import MaskFiller, TokenMatcher
    from tinyserve.text.reasoning_matcher import ThinkingTokens

_LAST = 16  # tokens, among which there is what a prompt ends with


class InputProcessor:
    """Makes requests for one engine; any thread may ask."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        engine: Engine,
        runners: SequenceOf["ModelRunner"],
        seed: int | None = None,
    ):
        """`name` is the model's, for errors; `runners` are given masks when the first grammar is asked for."""
        self._name, self._tokenizer, self._vocab_size = name, tokenizer, vocab_size
        self._engine, self._runners, self._seed = engine, runners, seed
        self._text_of = lru_cache(1 << 14)(tokenizer.text_of) if tokenizer else None
        self._grammars: GrammarCompiler | None = None
        self._masks: MaskFiller | None = None
        self._thinking_tokens: ThinkingTokens | None = None
        self._lock = Lock()

    def make(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> list[RequestState]:
        """The answers to be of one prompt; raises RequestError for a prompt that cannot be served."""
        ids = self.token_ids(prompt)
        params.check_vocabulary(self._vocab_size)
        grammar = self.compile(params.structured_outputs) if params.structured_outputs is not None else None
        bad_words = self.spellings(params.bad_words) if params.bad_words else []
        if params.best_of is not None and params.best_of > params.n:  # what is likeliest is told by log-probabilities
            params = replace(params, logprobs=params.logprobs or 0)
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        text = text if isinstance(text, str) else None
        is_chat = isinstance(prompt, ChatPrompt)
        chat = prompt if isinstance(prompt, ChatPrompt) else ChatPrompt([])
        format = chat.answer_format
        first = self._engine.make(ids, params, priority)
        answers = []
        for i, sequence in enumerate((first, *first.siblings)):
            if params.seed is None and self._seed is not None:
                # Requests of one program draw from streams of their own, the same in the next run.
                sequence.seed = (self._seed << 32) + sequence.request_id
            sequence.matcher, sequence.bad_words = grammar and grammar.matcher(), bad_words
            if is_chat or params.thinking_token_budget is not None:
                thinking = format.thinking if is_chat else self._thinking_after(ids)
                sequence.matcher = self._reasoning_matcher(thinking, sequence.matcher, params)
            # An answer to a template begins a text, unless it goes on with a message, as a completion does with the
            # prompt's. A grammar has a say in the first space, too.
            continues = text is not None or chat.continues or grammar is not None
            shown = format.shown_ids
            detokenizer, hidden = self._detokenizer(params, continues, shown), self._hidden(params, shown)
            parser = OutputParser(format) if is_chat else None
            answers.append(RequestState(sequence, text, detokenizer, i, self._text_of, parser, hidden))
        return answers

    def token_ids(self, prompt: Prompt) -> list[int]:
        """A prompt in tokens; raises RequestError for what is none, and for an id that the model does not have."""
        if isinstance(prompt, ChatPrompt):
            prompt = prompt.token_ids
        add_special_tokens = True
        if isinstance(prompt, Mapping):  # vLLM's TextPrompt and TokensPrompt
            add_special_tokens = prompt.get("add_special_tokens", True)
            if not isinstance(add_special_tokens, bool):
                raise RequestError(
                    f"add_special_tokens is {add_special_tokens!r:.60}; it must be True or False.",
                    param="add_special_tokens",
                )
            prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError(
                    f"{self._name} has synthetic weights and no tokenizer: give token ids instead of text.",
                    param="prompt",
                )
            most = self._engine.scheduler.max_model_len
            ids = self._tokenizer.encode_prompt(prompt, add_special_tokens, most)
        else:
            try:
                if not hasattr(prompt, "__getitem__") or isinstance(prompt, bytes):
                    raise TypeError  # an order is part of a prompt
                tokens = cast(SequenceOf[int], prompt)
                if any(isinstance(token, bool) for token in tokens):
                    raise TypeError  # True is 1 to Python, and no token to anybody
                ids = [index(token) for token in tokens]
            except TypeError:
                raise RequestError(
                    f"A prompt is text or a list of token ids, not {prompt!r:.60}.", param="prompt"
                ) from None
        # A tokenizer may know more tokens than the model has rows for, and a kernel does not look twice.
        if bad := [token for token in ids if not 0 <= token < self._vocab_size]:
            raise RequestError(
                f"Token id {bad[0]} is outside {self._name}'s vocabulary of {self._vocab_size}.",
                param="prompt",
            )
        return ids

    def spellings(self, texts: Iterable[str]) -> list[list[int]]:
        """Each text in tokens, without a space before it and with (vLLM's SamplingParams.update_from_tokenizer)."""
        if self._tokenizer is None:
            raise RequestError(
                f"{self._name} has synthetic weights and no tokenizer: it has no words to be bad_words.",
                param="bad_words",
            )
        words = [text.lstrip() or text for text in texts]
        spelled = [self._tokenizer.encode(before + word, False) for word in words for before in ("", " ")]
        return [ids for ids in spelled if ids]

    def _detokenizer(self, params: SamplingParams, continuation: bool, shown: frozenset[int]) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        return self._tokenizer.detokenizer(params.skip_special_tokens, continuation=continuation, shown=shown)

    def _hidden(self, params: SamplingParams, shown: frozenset[int]) -> dict[int, str]:
        """The special tokens that are left out of the text, and that a stop string names."""
        if self._tokenizer is None or not params.skip_special_tokens or not params.stop:
            return {}
        specials = self._tokenizer.specials.items()
        return {i: name for name, i in specials if i not in shown and any(name in stop for stop in params.stop)}

    def knows(self, spec: StructuredOutputs) -> bool:
        """Whether this grammar is compiled: then `make` does not wait for it."""
        return self._grammars is not None and self._grammars.knows(spec)

    def compile(self, spec: StructuredOutputs, is_cancelled: Callable[[], bool] = lambda: False) -> "Grammar":
        """The grammar of a spec, which is kept for those who ask again; raises as `GrammarCompiler.compile` does."""
        from tinyserve.text.grammar import GrammarCompiler

        if self._tokenizer is None:
            raise RequestError(
                f"{self._name} has synthetic weights and no tokenizer: it has no text to give a structure.",
                param="structured_outputs",
            )
        with self._lock:
            if self._grammars is None:
                self._grammars = GrammarCompiler(self._tokenizer, self._vocab_size, self._engine.eos_token_ids)
                self._start_masks()
        return self._grammars.compile(spec, is_cancelled)

    def _start_masks(self) -> None:
        """Have masks filled from now on; the lock is held."""
        from tinyserve.text.masks import MaskFiller

        if self._masks is None:
            self._masks = MaskFiller(self._vocab_size)
            for runner in self._runners:
                runner.masks = self._masks

    def _reasoning_matcher(
        self, thinking: Thinking, answer: "TokenMatcher | None", params: SamplingParams
    ) -> "TokenMatcher | None":
        """A matcher that lets the model think before what it is to answer, and for as long as it may."""
        budget = params.thinking_token_budget
        if (answer is None and budget is None) or self._tokenizer is None or thinking is Thinking.NONE:
            return answer
        from tinyserve.text.reasoning_matcher import ReasoningMatcher, ThinkingTokens

        with self._lock:
            if self._thinking_tokens is None:
                self._thinking_tokens = ThinkingTokens(self._tokenizer, self._vocab_size, self._engine.eos_token_ids)
            self._start_masks()
        return ReasoningMatcher(self._thinking_tokens, thinking, answer, budget)

    def _thinking_after(self, ids: SequenceOf[int]) -> Thinking:
        """What a prompt that is no conversation leaves open."""
        if self._tokenizer is None:
            return Thinking.NONE
        return thinking_after(self._tokenizer.decode(ids[-_LAST:], skip_special_tokens=False))
