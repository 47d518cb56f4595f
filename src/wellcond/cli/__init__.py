"""The command `wellcond`, one file per subcommand: `train` a network, `compare` a grid, list `recipes`, summarise
`data`, `inspect` a network, `report` on runs, `bench` solvers.

User errors are one line on standard error and exit status 2; Ctrl-C and SIGTERM print how to resume and exit with
status 130 and 143. Modules that need torch are imported inside the commands, so that `--help` is fast.
"""

from __future__ import annotations

import sys

try:
    from wellcond.cli.commands import app
except ModuleNotFoundError as _missing:
    if (_missing.name or "").split(".")[0] == "wellcond":
        raise
    print(
        f"error: the command wellcond needs the package '{_missing.name}', which is not installed: "
        'pip install "wellcond[train]"',
        file=sys.stderr,
    )
    raise SystemExit(2) from None

from wellcond._shared.streams import make_patient

__all__ = ["app", "main"]


def main() -> None:
    """The entry point of the package."""
    make_patient()
    app()
