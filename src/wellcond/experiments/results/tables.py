"""Tables of results: of one run; of a comparison, like the paper's Tables 1–5 with conditioning; of all runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from wellcond.experiments.results.summary import Label
from wellcond.experiments.results.table import SPACE, Column, Strong, Table, number, percent, rank, short
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import RunResult


def run_table(result: RunResult) -> Table:
    """The result of one run, one line per quantity."""
    config = result.config
    lines = [("test error", f"{percent(result.test_error)} %  (weights of the last epoch)")]
    if result.test_top5_error is not None:
        lines.append(("test error, top 5", f"{percent(result.test_top5_error)} %"))
    best = f"best {percent(result.best_val_accuracy)} % after epoch {result.best_epoch + 1} (best.ckpt)"
    lines += [("test accuracy", f"{percent(result.test_accuracy)} %"), ("validation accuracy", best)]
    for found in result.conditions:
        ranks = (
            f"numerical {rank(found.numerical_rank, found.dim)}, effective {number(found.effective_rank)}  "
            f"(medians of {found.records} steps)"
        )
        lines += [
            (f"{short(found.layer)}: κ(P), κ(P + εI)", f"{number(found.kappa)}, {number(found.kappa_eps)}"),
            (f"{short(found.layer)}: rank", ranks),
            (f"{short(found.layer)}: solver failures", str(found.failures)),
        ]
    lines.append(("time", f"{result.seconds:.1f} s for {result.steps} steps, {result.seconds_per_step:.4f} s a step"))
    return Table(
        ["", Column("", text=True)],
        [(Strong(what), value) for what, value in lines],
        title=f"{config.model}, {config.label}, on {config.data}; seed {config.seed}, {config.epochs} epochs",
    )


def comparison_table(rows: Sequence[Any], title: str = "", papers: Mapping[str, str] | None = None) -> Table:
    """A line for each configuration, and further lines for its layers if there are several; the best values are bold.

    ``papers`` has the paper's figures by row. They and the top-5 error are omitted on the terminal.
    """
    papers = papers or {}
    top5 = any(not math.isnan(row.test_top5_error_mean) for row in rows)
    best = {name: min(getattr(row, name) for row in rows) for name in ("test_error_mean", "test_error_min", "kappa")}
    groups = [list(layers) for _, layers in itertools.groupby(rows, key=lambda row: row.label)]
    one_layer_each = len(groups) == len(rows)

    def cell(text: str, row: Any, name: str) -> str:
        return Strong(text) if getattr(row, name) == best[name] < math.inf else text

    def measures(row: Any) -> list[str]:
        layer = [short(row.layer)] if one_layer_each else []
        kappas = [cell(number(row.kappa), row, "kappa"), number(row.kappa_eps)]
        return [*layer, *kappas, rank(row.numerical_rank, row.dim), number(row.effective_rank), str(row.failures)]

    body = []
    for layers in groups:
        first = layers[0]
        spread = "" if math.isnan(first.test_error_std) else f" ± {percent(first.test_error_std)}"
        wide = [percent(first.test_top5_error_mean)] if top5 else []
        wide += [papers.get(first.label, "")] if papers else []
        head = [
            first.label,
            cell(f"{percent(first.test_error_mean)}{spread}", first, "test_error_mean"),
            cell(percent(first.test_error_min), first, "test_error_min"),
        ]
        time = f"{first.seconds_per_step:.4f}"
        if len(layers) == 1:
            body.append([*head, *measures(first), time, *wide])
            continue
        body.append([*head, *[""] * len(measures(first)), time, *wide])
        body += [[f"{2 * SPACE}{short(row.layer)}", "", "", *measures(row), "", *[""] * len(wide)] for row in layers]
    beside = [Column(f"top-5{SPACE}error{SPACE}%", wide=True)] if top5 else []
    beside += [Column("paper's", wide=True)] if papers else []
    layer = [Column("layer", text=True, wide=True)] if one_layer_each else []
    measured = ["κ(P)", "κ(P+εI)", "rank", "eff. rank", "fails", f"s{SPACE}per step"]
    caption = (
        "κ and ranks: medians over steps, then over seeds, of the layer's batch covariance P. Fails: decompositions "
        "that failed at first, summed over seeds. Time: median step."
    )
    if any(row.seeds > 1 for row in rows):
        caption = f"± is the sample standard deviation over the seeds (n − 1). {caption}"
    heads = ["method", f"test error{SPACE}%", "min", *layer, *measured, *beside]
    return Table(heads, body, caption=caption, title=title)


def runs_table(results: Sequence[RunResult], label: Label) -> Table:
    """One line per run."""
    body = [
        (
            label(result.config),
            str(result.config.seed),
            percent(result.test_error),
            percent(1 - result.best_val_accuracy),
            str(result.best_epoch + 1),
            number(result.conditions[0].kappa) if result.conditions else "",
            str(result.steps),
            f"{result.seconds:.1f}",
            result.folder,
        )
        for result in results
    ]
    heads = ["configuration", "seed", "test error, %", "best val. error, %", "epoch", "κ(P)", "steps", "s"]
    return Table(
        [*heads, Column("folder", text=True)],
        body,
        caption="Each run is tested once, with the weights of the last epoch.",
    )


def configuration_table(configs: Sequence[RunConfig]) -> Table:
    """One line per option with all its values."""
    names = [field.name for field in fields(RunConfig)]
    values = [", ".join(dict.fromkeys(str(getattr(config, name)) for config in configs)) for name in names]
    return Table(["option", Column("value", text=True)], list(zip(names, values, strict=True)))
