"""`tinyserve explain`: one text's way through a model, in a terminal or as a page.

Knows how to print; what is shown is an `Explanation`, and its page is made in tinyserve/explain/page.py.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyserve.cli._answer import read_prompt
from tinyserve.cli._options import Dtype, Model, Threads, fields_of, sampling_options, with_options
from tinyserve.cli._sampling import given
from tinyserve.errors import UserError
from tinyserve.progress import size
from tinyserve.sampling_params import SamplingParams
from tinyserve.text.glass_box import visible

if TYPE_CHECKING:
    import numpy as np

    from tinyserve.explain import Explanation, Guess

WIDTH = 80
MOST_SEEN = 18  # tokens that a heat map has room for
SHADES = " ░▒▓█"
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """What `explain` can be told beside the model, the text and the sampling."""

    layer: Annotated[
        int | None,
        typer.Option(min=0, metavar="NUMBER", help="The layer whose heads are shown.  [default: the last attention]"),
    ] = None
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with all of it, for any browser.")
    ] = None
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False
    dtype: Dtype = "auto"
    threads: Threads = None


_SAMPLING = sampling_options("", ("max_tokens", "seed", "stop", "ignore_eos", "thinking_token_budget"), greedy=False)


@with_options(sampling=_SAMPLING, options=fields_of(ExplainOptions))
def explain(
    model: Model,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The text; standard input when left out, or '-'.")
    ] = None,
    *,
    sampling: dict[str, Any],
    options: ExplainOptions,
) -> None:
    """Follow one text through a model.

    Its tokens; how long the residual stream is behind each layer, and what the model would answer there (the logit
    lens); where each head of a layer looks, or how fast it forgets; what each step of the sampling chain removes; and
    what one token costs in each part. The text is read as it is, without a chat template.

    \b
    Examples:
      tinyserve explain gpt2 "The capital of France is"
      tinyserve explain smollm2-135m "The dog ran to the" --layer 12 --top-k 20
      tinyserve explain granite-350m "Once upon a time" --html out.html
    """
    from tinyserve.cli._load import load

    given(**sampling)
    prompt = read_prompt(text, model, "explain")
    if options.html is not None and not options.html.resolve().parent.is_dir():
        raise UserError(f"--html {options.html}: there is no folder {options.html.resolve().parent} to write it to.")
    llm, line = load(model, options.dtype, options.threads, max_num_seqs=1)
    line.clear()
    said = {name: value for name, value in sampling.items() if value is not None}
    told = llm.explain(prompt, SamplingParams(**{**llm.generation_config.defaults(), **said}))
    layer = _chosen(told, options.layer)
    if options.html is not None:
        try:
            options.html.write_text(told.html(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--html {options.html}: it cannot be written ({error.strerror}).") from None
    if options.json_:
        from tinyserve.explain.page import shown

        print(json.dumps(shown(told)))
    elif options.html is not None:
        print(f"{options.html}: {size(options.html.stat().st_size)}, to be opened in a browser.")
    else:
        show(told, layer)


def _chosen(told: "Explanation", layer: int | None) -> int:
    """The layer whose heads are shown; raises UserError for one that there is not."""
    if layer is not None and layer >= len(told.layers):
        raise UserError(f"--layer is {layer}; {told.model} has the layers 0 to {len(told.layers) - 1}.")
    return told.last_attention if layer is None else layer


def show(told: "Explanation", layer: int) -> None:
    """Print all of it, in 80 columns."""
    from tinyserve.cli._console import Output

    output = Output(width=WIDTH, highlight=False)

    def say(*lines: str, style: str | None = None) -> None:
        for text in lines:
            output.print(text, markup=False, style=style, no_wrap=True, overflow="ellipsis", crop=True)

    def titled(title: str, lines: Iterable[str]) -> None:
        say("")
        say(title, style="bold")
        say(*lines)

    say(f"{told.model}: {len(told.pieces)} tokens", style="bold")
    say(*_tokens(told))
    titled("Behind each layer: the stream's norm, and what the model would answer", _lens(told))
    if told.layers[layer].attention is not None:
        titled(f"Layer {layer}: where each head looks, from every token (rows) to all before it", _heads(told, layer))
    else:
        titled(f"Layer {layer}, Mamba2: how fast each head forgets", _half_lives(told, layer))
    titled("From logits to the next token", _sampling(told))
    titled("What one token costs", _costs(told))


def _tokens(told: "Explanation") -> list[str]:
    """Pieces with their ids, as many in a line as there is room for."""
    lines = [""]
    for piece, token in zip(told.pieces, told.prompt_token_ids, strict=True):
        word = f"{visible(piece)} {token}"
        if len(lines[-1]) + len(word) + 3 > WIDTH and lines[-1]:
            lines.append("")
        lines[-1] += ("   " if lines[-1] else "") + word
    return lines


def _lens(told: "Explanation") -> list[str]:
    from tinyserve.explain.explanation import softmax

    names = ["embedding", *(f"{i} {_kind(told, i)}" for i in range(len(told.layers)))]
    probabilities = softmax(told.lens())
    return [
        f"{name:<13}{norm:>8.2f}  {_guesses(told.likeliest(row, 4), 14)}".rstrip()
        for name, norm, row in zip(names, told.norms(), probabilities, strict=True)
    ]


def _heads(told: "Explanation", layer: int) -> list[str]:
    """A heat map for each head, side by side, and below each what the last token looks at most."""
    import numpy as np

    weights = told.layers[layer].attention
    assert weights is not None
    heads, tokens, _ = weights.shape
    first = max(0, tokens - MOST_SEEN)
    cell = 2 if tokens - first <= MOST_SEEN // 2 else 1
    width = max(cell * (tokens - first), 18)
    beside = max(1, (WIDTH + 2) // (width + 2))
    lines = []
    if first:
        lines.append(f"The last {tokens - first} of {tokens} tokens.")
    for start in range(0, heads, beside):
        row = range(start, min(heads, start + beside))
        lines.append("  ".join(f"{f'head {head}':<{width}}" for head in row))
        for t in range(first, tokens):
            shades = ["".join(_shade(weights[head, t, s]) * cell for s in range(first, tokens)) for head in row]
            lines.append("  ".join(f"{one:<{width}}" for one in shades))
        best = [int(np.argmax(weights[head, -1])) for head in row]
        said = [
            f"{visible(told.pieces[at])} {_percent(weights[head, -1, at])}" for head, at in zip(row, best, strict=True)
        ]
        lines += ["  ".join(f"{one[:width]:<{width}}" for one in said), ""]
    return [*lines[:-1], "", f"{SHADES[1:]} is 10, 30, 60 and 85 % and more; below: what the last token takes most of."]


def _half_lives(told: "Explanation", layer: int) -> list[str]:
    import numpy as np

    half = told.half_life(layer)
    decay = told.layers[layer].decay
    assert decay is not None
    lines = [f"{'head':<6}{'half is forgotten in':<24}share kept at each token"]
    for head, tokens in enumerate(half):
        kept = "".join(BARS[round(8 * float(share))] for share in decay[-40:, head])
        told_of = f"{tokens:.3g} tokens" if np.isfinite(tokens) else "never"
        lines.append(f"{head:<6}{told_of:<24}{kept}")
    return lines


def _sampling(told: "Explanation") -> list[str]:
    lines = [f"{'step':<19}{'removed':>9}{'left':>8}  likeliest"]
    for step in told.sampling:
        asked = "" if step.value is None or isinstance(step.value, dict | list | tuple) else f" {step.value:g}"
        removed = str(step.removed or "") if step.removed or not step.changed else f"{step.changed} moved"
        likeliest = _guesses(told.likeliest(step.probabilities, 3), 13)
        lines.append(f"{step.name + asked:<19.19}{removed:>9}{step.left:>8}  {likeliest}".rstrip())
    return lines


def _costs(told: "Explanation") -> list[str]:
    """The parts, layers that are alike as one."""
    found: dict[str, tuple[int, int, int]] = {}
    for cost in told.costs:
        words = cost.part.split()
        name = words[-1]
        count, nbytes, operations = found.get(name, (0, 0, 0))
        found[name] = count + 1, nbytes + cost.nbytes, operations + cost.operations
    whole = sum(nbytes for _, nbytes, _ in found.values())
    lines = [f"{'part':<16}{'layers':>7}{'weights read':>14}{'share':>8}{'operations':>14}"]
    for name, (count, nbytes, operations) in found.items():
        layers = "" if name in ("embedding", "head") else str(count)
        lines.append(f"{name:<16}{layers:>7}{size(nbytes):>14}{_percent(nbytes / whole):>8}{operations:>14,}")
    return lines


def _kind(told: "Explanation", layer: int) -> str:
    return "attention" if told.layers[layer].attention is not None else "mamba2"


def _guesses(guesses: "Sequence[Guess]", width: int) -> str:
    """Guesses in columns."""
    return "".join(
        f"{visible(guess.text)} {_percent(guess.probability)}"[: width - 1].ljust(width) for guess in guesses
    )


def _shade(share: "float | np.floating") -> str:
    return SHADES[sum(bool(share >= bound) for bound in (0.1, 0.3, 0.6, 0.85))]


def _percent(share: "float | np.floating") -> str:
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"
