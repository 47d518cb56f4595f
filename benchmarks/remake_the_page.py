"""What does docs/benchmarks.md say on this machine, now?

Runs ``wellcond bench`` and the other scripts of this folder one after another and writes the page from what they print,
the command beside each table, and the figure. On a quiet machine of two cores it takes a quarter of an hour, with
``--quick`` some minutes, which is then said on the page.

    pip install kornia spd-learn pyriemann geotorch
    python benchmarks/remake_the_page.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
FIGURE = HERE.parent / "docs" / "images" / "speed.svg"
REMAKE = "python benchmarks/remake_the_page.py"

SECTIONS = {
    "are_we_faster_than_autograd": "Faster than autograd, and how far from the limit",
    "where_does_auto_cross_over": "What `auto` takes",
    "when_do_threads_pay": "Threads for batches",
    "how_do_peers_compare": "Other packages",
    "svd_gradients": "Published gradients of the SVD",
    "how_many_kernels": "How many kernels",
    "are_small_inputs_slow": "Small inputs",
    "how_much_does_every_norm_cost": "Every norm decorrelated",
    "how_does_it_compile --time": "Compiled",
}


def output_of(command: list[str]) -> str:
    """What a command prints; its progress and errors go through."""
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def load() -> str:
    """How busy the machine was before anything was measured, in words."""
    cores = os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    shared = "the machine was shared, so take the ratios as rough" if busy > 0.25 * cores else "the machine was quiet"
    return f"The load of its {cores} cores was {busy:.1f} when this was begun: {shared}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few shapes and timings, for trying the script out")
    options = parser.parse_args()
    quick = ["--quick"] if options.quick else []
    how_busy = load()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmark"
        size = "--quick" if options.quick else "--full"
        output_of([sys.executable, "-m", "wellcond.cli", "bench", size, "--out", str(out)])
        tables = (out / "tables.md").read_text().partition("\n### ")[0].strip()
        environment = json.loads((out / "bench.json").read_text())["environment"]
        shutil.copy(out / "speed.svg", FIGURE)
    parts = [
        "# Benchmarks",
        f"Every table was printed by the command above it; all of them, and this page, are remade by\n\n"
        f"```\npip install kornia spd-learn pyriemann geotorch\n{REMAKE}{' --quick' if options.quick else ''}\n```",
        f"Measured on {environment['device']}, {environment['threads']} threads, with PyTorch {environment['torch']}. "
        f"{how_busy} Contestants take turns in random order; a time is the minimum of all turns. "
        "Nothing has been measured on CUDA in this version.",
        "## Every solver and layer",
        f"```\nwellcond bench {size}\n```",
        "The folder that it leaves has a table with times, memory and errors for every case (`tables.md`), everything "
        "in one file (`bench.json`) and this figure.",
        "![Speed of every solver and layer, as multiples of autograd through eigh](images/speed.svg)",
        tables,
    ]
    for command, title in SECTIONS.items():
        script, *arguments = [*command.split(), *quick]
        printed = output_of([sys.executable, str(HERE / f"{script}.py"), *arguments])
        parts += [f"## {title}", f"```\npython benchmarks/{' '.join([f'{script}.py', *arguments])}\n```", printed]
    PAGE.write_text("\n\n".join(parts) + "\n")
    print(f"wrote {PAGE.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
