"""The program: `tinyserve`, and `python -m tinyserve`."""

import signal
import sys


def main() -> None:
    """Run the command line. Until it can answer Ctrl-C itself, while its imports run, Ctrl-C just ends the process."""
    answered = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background job ignores it
    if answered:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tinyserve import cli

    if answered:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = cli.deliver_again
    cli.main()


if __name__ == "__main__":
    main()
