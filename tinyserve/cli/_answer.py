"""What `ask` and its subcommands share: a model and a prompt in, a streamed answer and its statistics out.

Knows the Python API and the terminal; which words on the command line are the model is told by ask.py.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinyserve.cli._sampling import decide, explain
from tinyserve.errors import UserError

if TYPE_CHECKING:
    from tinyserve.cli._progress import StartLine
    from tinyserve.llm import LLM

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Question:
    """Everything the command line said."""

    model: str
    prompt: str
    sampling: Mapping[str, Any]  # SamplingParams by name, None where nothing was said
    system: str | None = None
    raw: bool = False
    dtype: str = "auto"
    threads: int | None = None
    json: bool = False
    quiet: bool = False
    verbose: bool = False


def read_prompt(prompt: str | None, model: str) -> str:
    """The prompt given, or standard input; raises UserError on a terminal, where waiting would look like hanging.

    Raises UserError, too, for a prompt that is empty or no text.
    """
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UserError(
            f'There is no prompt for {model}: give one after it (tinyserve ask {model} "..."), or pipe it in.'
        )
    if prompt is None or prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"Standard input is not UTF-8 text (at byte {error.start}): convert it first.") from None
    check_text(prompt)
    if not prompt.strip():
        raise UserError("The prompt is empty: give some text to answer or to continue.")
    return prompt


def check_text(text: str) -> None:
    """Raise UserError for bytes that are no UTF-8, which Python smuggles in from a command line as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The text is not UTF-8 (at character {error.start}): convert it first.") from None


def load(model: str, dtype: str, threads: int | None, **options: Any) -> "tuple[LLM, StartLine]":
    """An LLM with a progress line, which knows the seconds it took from here."""
    from tinyserve.cli._progress import StartLine

    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}; it must be at least 1.")
    with StartLine(model) as line:
        from tinyserve.llm import LLM

        llm = LLM(model, dtype=dtype, num_threads=threads, progress=line, **options)
    if threads is not None and llm.num_threads < threads:
        print(f"tinyserve: this process has {llm.num_threads} of the {threads} threads asked for", file=sys.stderr)
    return llm, line


def answer(question: Question) -> None:
    """Answer on stdout as the tokens come, statistics on stderr; with `json`, one object on stdout at the end."""
    llm, line = load(question.model, question.dtype, question.threads, max_num_seqs=1)
    uses_template = llm.chat_template is not None and not question.raw
    if question.system and not uses_template:
        raise UserError(f"--system needs a chat template, which {llm.name} does not have (or --raw turns off).")
    prompt: Any = question.prompt
    if uses_template:
        messages = [{"role": "system", "content": question.system}] if question.system else []
        prompt = llm.chat_prompt([*messages, {"role": "user", "content": question.prompt}])
    decoding = decide(llm, question.sampling, prompt, DEFAULT_MAX_TOKENS)
    if question.verbose:
        raw = "continued as it is (--raw)" if question.raw else "continued as it is: the model has no chat template"
        line.clear()
        print(explain(llm, decoding, "by the model's chat template" if uses_template else raw), file=sys.stderr)
    text, tokens, chunk = "", [], None
    try:
        for chunk in llm.stream(prompt, decoding.params):
            line.clear()
            text += chunk.text
            tokens += chunk.token_ids
            if not question.json:
                print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        line.clear()
        if text and not question.json:
            print(flush=True)  # what follows in the terminal begins on a line of its own
        raise
    assert chunk is not None  # a stream ends with a chunk that says why
    statistics = {
        "model": llm.name,
        "load_seconds": line.seconds,
        "prompt_tokens": chunk.metrics.prompt_tokens,
        "prefill_tokens_per_second": chunk.metrics.prefill_tokens_per_second,
        "time_to_first_token_seconds": chunk.metrics.time_to_first_token,
        "output_tokens": chunk.metrics.output_tokens,
        "decode_tokens_per_second": chunk.metrics.decode_tokens_per_second,
        "finish_reason": chunk.finish_reason,
        "dtype": llm.dtype,
        "threads": llm.num_threads,
    }
    if question.json:
        print(json.dumps({"text": text, "token_ids": tokens, **statistics}, ensure_ascii=False))
        return
    print(flush=True)
    if not question.quiet:
        print(describe(statistics, llm.max_model_len), file=sys.stderr)


def describe(statistics: dict[str, Any], max_model_len: int) -> str:
    """The statistics as a line for people."""
    decode = statistics["decode_tokens_per_second"]
    parts = [
        statistics["model"],
        f"load {statistics['load_seconds']:.2f} s",
        f"prefill {statistics['prompt_tokens']} tokens at {statistics['prefill_tokens_per_second']:.0f}/s",
        f"first token after {statistics['time_to_first_token_seconds']:.2f} s",
        f"{statistics['output_tokens']} tokens" + (f" at {decode:.0f}/s" if decode else ""),
        f"{statistics['dtype']}, {statistics['threads']} thread{'s' * (statistics['threads'] != 1)}",
    ]
    if statistics["finish_reason"] == "length":
        full = statistics["prompt_tokens"] + statistics["output_tokens"] >= max_model_len
        limit = f"at --max-tokens {statistics['output_tokens']}"
        parts.append(f"cut off {'where the context is full' if full else limit}")
    return "[" + " · ".join(parts) + "]"
