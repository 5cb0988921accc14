"""`python -m launcher` is `cl-dist`."""

from launcher.cli import main

main()
