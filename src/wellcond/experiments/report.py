"""The report of runs: one page of HTML that needs nothing else, and its figures as files.

    OUT/config.json  report.html  condition.png  condition.svg  learning.png  learning.svg

It is made from what the runs left in their folders, and can be made again at any time.
"""

from __future__ import annotations

import base64
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import wellcond
from wellcond.experiments import folders
from wellcond.experiments.files import write_atomically
from wellcond.experiments.results.experiment import Experiment
from wellcond.experiments.results.summary import COMPARISON, by_label, collect, configs_in, summarise
from wellcond.experiments.results.tables import comparison_table, configuration_table, differences_table, runs_table
from wellcond.experiments.run.config import RunConfig, run_config
from wellcond.experiments.run.result import RunResult, earlier_epochs
from wellcond.experiments.show.curves import columns
from wellcond.experiments.show.figures import condition_figure, learning_figure, readout, save_figure, svg
from wellcond.experiments.show.render import page

KIND = "report"
PAGE = "report.html"
FIGURES = {
    "condition": "Condition number of the covariance that the layer sees, over the training steps, without and with "
    "its ε. A gap is where κ(P) is infinite: the covariance did not have full rank there.",
    "learning": "Training loss and validation error over the epochs.",
}
TITLES = {"condition": "condition number of the covariance", "learning": "training"}
MADE = (folders.CONFIG, PAGE, *(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")))


def report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """Write the report of the finished runs in these folders; an earlier report in `out` is replaced.

    Of a run that is being made longer it has the result from before. Returns the page, and what
    was left out and why, a line each (which the page says too).

    Raises:
        RunError: a folder holds no run, none of the runs is finished, or ``out`` holds something else.
    """
    out = Path(out)
    results, notes = collect([Path(run) for run in runs])
    for result in results:
        if len(lengths := _lengths(result)) > 1:
            stages = ", then ".join(map(str, lengths))
            notes.append(
                f"'{result.folder}' was made longer: {stages} epochs. Its learning rates were not those of a run of "
                f"{result.config.epochs} epochs from the start"
            )
    with folders.claimed(out, lambda: folders.check(out, KIND, overwrite=folders.is_occupied(out))):
        return _write(results, notes, _experiment(runs, results), out), notes


def _experiment(runs: Sequence[str | os.PathLike[str]], results: Sequence[RunResult]) -> Experiment:
    """That of the comparison, if it is of one; else every configuration is a row, and compared with none."""
    configs = [result.config for result in results]
    if len(runs) == 1 and folders.kind_of(Path(runs[0])) == COMPARISON:
        held = folders.read_config(Path(runs[0]), COMPARISON)
        return Experiment.from_dict(held.get("experiment"), configs_in(held))
    return replace(Experiment.of_grid(configs), against={})


def _write(results: Sequence[RunResult], notes: Sequence[str], experiment: Experiment, out: Path) -> Path:
    configs = [result.config for result in results]
    label = experiment.label
    groups = by_label(results, label)
    found, papers = experiment.differences(results), experiment.papers_differences()
    tables = [comparison_table(summarise(results, label), papers=experiment.papers_figures())]
    if any(one.seeds > 1 for one in found):
        tables.append(differences_table(found, papers))
    folders.prepare(out, KIND, {"runs": [result.folder for result in results]}, MADE)
    seeds = sorted({config.seed for config in configs})
    shown = columns(results, papers=experiment.shows == "figure")
    band = f"median of {len(seeds)} seeds, band from minimum to maximum" if len(seeds) > 1 else "one seed"
    about = f"{experiment.heading}. " if experiment.recipe else ""
    titles = {name: f"{about}{what}: {band}" for name, what in TITLES.items()}
    draw = {
        "condition": partial(condition_figure, groups, titles["condition"], columns=shown),
        "learning": partial(learning_figure, groups, titles["learning"]),
    }
    figures = []
    for name, figure in draw.items():
        drawn = {"beside": figure(), "stacked": figure(stacked=True)}
        save_figure(drawn["beside"], out / name)
        forms = {form: base64.b64encode(svg(one)).decode() for form, one in drawn.items()}
        readouts = {form: readout(one) for form, one in drawn.items()}
        figures.append({"text": FIGURES[name], **forms, "readout": readouts})
    text = page(
        title=experiment.heading,
        about=f"{len(results)} run{'s' if len(results) > 1 else ''}, seeds {', '.join(map(str, seeds))}; "
        f"wellcond {wellcond.__version__}",
        notes=notes,
        tables=tables,
        findings=[one.sentence(papers.get(one.row)) for one in found] if experiment.recipe else [],
        figures=figures,
        runs=runs_table(results, label),
        configuration=configuration_table(configs),
        commands=[line for result in results for line in commands(result)],
        machines=dict.fromkeys("; ".join(f"{k} {v}" for k, v in result.environment.items()) for result in results),
    )
    write_atomically(out / PAGE, text.encode())
    return out / PAGE


def _lengths(result: RunResult) -> list[int]:
    """The epochs of the run each time that it was finished, up to this result."""
    last = result.config.epochs
    return [*(epochs for epochs in earlier_epochs(Path(result.folder)) if epochs < last), last]


def commands(result: RunResult) -> list[str]:
    """The command lines that train a run again; several where it was made longer."""
    first, *more = _lengths(result)
    if not more:
        return [command(result.config)]
    out = shlex.join(["--out", result.folder])
    again = [f"wellcond train {out} --resume --epochs {epochs}" for epochs in more]
    return [f"{command(replace(result.config, epochs=first))} {out}", *again]


def command(config: RunConfig) -> str:
    """The command line that trains ``config`` again: what departs from the settings of its data."""
    default = run_config(data=config.data).to_dict()
    words = ["wellcond", "train", "--data", config.data]
    for name, value in config.to_dict().items():
        if name == "data" or value == default[name]:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
