"""`python -m wellcond.cli` is the command `wellcond`."""

from wellcond.cli import main

main()
