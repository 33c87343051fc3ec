"""`tinyserve eval`: what a dtype costs in accuracy, on a text of the user's or in the tasks that come along.

Knows how to read a file and to print; the measuring is in evaluation/perplexity.py, the tasks in cli/_eval_tasks.py.
"""

import codecs
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyserve import __version__
from tinyserve.checkpoints import presets
from tinyserve.cli._eval_tasks import LIST, evaluate_tasks, print_list
from tinyserve.cli._options import Model, Threads, fields_of, with_options
from tinyserve.errors import TinyserveError, UserError
from tinyserve.models.dtypes import HELP

if TYPE_CHECKING:
    from tinyserve.evaluation.perplexity import Row
    from tinyserve.llm import LLM

NO_REFERENCE = "none"
WINDOW = 1024


@dataclass(frozen=True)
class TextOptions:
    """A text, and how it is read."""

    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text, in UTF-8. This or a task must be given.")
    ] = None
    against: Annotated[
        str, typer.Option(metavar="DTYPE", help="The dtype to compare with; none leaves the comparison out.")
    ] = "float32"
    window: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Tokens that are read at once.")] = WINDOW
    tokens: Annotated[
        int | None, typer.Option(min=2, metavar="NUMBER", help="Only the first so many tokens of the text.")
    ] = None


@with_options(text_options=fields_of(TextOptions))
def evaluate(
    model: Model = presets.DEFAULT,
    *,
    text_options: TextOptions,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A task, instead of a text; several times for several. `list` shows them."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DTYPE",
            help=f"{HELP.removesuffix('.')}; can be given several times.  [default: auto]",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, metavar="NUMBER", help="Only the first so many questions of each task.")
    ] = None,
    threads: Threads = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Measure what a dtype costs in accuracy, by text or tasks.

    The text is cut into windows, and each token but the first is predicted from those before it in its window.
    Printed are the perplexity; bits per byte, which is the cross entropy of the predicted tokens in bits over the
    UTF-8 bytes they stand for, special tokens having none; and, against float32 on the same weights, the change of
    perplexity, the mean of KL(float32 ‖ dtype) in nats a token, and how often both find the same token likeliest.
    Two models are in memory at a time, or one with --against none.

    A task is a set of questions that come with tinyserve. Printed is how many of n answers are right, with the standard
    error: acc takes the likeliest choice by the sum of its tokens' log-probabilities, acc_norm by that sum over the
    choice's characters, exact_match what the model writes. No chat template is applied.

    \b
    Examples:
      tinyserve eval smollm2-135m --text book.txt
      tinyserve eval gpt2 --text book.txt --dtype int8 --dtype bfloat16 --json
      tinyserve eval ./model.gguf --text book.txt --tokens 5000 --against none
      tinyserve eval --task list
      tinyserve eval smollm2-135m --task cloze --task arithmetic --dtype int8 --dtype float32
    """
    if task:
        if text_options != TextOptions():
            raise UserError("--text, --tokens, --window and --against are for a text: give a task or a text, not both.")
        if LIST in task:
            print_list()
        else:
            evaluate_tasks(model, task, dtype or ["auto"], limit, threads, json_)
        return
    if limit is not None:
        raise UserError("--limit is for tasks: give --task NAME with it, or --tokens with a text.")
    _evaluate_text(model, _read(text_options.text), text_options, dtype or ["auto"], threads, json_)


def _evaluate_text(
    model: str, content: bytes, options: TextOptions, names: Sequence[str], threads: int | None, as_json: bool
) -> None:
    """Read the text in each dtype, and print a table or an object."""
    from tinyserve.cli._load import load
    from tinyserve.evaluation import perplexity as measure
    from tinyserve.loading import open_model
    from tinyserve.models.dtypes import resolve_dtype
    from tinyserve.progress import ProgressBar
    from tinyserve.tensor._jit import cpu_name

    reference = None if options.against == NO_REFERENCE else resolve_dtype(options.against)
    dtypes = [resolve_dtype(name) for name in names]
    files = open_model(model)
    passage = measure.Text.encode(files, content.decode(), options.tokens)
    window = min(options.window, files.config.max_position_embeddings)

    def load_in(dtype: str) -> "LLM":
        nonlocal threads
        llm, _ = load(model, dtype, threads, max_num_seqs=1, max_model_len=max(2, window))
        threads = llm.num_threads  # what there are: that some are missing is said once
        return llm

    with ProgressBar() as bar:
        rows = list(measure.run(load_in, passage, dtypes, reference, window, bar))
    if damaged := [row.dtype for row in rows if math.isnan(row.perplexity)]:
        raise TinyserveError(
            f"{files.name} computes logits that are not numbers in {', '.join(damaged)}: its weights are damaged."
        )
    assert options.text is not None and files.path is not None
    sha256 = hashlib.sha256(content).hexdigest()
    recipe = {
        "tinyserve": __version__,
        "processor": cpu_name(),
        "threads": threads,
        "model": files.name,
        "weights": files.path.name,
        "text": options.text.name,
        "text_sha256": sha256,
        "text_bytes": passage.num_bytes,
        "tokens": len(passage.token_ids) - 1,
        "window": window,
        "against": reference,
    }
    if as_json:
        print(json.dumps({**recipe, "results": [asdict(row) for row in rows]}))
        return
    print(
        f"{files.name} ({files.path.name}) on {options.text.name} (sha256 {sha256[:16]}): "
        f"{recipe['tokens']} tokens predicted in windows of {window}"
    )
    _print_table(rows, reference)


def _read(text: Path | None) -> bytes:
    """The bytes of a file of UTF-8 text; raises UserError that says what is wrong with it."""
    if text is None:
        raise UserError(
            "There is no text to evaluate on: give a file in UTF-8 with --text FILE, best some thousand words of the "
            "kind that the model is for, or a task (--task list shows them)."
        )
    try:
        content = text.read_bytes().removeprefix(codecs.BOM_UTF8)
        if not content.decode().strip():
            raise UserError(f"{text} is empty: give a file with some text.")
    except OSError as error:
        raise UserError(f"{text} cannot be read ({error.strerror}): give --text a file of UTF-8 text.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{text} is not UTF-8 text (at byte {error.start}): convert it first.") from None
    return content


def _print_table(rows: "list[Row]", reference: str | None) -> None:
    """A line for each dtype; the columns of a comparison only where there is one."""
    compared = any(row.kl is not None for row in rows)
    differences = f"{'change':>11}{'KL, nats':>11}{'top-1 equal':>14}   against {reference}" if compared else ""
    print(f"{'dtype':<10}{'perplexity':>12}{'bits/byte':>12}{differences}")
    for row in rows:
        line = f"{row.dtype:<10}{row.perplexity:>12.3f}{row.bits_per_byte:>12.4f}"
        if row.perplexity_change is not None and row.kl is not None and row.top1 is not None:
            line += f"{row.perplexity_change * 100:>+9.2f} %{row.kl:>11.5f}{row.top1 * 100:>12.2f} %"
        print(line)
