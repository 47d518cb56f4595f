"""What the examples print and draw, for the page that shows them: `docs/outputs/NAME.txt` and `docs/images/NAME.png`.

Each runs as its user runs it, with its own defaults.

    pip install timm torchvision pyriemann spd-learn
    python docs/figures/examples.py
    python docs/figures/examples.py own_loop covariance_head
"""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import sys
import warnings
from pathlib import Path

DOCS = Path(__file__).parents[1]
EXAMPLES = DOCS.parent / "examples"
PICTURES = {"own_loop": "--picture", "self_supervised": "--picture", "style_transfer": "--out"}


def record(name: str) -> None:
    """Run an example, and keep what it prints below the command that ran it."""
    arguments = [PICTURES[name], f"{name}.png"] if name in PICTURES else []
    command = " ".join(["python", f"examples/{name}.py", *arguments])
    sys.argv = [f"{name}.py", *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.chdir(DOCS / "images"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that are shown together
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    (DOCS / "outputs").mkdir(exist_ok=True)
    (DOCS / "outputs" / f"{name}.txt").write_text(f"$ {command}\n{printed.getvalue()}", encoding="utf-8")
    print(f"{command}\n{printed.getvalue()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=sorted(path.stem for path in EXAMPLES.glob("*.py")))
    for name in parser.parse_args().names:
        record(name)


if __name__ == "__main__":
    main()
