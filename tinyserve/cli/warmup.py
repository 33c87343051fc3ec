"""`tinyserve warmup`: everything a first answer would wait for, done ahead.

Knows the Python API; what is compiled and where it is kept is in tensor/_jit.py.
"""

from tinyserve.checkpoints import presets
from tinyserve.cli._options import Dtype, Model


def warmup(
    model: Model = presets.DEFAULT,
    dtype: Dtype = "auto",
) -> None:
    """Download a model and compile its kernels.

    The next answer then starts at once: kernels are compiled once a machine and dtype, and models with layers of
    the same kinds share them.

    \b
    Examples:
      tinyserve warmup
      tinyserve warmup gpt2 --dtype float32
    """
    from tinyserve.cli._load import load

    llm, line = load(model, dtype, None)
    seconds = line.seconds + line.compile_seconds
    print(f"{llm.name} is ready in {llm.dtype} on {llm.num_threads} threads ({seconds:.1f} s).")
