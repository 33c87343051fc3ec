"""`python -m tinyserve` is `tinyserve`."""

from tinyserve.cli import main

main()
