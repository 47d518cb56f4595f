"""The report of runs: one self-contained HTML page, the same in Markdown, and the figures as files.

    OUT/config.json  report.html  report.md  condition.png  condition.svg  learning.png  learning.svg

It is made from the files in the folders of the runs, and can be recreated at any time.
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
from wellcond.experiments.results.condition import lack_rank
from wellcond.experiments.results.difference_tables import conditioning_table, differences_table
from wellcond.experiments.results.experiment import Experiment
from wellcond.experiments.results.parquet import read_comparison
from wellcond.experiments.results.summary import COMPARISON, by_label, collect, configs_in, summarise
from wellcond.experiments.results.tables import comparison_table, configuration_table, runs_table
from wellcond.experiments.run.command_line import command, comparison_command
from wellcond.experiments.run.result import RunResult, earlier_epochs
from wellcond.experiments.show.curves import columns
from wellcond.experiments.show.figures import condition_figure, learning_figure, readout, save_figure, svg
from wellcond.experiments.show.render import markdown_page, page

KIND = "report"
PAGE, MARKDOWN = "report.html", "report.md"
FIGURES = {
    "condition": "Condition number of the covariance at the layer's input over the training steps, without and with "
    "its ε. κ(P) is infinite in the gaps: the covariance is rank-deficient there.",
    "learning": "Training loss and validation error over the epochs.",
}
OVER_RANGE = (
    "Condition number of the covariance at the layer's input over the training steps, over its numerical range, as it "
    "lacks full rank at most steps."
)
TITLES = {"condition": "condition number of the covariance", "learning": "training"}
MADE = (folders.CONFIG, PAGE, MARKDOWN, *(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")))


def report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """Write the report of the finished runs in these folders, replacing an earlier report in `out`.

    A run that is being extended is reported with its earlier result. Returns the path of the page, and notes on what
    was left out and why, which are also on the page.

    Raises:
        RunError: a folder without a run, no finished run, or other files in ``out``.
    """
    out = Path(out)
    results, notes = collect([Path(run) for run in runs])
    for result in results:
        if len(lengths := _lengths(result)) > 1:
            stages = ", then ".join(map(str, lengths))
            notes.append(
                f"'{result.folder}' was extended: {stages} epochs. Its learning rates differ from those of a run of "
                f"{result.config.epochs} epochs from the start"
            )
    with folders.claimed(out, lambda: folders.check(out, KIND, overwrite=folders.is_occupied(out))):
        return _write(results, notes, _experiment(runs, results), out), notes


def _experiment(runs: Sequence[str | os.PathLike[str]], results: Sequence[RunResult]) -> Experiment:
    """The experiment of a comparison; otherwise one row per configuration, without a baseline."""
    only, held = Path(runs[0]), None
    if len(runs) == 1 and folders.kind_of(only) == COMPARISON:
        held = folders.read_config(only, COMPARISON)
    elif len(runs) == 1 and only.suffix == ".parquet":
        held = read_comparison(only)
    if held is None:
        return replace(Experiment.of_grid([result.config for result in results]), against={})
    configs = configs_in(held)
    experiment = Experiment.from_dict(held.get("experiment"), configs)
    return replace(experiment, command=comparison_command(experiment.command, configs))


def _write(results: Sequence[RunResult], notes: Sequence[str], experiment: Experiment, out: Path) -> Path:
    configs = [result.config for result in results]
    label = experiment.label
    groups = by_label(results, label)
    differences, papers = experiment.differences(results), experiment.papers_differences()
    tables = [comparison_table(summarise(results, label), papers=experiment.papers_figures())]
    over_range = lack_rank(results)
    texts = {**FIGURES, "condition": OVER_RANGE} if over_range else FIGURES
    if any(difference.seeds > 1 for difference in differences):
        tables.append(differences_table(differences, papers))
        if over_range and (conditioning := experiment.conditioning(results, over_range)):
            tables.append(conditioning_table(conditioning, over_range))
        elif conditioning := experiment.conditioning(results):  # also where κ over the range was not recorded
            tables.append(conditioning_table(conditioning))
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
        forms = {form: base64.b64encode(svg(variant)).decode() for form, variant in drawn.items()}
        readouts = {form: readout(variant) for form, variant in drawn.items()}
        figures.append({"name": name, "text": texts[name], **forms, "readout": readouts})
    hours = sum(result.seconds for result in results) / 3600
    parts = dict(
        title=experiment.heading,
        about=f"{len(results)} run{'s' if len(results) > 1 else ''}, seeds {', '.join(map(str, seeds))}; "
        f"wellcond {wellcond.__version__}",
        notes=notes,
        tables=tables,
        findings=[one.sentence(papers.get(one.row)) for one in differences] if experiment.recipe else [],
        figures=figures,
        runs=runs_table(results, label),
        configuration=configuration_table(configs),
        command=experiment.command,
        commands=[line for result in results for line in commands(result)],
        time=f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes",
        machines=dict.fromkeys("; ".join(f"{k} {v}" for k, v in result.environment.items()) for result in results),
    )
    write_atomically(out / PAGE, page(**parts).encode())
    write_atomically(out / MARKDOWN, markdown_page(**parts).encode())
    return out / PAGE


def _lengths(result: RunResult) -> list[int]:
    """The numbers of epochs at which the run was finished, up to this result."""
    last = result.config.epochs
    return [*(epochs for epochs in earlier_epochs(Path(result.folder)) if epochs < last), last]


def commands(result: RunResult) -> list[str]:
    """The command lines that reproduce a run; several if it was extended."""
    first, *more = _lengths(result)
    if not more:
        return [command(result.config)]
    out = shlex.join(["--out", result.folder])
    again = [f"wellcond train {out} --resume --epochs {epochs}" for epochs in more]
    return [f"{command(replace(result.config, epochs=first))} {out}", *again]
