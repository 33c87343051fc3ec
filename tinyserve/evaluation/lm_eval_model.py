"""A model for lm-evaluation-harness, in this process: `lm_eval.simple_evaluate(model=TinyserveLM(llm), tasks=[...])`.

The only module that needs lm_eval (the extra `lm-eval`). It turns the harness's requests into ours; tokens and
likelihoods are the business of likelihood.py.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from lm_eval.api.model import LM

from tinyserve.errors import RequestError, UserError
from tinyserve.evaluation.likelihood import encode, encode_pair, loglikelihoods, prefix_token, rolling_pairs
from tinyserve.llm import LLM
from tinyserve.progress import ProgressBar, renamed
from tinyserve.sampling_params import SamplingParams
from tinyserve.text.chat_template import ChatTemplate

TASKS_FOLDER = str(files("tinyserve.evaluation") / "tasks" / "harness")  # TaskManager(include_path=TASKS_FOLDER)
MAX_GEN_TOKS = 256  # where a task does not say, as in the harness's own classes
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts


class TinyserveLM(LM):  # type: ignore[misc]
    """Answers the harness's three kinds of requests by an LLM, in the order in which they came."""

    def __init__(self, llm: LLM):
        super().__init__()
        self.llm = llm

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Requests of a context and a continuation; (sum of log-probabilities, whether greedy decoding writes it)."""
        pairs = [encode_pair(self.llm, *request.args) for request in requests]
        found = [tuple(one) for one in self._score(pairs)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Requests of one text each, of any length; the sum of the log-probabilities of all its tokens."""
        texts = [
            rolling_pairs(encode(self.llm, *request.args), prefix_token(self.llm), self.llm.max_model_len)
            for request in requests
        ]
        scores = iter(self._score([pair for pairs in texts for pair in pairs]))
        found = [sum(next(scores)[0] for _ in pairs) for pairs in texts]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Requests of a context and options; the texts up to a stop. All are one batch."""
        params = [sampling_params(options) for _, options in (request.args for request in requests)]
        prompts = []
        for request, one in zip(requests, params, strict=True):
            room = self.llm.max_model_len - one.max_tokens
            if room < 1:
                raise RequestError(
                    f"The task asks for {one.max_tokens} new tokens, and {self.llm.name} has room for "
                    f"{self.llm.max_model_len}, prompt included: lower max_gen_toks, or raise max_model_len.",
                    param="max_gen_toks",
                )
            prompts.append(encode(self.llm, request.args[0])[-room:])
        found = [output.outputs[0].text for output in self.llm.generate(prompts, params)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls its cache of rendered prompts by: the model's name without slashes."""
        return self.llm.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the harness's report; a checkpoint's other templates are not chosen from."""
        if not chat_template:
            return None
        return self._template().source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt it ends with the last message, to be gone on with."""
        if add_generation_prompt:
            return self._template().render(chat_history)
        last = chat_history[-1]
        history = [*chat_history[:-1], {**last, "content": last["content"].strip()}]
        return self._template().render(history, add_generation_prompt=False, continue_final_message=True)

    def _template(self) -> ChatTemplate:
        if self.llm.chat_template is None:
            raise UserError(f"{self.llm.name} has no chat template: evaluate it with apply_chat_template=False.")
        return self.llm.chat_template

    def _score(self, pairs: list[Any]) -> list[Any]:
        with ProgressBar() as bar:
            return loglikelihoods(self.llm, pairs, renamed(bar, "log-likelihoods"))


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """The harness's generation options, Hugging Face's names among them, as ours; greedy unless they ask to sample.

    Raises RequestError for an option that does not exist here.
    """
    rest = dict(options)
    lengths = [int(value) for name in _LENGTHS if (value := rest.pop(name, None)) is not None]
    until, sample = rest.pop("until", None) or [], rest.pop("do_sample", None)
    stop = [until] if isinstance(until, str) else until
    temperature = rest.pop("temperature", 1.0 if sample else 0.0)
    return SamplingParams(
        temperature=0.0 if sample is False else float(temperature),
        max_tokens=next(iter(lengths), MAX_GEN_TOKS),
        stop=[text for text in stop if text],
        **rest,
    )
