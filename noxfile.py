"""The tests on other versions of Python and PyTorch: ``pip install nox``, then ``nox --list``, ``nox -s python-3.13``.

Each session has an environment of its own. Arguments after ``--`` are passed on to pytest.
"""

from pathlib import Path

import nox

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.6.0", "2.7.1", "2.9.1", "2.11.0", "2.14.1")
"""Other versions than that of ``constraints.txt``."""
OF_TORCH = ("torch", "sympy")
"""Pins that another PyTorch replaces: PyTorch 2.6 wants one version of SymPy and no other."""

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True


@nox.session(python=PYTHONS)
def python(session: nox.Session) -> None:
    """With the versions of ``constraints.txt``."""
    _test(session, Path("constraints.txt").read_text())


@nox.session(python=PYTHONS[0])
@nox.parametrize("version", TORCHES)
def torch(session: nox.Session, version: str) -> None:
    """With another PyTorch, and otherwise the versions of ``constraints.txt``."""
    lines = Path("constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line.partition("==")[0] not in OF_TORCH]
    _test(session, "\n".join([*pins, f"torch=={version}", ""]))


def _test(session: nox.Session, constraints: str) -> None:
    file = Path(session.create_tmp()) / "constraints.txt"
    file.write_text(constraints)
    session.install("-c", str(file), "-e", ".[dev]")
    session.run("python", "-c", "import torch, sys; print(torch.__version__, sys.version)")
    session.run("pytest", "-q", *session.posargs)
