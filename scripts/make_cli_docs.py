"""Write docs/cli.md from the command tree: usage, help, arguments and options of every command.

    python scripts/make_cli_docs.py            # writes docs/cli.md
    python scripts/make_cli_docs.py --check    # exits with 1 when docs/cli.md is stale

Reads the parameters themselves and not the rendered help, which differs between versions of Typer.
"""

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import typer

from tinyserve import cli

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
INTRODUCTION = """\
<!-- Written by scripts/make_cli_docs.py; do not edit. -->
# The command line

Answers go to stdout, everything else to stderr. An error is one sentence with the way out in it; the exit code is 2
where the command line, a file or a prompt is wrong, 1 where something else is, and 130 after Ctrl-C. Every command
explains itself with `--help` or `-h`; `tinyserve --version` prints the version.
"""


def page() -> str:
    """The whole page, as Markdown."""
    root: Any = typer.main.get_command(cli.app)
    parts = [INTRODUCTION]
    for name in root.list_commands(None):
        command = root.commands[name]
        parts.append(section(command, f"tinyserve {name}"))
        for family, sub in getattr(command, "commands", {}).items():
            if not sub.hidden:
                parts.append(family_section(sub, f"tinyserve {name} {family}"))
    return "\n".join(parts)


def section(command: Any, path: str) -> str:
    """One command: usage, help, tables of its arguments and options."""
    described = command
    if hasattr(command, "commands"):  # `ask` by itself takes what its hidden command takes
        (described,) = (sub for sub in command.commands.values() if sub.hidden)
    arguments = [p for p in described.params if p.param_type_name == "argument"]
    options = [p for p in described.params if p.param_type_name == "option" and not is_help(p)]
    lines = [f"## {path}", "", "```", f"{path} {usage(arguments)}", "```", "", prose(command.help)]
    for title, parameters in (("Argument", arguments), ("Option", options)):
        if parameters:
            lines += ["", f"| {title} | Default | Meaning |", "|---|---|---|", *map(row, parameters)]
    return "\n".join(lines) + "\n"


def family_section(command: Any, path: str) -> str:
    """A family's subcommand, whose options are those of `ask`."""
    (variant,) = (p for p in command.params if "--model" in p.opts)
    note = f"`--model` is `{variant.default}` unless given; the other options are those of `tinyserve ask`."
    return f"### {path}\n\n{prose(command.help)}\n\n{note}\n"


def usage(arguments: list[Any]) -> str:
    """The arguments as a usage line shows them."""
    words = ["[OPTIONS]"]
    for argument in arguments:
        word = argument.metavar.rstrip(".") + ("..." if argument.nargs == -1 else "")
        words.append(word if argument.required else f"[{word}]")
    return " ".join(words)


def prose(text: str) -> str:
    """A help text as Markdown: paragraphs in one line each, examples in a code block."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.lstrip().startswith("\b"):
            _, title, *examples = paragraph.strip("\n").splitlines()
            code = "\n".join(line.strip() for line in examples)
            parts.append(f"{title}\n\n```bash\n{code}\n```")
        else:
            parts.append(escape(" ".join(paragraph.split())))
    return "\n\n".join(parts)


def row(parameter: Any) -> str:
    """One line of a table."""
    name = f"`{parameter.metavar}`"
    if parameter.param_type_name == "option":
        takes = "" if parameter.is_flag else f" {parameter.metavar}"
        name = ", ".join(f"`{option}`" for option in parameter.opts) + takes
    meaning, _, default = (parameter.help or "").partition("  [default: ")
    if default:
        default = default.rstrip("]")
    elif parameter.default is not None and not parameter.required and not getattr(parameter, "is_flag", False):
        default = f"`{parameter.default}`"
    return f"| {name} | {default} | {escape(meaning)} |"


def escape(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def is_help(parameter: Any) -> bool:
    """Whether this is the option that every command has."""
    return "--help" in parameter.opts


def keep_current(path: Path, wanted: str, script: str, does: str) -> int:
    """Write a page, or with --check tell whether it is what `script` writes; the exit code."""
    parser = argparse.ArgumentParser(description=does)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page is stale")
    if parser.parse_args().check:
        if path.is_file() and path.read_text(encoding="utf-8") == wanted:
            return 0
        print(f"{path} is stale: run python scripts/{script}", file=sys.stderr)
        return 1
    path.write_text(wanted, encoding="utf-8")
    return 0


def main() -> int:
    return keep_current(PAGE, page(), Path(__file__).name, __doc__.splitlines()[0])


if __name__ == "__main__":
    raise SystemExit(main())
