"""The whole of `wellcond bench`: the cases one after another, then tables, figure and one JSON file.

    OUT/config.json  bench.json  tables.md  speed.png  speed.svg

`bench.json` has every time, memory, error and ratio with the machine; `tables.md` the same for reading.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wellcond._shared.names import require_known
from wellcond.bench import report
from wellcond.bench.cases import FEATURE_SHAPES, MATRIX_SHAPES, QUICK_SHAPES, TASKS, Shape, cases
from wellcond.bench.contestants import missing_peers
from wellcond.bench.measure import CaseResult, measure_case
from wellcond.bench.references import truth_of_the_truth
from wellcond.experiments import folders
from wellcond.experiments.files import write_atomically, write_json
from wellcond.experiments.run.result import versions
from wellcond.experiments.show.figures import save_figure
from wellcond.experiments.show.render import for_markdown

KIND = "benchmark"
EVERYTHING, TABLES, FIGURE = "bench.json", "tables.md", "speed"
MADE = (folders.CONFIG, EVERYTHING, TABLES, f"{FIGURE}.png", f"{FIGURE}.svg")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Bench:
    """A finished benchmark: the results, who was missing, how good the truth is, and the machine."""

    results: list[CaseResult]
    missing: dict[str, str]
    truths: dict[str, float | None]
    environment: dict[str, str]


def bench(
    out: str | os.PathLike[str],
    *,
    full: bool = False,
    tasks: Sequence[str] | None = None,
    shapes: Sequence[Shape] | None = None,
    device: str | None = None,
    dtype: str = "float32",
    seconds: float | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    finished: Callable[[int, int, CaseResult], None] = lambda index, count, result: None,
) -> Bench:
    """Measure the solvers and layers on this machine and write what was found.

    Args:
        out: the folder; made if it is not there.
        full: all shapes instead of a few, and more timings of each.
        tasks: of `TASKS`; all by default.
        shapes: instead of the built-in ones, (batch, d, d) or (N, C, H, W).
        device: "cuda" where there is one, else "cpu".
        dtype: "float32" or "float64".
        seconds: of timing a case; 1.5 by default, 8 with `full`.
        threads: of the CPU; as PyTorch has them by default.
        overwrite: delete the benchmark that `out` holds (what it made, nothing else).
        finished: called with index, number of cases and result of every case that is done.

    Raises:
        ValueError: an unknown task or dtype, shapes that no task takes, a device that is not there.
        FolderError: `out` holds something.
    """
    out = Path(out)
    where = _device(device)
    require_known(dtype, DTYPES, "dtype")
    if seconds is not None and seconds < 0:
        raise ValueError(f"seconds must not be negative, got {seconds}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    wanted = cases(tasks or TASKS, shapes or ((*MATRIX_SHAPES, *FEATURE_SHAPES) if full else QUICK_SHAPES))
    each = seconds if seconds is not None else 8.0 if full else 1.5
    folders.check(out, KIND, overwrite=overwrite, resumable=False)
    config = {"dtype": dtype, "device": str(where), "cases": [asdict(case) for case in wanted], "seconds": each}
    folders.prepare(out, KIND, config, MADE)
    if threads is not None:
        torch.set_num_threads(threads)
    found = Bench([], missing_peers(), truth_of_the_truth(), environment(where))
    for index, case in enumerate(wanted):
        found.results.append(measure_case(case, DTYPES[dtype], where, seconds=each))
        finished(index, len(wanted), found.results[-1])
    _write(out, found, config)
    return found


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device '{name}'; give cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device '{name}' is not supported: give cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device '{name}' is not there: this PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def environment(device: torch.device) -> dict[str, str]:
    """Versions, and the name of the processor as the system has it."""
    if device.type == "cuda":
        return {**versions(), "device": torch.cuda.get_device_name(device)}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or "CPU"
    return {**versions(), "device": f"{name}, {os.cpu_count()} cores"}


def _write(out: Path, found: Bench, config: dict[str, Any]) -> None:
    write_json(
        out / EVERYTHING,
        {
            "environment": found.environment,
            "config": config,
            "missing_peers": found.missing,
            "truth_against_mpmath": found.truths,
            "results": [result.to_dict() for result in found.results],
        },
    )
    write_atomically(out / TABLES, markdown(found).encode())
    save_figure(report.speed_figure(found.results, found.environment), out / FIGURE)


def markdown(found: Bench) -> str:
    """Every table, and what there is to say beside them."""
    parts = [", ".join(f"{key} {value}" for key, value in found.environment.items()) + ".", report.EXPLAINED]
    *ratios, summary = report.tables(found.results)
    parts += [for_markdown(table) for table in ratios]
    parts += [summary.caption, for_markdown(summary)]
    parts += [f"- {line}" for line in report.remarks(found.results, found.missing, found.truths)]
    for result in found.results:
        parts += [f"### {result.case.task} {result.case.size}", for_markdown(report.detail_table(result))]
    return "\n\n".join(parts) + "\n"
