"""The tests on other versions of Python and PyTorch: ``pip install nox``, then ``nox -s "tests(torch-2.9.1)"``.

Each session has an environment of its own: the versions of ``constraints.txt`` but for PyTorch and what comes with it.
Arguments after ``--`` are passed on to pytest.
"""

from pathlib import Path

import nox

VERSIONS = (("3.12", "2.9.1"), ("3.13", "2.14.1"))
"""Python and PyTorch: the lowest PyTorch and the newest. The gate has those of ``constraints.txt``."""
OF_TORCH = ("torch", "sympy")
"""Pins that another PyTorch replaces: some want one version of SymPy and no other."""

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True


@nox.session
@nox.parametrize("python,torch", VERSIONS, ids=[f"torch-{torch}" for _, torch in VERSIONS])
def tests(session: nox.Session, torch: str) -> None:
    """The whole suite."""
    lines = Path("constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line.partition("==")[0] not in OF_TORCH]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([*pins, f"torch=={torch}", ""]))
    session.install("-c", str(constraints), "-e", ".[dev]")
    session.run("python", "-c", "import torch, sys; print(torch.__version__, sys.version)")
    session.run("pytest", "-q", *session.posargs)
