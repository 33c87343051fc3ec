"""The programs: `tinyserve`, which is `python -m tinyserve` too, and one for each of four families."""

import signal
import sys


def main(called: str = "tinyserve") -> None:
    """Run a program. Until it can answer Ctrl-C itself, while its imports run, Ctrl-C just ends the process."""
    answered = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background job ignores it
    if answered:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tinyserve import cli

    if answered:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = cli.deliver_again
    cli.main(called)


def ask_gpt2() -> None:
    """`ask-gpt2`."""
    main("ask-gpt2")


def ask_falcon() -> None:
    """`ask-falcon`."""
    main("ask-falcon")


def ask_llama() -> None:
    """`ask-llama`."""
    main("ask-llama")


def ask_granite() -> None:
    """`ask-granite`."""
    main("ask-granite")


if __name__ == "__main__":
    main()
