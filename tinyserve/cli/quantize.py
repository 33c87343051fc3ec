"""`tinyserve quantize`: a model packed for the kernels, as a folder that loads in the time of reading it.

Knows how to print; the packing is in tinyserve/quantize.py.
"""

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from tinyserve.cli._options import Model
from tinyserve.models.dtypes import INTEGER_HELP


def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder to write, which must not exist yet.")],
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help=INTEGER_HELP)] = "int8",
) -> None:
    """Write a model with its weights packed.

    The folder has everything the model needs: packed weights as safetensors, config, tokenizer, chat template. It is
    named like any other folder (tinyserve ask OUT "..."), loads by memory map, and gives the very answers that
    --dtype gives on the original. A folder of int8 also runs as w8a8, and one of int4 as w4a8.

    \b
    Examples:
      tinyserve quantize smollm2-135m ./smollm2-int4 --dtype int4
      tinyserve ask ./smollm2-int4 "What is the capital of France?"
    """
    from tinyserve import quantize as packing
    from tinyserve.loading import reported_kernels
    from tinyserve.models.dtypes import resolve_dtype
    from tinyserve.progress import LoadProgress, size
    from tinyserve.tensor import _jit

    start = perf_counter()
    with LoadProgress(model) as progress, reported_kernels(progress), _jit.one_at_a_time(_jit.usable_cores()):
        nbytes, files = packing.write(model, out, dtype, progress)
    seconds = perf_counter() - start
    several = f" in {files} files" if files > 1 else ""
    print(f"{out} has {model} in {resolve_dtype(dtype)}: {size(nbytes)} of weights{several} ({seconds:.1f} s).")
