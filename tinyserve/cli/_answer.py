"""What `ask` and `chat` share: a prompt in, a streamed answer and its statistics out.

Knows the terminal; ask.py finds the model on the command line, and _backends.py reaches it.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinyserve.cli._answer_printer import AnswerPrinter
from tinyserve.errors import TinyserveError, UserError
from tinyserve.sampling_params import DEFAULT_MAX_TOKENS

if TYPE_CHECKING:
    from tinyserve.cli._backends import Backend

BYTE_ORDER_MARK = "\ufeff"  # editors on Windows, and PowerShell's pipes, begin a text with it


@dataclass(frozen=True)
class Question:
    """Everything the command line said, but who is to answer."""

    prompt: str
    sampling: Mapping[str, Any]  # SamplingParams by name, None where nothing was said
    system: str | None = None
    raw: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False


def read_prompt(prompt: str | None, model: str, command: str = "ask") -> str:
    """The prompt given, and behind it what is piped in, or that alone, as `llm` and `ollama run` have it.

    Raises UserError on a terminal without a prompt, where waiting would look like hanging, and for a prompt that is
    empty or no text.
    """
    is_piped = sys.stdin is not None and not sys.stdin.closed and not sys.stdin.isatty()
    if prompt is None and not is_piped:
        raise UserError(
            f'There is no prompt for {model}: give one after it (tinyserve {command} {model} "..."), or pipe it in.'
        )
    if prompt is None or prompt == "-":
        prompt = _read_stdin()
    elif is_piped and (piped := _read_stdin()).strip():
        prompt = f"{prompt}\n\n{piped}"
    check_text(prompt)
    if not prompt.strip():
        raise UserError("The prompt is empty: give some text to answer or to continue.")
    return prompt


def _read_stdin() -> str:
    try:
        return sys.stdin.read().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UserError(f"Standard input is not UTF-8 text (at byte {error.start}): convert it first.") from None


def check_text(text: str) -> None:
    """Raise UserError for bytes that are no UTF-8, which Python smuggles in from a command line as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The text is not UTF-8 (at character {error.start}): convert it first.") from None


def answer(question: Question, backend: "Backend") -> None:
    """Answer on stdout as the tokens come, statistics on stderr; with `json`, one object on stdout at the end."""
    chats = backend.chats and not question.raw
    if question.system and not chats:
        raise UserError(f"--system needs a chat template, which {backend.name} does not have (or --raw turns off).")
    system = [{"role": "system", "content": question.system}] if question.system else []
    prompt = [*system, {"role": "user", "content": question.prompt}] if chats else question.prompt
    completion = backend.complete(prompt, question.sampling, DEFAULT_MAX_TOKENS)
    if question.verbose:
        raw = "continued as it is (--raw)" if question.raw else "continued as it is: the model has no chat template"
        backend.line.clear()
        print(completion.explain("by the model's chat template" if chats else raw), file=sys.stderr)
    printer = AnswerPrinter(backend.line, is_silent=question.json)
    try:
        with closing(completion.stream()) as pieces:
            for piece in pieces:
                printer.write(piece)
    except (KeyboardInterrupt, TinyserveError):
        printer.clear()
        if printer.text and not question.json:
            print(flush=True)  # what follows in the terminal begins on a line of its own
        raise
    printer.clear()
    statistics = completion.statistics()
    if question.json:
        thought = {"reasoning": printer.reasoning} if printer.reasoning else {}
        print(json.dumps({"text": printer.text, **thought, **statistics}, ensure_ascii=False))
        return
    print(flush=True)
    if not question.quiet:
        print(describe(statistics, backend.max_model_len), file=sys.stderr)


def describe(statistics: dict[str, Any], max_model_len: int | None) -> str:
    """The statistics as a line for people: what is known of them."""
    known = {name: value for name, value in statistics.items() if value is not None}
    parts = [known["model"]]
    if "load_seconds" in known:
        parts.append(f"load {known['load_seconds']:.2f} s")
    if "prompt_tokens" in known:
        cached = f", {known['cached_tokens']} of them cached" if known.get("cached_tokens") else ""
        parts.append(f"prefill {known['prompt_tokens']} tokens{cached}{_speed(known, 'prefill')}")
    if "time_to_first_token_seconds" in known:
        parts.append(f"first token after {known['time_to_first_token_seconds']:.2f} s")
    if "output_tokens" in known:
        parts.append(f"{known['output_tokens']} tokens{_speed(known, 'decode')}")
    if "threads" in known:
        parts.append(f"{known['dtype']}, {known['threads']} thread{'s' * (known['threads'] != 1)}")
    elif "dtype" in known:
        parts.append(known["dtype"])
    if known.get("finish_reason") == "length":
        parts.append(_cut_off(known, max_model_len))
    return "[" + " · ".join(parts) + "]"


def _speed(known: dict[str, Any], phase: str) -> str:
    speed = known.get(f"{phase}_tokens_per_second")
    return f" at {speed:.0f}/s" if speed else ""


def _cut_off(known: dict[str, Any], max_model_len: int | None) -> str:
    if "prompt_tokens" not in known or "output_tokens" not in known:
        return "cut off at --max-tokens"
    if max_model_len is not None and known["prompt_tokens"] + known["output_tokens"] >= max_model_len:
        return "cut off where the context is full"
    return f"cut off at --max-tokens {known['output_tokens']}"
