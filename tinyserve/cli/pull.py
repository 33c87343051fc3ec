"""`tinyserve pull`: downloads a model and prints where it is. It knows only `hub.resolve`."""

from typing import Annotated

import typer

from tinyserve.cli import _names


def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A preset, owner/name, or owner/name/file.gguf.",
            show_default=False,
            autocompletion=_names.models,
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION", help="A branch, tag or commit instead of the preset's own.", show_default=False
        ),
    ] = None,
) -> None:
    """Download a model and print its path.

    An interrupted download goes on where it stopped. Only what is needed is downloaded: config, tokenizer, chat
    template and safetensors; never pickles. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to
    huggingface_hub.

    \b
    Examples:
      tinyserve pull smollm2-135m
      tinyserve pull HuggingFaceTB/SmolLM2-360M --revision main
      tinyserve pull bartowski/SmolLM2-135M-Instruct-GGUF/SmolLM2-135M-Instruct-Q8_0.gguf
    """
    from tinyserve.checkpoints.hub import resolve

    print(resolve(model, revision=revision))
