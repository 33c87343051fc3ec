"""`tinyserve chat`: a conversation in the terminal.

Knows the loop of asking and answering; the messages become text by the model's own template, in llm.py.
"""

import sys
from typing import Annotated

import typer

from tinyserve import presets
from tinyserve.errors import TinyserveError, UserError

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def chat(
    model: Annotated[str, typer.Argument(help="A preset, a repo id, a folder or a .gguf file.")] = presets.DEFAULT,
    system: Annotated[str | None, typer.Option(help="A system message at the beginning.")] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", "--temp", help="0 is greedy; higher is more random.")
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.")] = 512,
    top_p: Annotated[float, typer.Option("--top-p", "-p", help="Draw from tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Draw from this many most likely tokens.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes random answers repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or int8 (the default).")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads; by default the cores this process may use.")] = None,
) -> None:
    """Talk to a model in the terminal. It remembers the conversation until its context is full.

    Inside: /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer.

    \b
    Examples:
      tinyserve chat
      tinyserve chat smollm2-360m --system "You are a pirate." --temp 0.7
    """
    from tinyserve.cli._answer import load
    from tinyserve.sampling_params import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, top_p=top_p, top_k=top_k, seed=seed)
    llm, seconds = load(model, dtype, threads)
    if llm.chat_template is None:
        raise UserError(f'{llm.name} has no chat template; let it continue a text: tinyserve ask {model} "..."')
    print(f"{llm.name}, loaded in {seconds:.1f} s. {HELP}", file=sys.stderr)
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = list(beginning)
            print("The conversation is forgotten.", file=sys.stderr)
        elif line.startswith("/"):
            print(f"There is no {line.split()[0]}: {HELP}", file=sys.stderr)
        elif line:
            question = {"role": "user", "content": line}
            text = ""
            try:
                for chunk in llm.stream_chat([*messages, question], params):
                    text += chunk.text
                    print(chunk.text, end="", flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="", file=sys.stderr)
            except TinyserveError as error:
                print(f"tinyserve: {error} (/reset begins anew)", file=sys.stderr)
                continue
            print(flush=True)
            messages += [question, {"role": "assistant", "content": text}]
