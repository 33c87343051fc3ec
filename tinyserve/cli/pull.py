"""`tinyserve pull`: downloads a model and prints where it is. It knows only `hub.resolve`."""

from typing import Annotated

import typer


def pull(
    model: Annotated[str, typer.Argument(help="A preset, owner/name, or owner/name/file.gguf.", show_default=False)],
    revision: Annotated[
        str | None,
        typer.Option(help="A branch, tag or commit instead of the preset's own.", show_default=False),
    ] = None,
) -> None:
    """Download a model, or finish an interrupted download, and print its path.

    Only what is needed is downloaded: config, tokenizer, chat template and safetensors; never pickles.
    HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to huggingface_hub.

    \b
    Examples:
      tinyserve pull smollm2-135m
      tinyserve pull Qwen/Qwen2-0.5B --revision main
      tinyserve pull bartowski/SmolLM2-135M-Instruct-GGUF/SmolLM2-135M-Instruct-Q8_0.gguf
    """
    from tinyserve.hub import resolve

    print(resolve(model, revision=revision))
