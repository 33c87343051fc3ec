"""`tinyserve chat`: a conversation in the terminal.

Knows the loop of asking and answering; the messages become text by the model's own template, in llm.py.
"""

import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from tinyserve import presets
from tinyserve.cli._options import (
    Dtype,
    MinP,
    Model,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
    TypicalP,
    Verbose,
)
from tinyserve.cli._sampling import decide, explain, given
from tinyserve.errors import TinyserveError, UserError

DEFAULT_MAX_TOKENS = 512
HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer or drops a line."


def chat(
    model: Model = presets.DEFAULT,
    system: System = None,
    temperature: Temperature = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            help=f"At most this many tokens an answer.  [default: the model's own, else {DEFAULT_MAX_TOKENS}]",
        ),
    ] = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    typical_p: TypicalP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    verbose: Verbose = False,
) -> None:
    """Talk to a model in the terminal.

    It remembers the conversation until its context is full. Inside, /reset forgets the conversation, /exit or
    Ctrl-D leaves, Ctrl-C stops an answer.

    \b
    Examples:
      tinyserve chat
      tinyserve chat smollm2-360m --system "You are a pirate." --temp 0.7
    """
    from tinyserve.cli._answer import check_text, load

    sampling: dict[str, Any] = {
        "temperature": temperature, "max_tokens": max_tokens, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "typical_p": typical_p, "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    given(**sampling)
    llm, start = load(model, dtype, threads, max_num_seqs=1)
    if llm.chat_template is None:
        raise UserError(f"{llm.name} has no chat template: let it continue a text with `tinyserve ask {model}`.")
    print(f"{llm.name}, loaded in {start.seconds:.1f} s. {HELP}", file=sys.stderr)
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    if prompt:
        with suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history for input()
    interrupted = False
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if interrupted or not prompt:
                raise
            interrupted = True
            print("\n(Ctrl-C once more, Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        except UnicodeDecodeError:
            raise UserError("Standard input is not UTF-8 text: convert it first.") from None
        interrupted = False
        command = line.split()[0].lower() if line else ""
        if command in ("/exit", "/quit") or line.lower() in ("exit", "quit"):
            return
        if command == "/reset":
            messages = list(beginning)
            print("The conversation is forgotten.", file=sys.stderr)
        elif line.startswith("/"):
            print(f"There is no {command}: {HELP}", file=sys.stderr)
        elif line:
            question = {"role": "user", "content": line}
            text = ""
            try:
                check_text(line)
                asked = llm.chat_prompt([*messages, question])
                decoding = decide(llm, sampling, asked, DEFAULT_MAX_TOKENS)
                if verbose:
                    start.clear()
                    print(explain(llm, decoding, "the conversation so far"), file=sys.stderr)
                for chunk in llm.stream(asked, decoding.params):
                    start.clear()
                    text += chunk.text
                    print(chunk.text, end="", flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="", file=sys.stderr)
            except TinyserveError as error:
                print(f"tinyserve: {error} (/reset begins anew)", file=sys.stderr)
                continue
            print(flush=True)
            messages += [question, {"role": "assistant", "content": text}]
