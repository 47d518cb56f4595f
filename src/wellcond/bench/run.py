"""`wellcond bench`: measures the cases one after another, then writes tables, a figure and one JSON file.

    OUT/config.json  bench.json  tables.md  speed.png  speed.svg

`bench.json` holds all measurements and a description of the machine; `tables.md` is the readable form.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from wellcond._shared.machine import cpu_model
from wellcond._shared.names import require_known
from wellcond.bench import report
from wellcond.bench.cases import FEATURE_SHAPES, MATRIX_SHAPES, QUICK_SHAPES, TASKS, Shape, cases
from wellcond.bench.contestants import missing_peers
from wellcond.bench.measure import measure_case
from wellcond.bench.references import ground_truth_errors
from wellcond.bench.results import CaseResult
from wellcond.experiments import folders
from wellcond.experiments.files import write_atomically, write_json
from wellcond.experiments.run.result import versions
from wellcond.experiments.show.figures import save_figure
from wellcond.experiments.show.render import for_markdown

KIND = "benchmark"
EVERYTHING, TABLES, FIGURE = "bench.json", "tables.md", "speed"
MADE = (folders.CONFIG, EVERYTHING, TABLES, f"{FIGURE}.png", f"{FIGURE}.svg")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


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
) -> tuple[list[CaseResult], list[str]]:
    """Measure the solvers and layers on this machine, write the results to `out`, and return them with remarks.

    The options are those of `wellcond bench`; `finished` is called after each case with its index, the number of cases
    and its result.

    Raises:
        ValueError: an unknown task or dtype, shapes that no task accepts, or an unavailable device.
        FolderError: `out` is not empty.
    """
    out = Path(out)
    where = _device(device)
    require_known(dtype, DTYPES, "dtype")
    if seconds is not None and seconds < 0:
        raise ValueError(f"seconds must not be negative, got {seconds}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    wanted = cases(tasks or TASKS, shapes or ((*MATRIX_SHAPES, *FEATURE_SHAPES) if full else QUICK_SHAPES))
    if seconds is None:
        seconds = 8.0 if full else 1.5
    config = {"dtype": dtype, "device": str(where), "cases": [asdict(case) for case in wanted], "seconds": seconds}
    with folders.claimed(out, lambda: folders.check(out, KIND, overwrite=overwrite, resumable=False)):
        folders.prepare(out, KIND, config, MADE)
        if threads is not None:
            torch.set_num_threads(threads)
        missing, truths, machine = missing_peers(), ground_truth_errors(), environment(where)
        results = []
        for index, case in enumerate(wanted):
            results.append(measure_case(case, DTYPES[dtype], where, seconds=seconds))
            finished(index, len(wanted), results[-1])
        everything = {
            "environment": machine,
            "config": config,
            "missing_peers": missing,
            "truth_against_mpmath": truths,
            "results": [result.to_dict() for result in results],
        }
        remarks = report.remarks(results, missing, truths)
        write_json(out / EVERYTHING, everything)
        write_atomically(out / TABLES, markdown(results, remarks, machine).encode())
        save_figure(report.speed_figure(results, machine), out / FIGURE)
        return results, remarks


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
        raise ValueError(f"device '{name}' is not available: PyTorch finds {torch.cuda.device_count()} CUDA devices")
    return device


def environment(device: torch.device) -> dict[str, str]:
    """Versions, and the name of the processor."""
    if device.type == "cuda":
        return {**versions(), "device": torch.cuda.get_device_name(device)}
    return {**versions(), "device": f"{cpu_model()}, {os.cpu_count()} cores"}


def markdown(results: Sequence[CaseResult], remarks: Sequence[str], machine: Mapping[str, str]) -> str:
    """All tables and remarks."""
    parts = [", ".join(f"{key} {value}" for key, value in machine.items()) + ".", report.EXPLAINED]
    *ratios, summary = report.tables(results)
    parts += [*map(for_markdown, ratios), summary.caption, for_markdown(summary)]
    parts += [f"- {line}" for line in remarks]
    for result in results:
        parts += [f"### {result.case.task} {result.case.size}", for_markdown(report.detail_table(result))]
    return "\n\n".join(parts) + "\n"
