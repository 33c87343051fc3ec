"""`tinyserve completion`: the script with which a shell completes command lines, and the answers to what it asks.

Knows Typer's scripts and its protocol; which names there are is in _names.py.
"""

import os
from enum import StrEnum
from importlib import import_module
from typing import Annotated, Any

import typer

VARIABLE = "_TINYSERVE_COMPLETE"  # with it a shell's script asks


class Shell(StrEnum):
    """The shells there are scripts for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", show_choices=False)],
) -> None:
    """Print a script for the Tab key: bash, zsh or fish.

    With it your shell completes commands, options and names of models. Put it where the shell reads it when it starts,
    in zsh after compinit.

    \b
    Examples:
      tinyserve completion bash >> ~/.bashrc
      tinyserve completion zsh >> ~/.zshrc
      tinyserve completion fish > ~/.config/fish/completions/tinyserve.fish
    """
    print(_typer().get_completion_script(prog_name="tinyserve", complete_var=VARIABLE, shell=shell.value))


def answer(command: Any) -> int:
    """Print how the command line in the environment can go on; the exit code."""
    library = _typer()
    library.completion_init()
    return int(library.shell_complete(command, {}, "tinyserve", VARIABLE, os.environ[VARIABLE]))


def _typer() -> Any:
    return import_module("typer.completion")  # it imports what no other command needs
