"""The report's page: HTML with its figures and its style inside, for light and dark screens and for print."""

from __future__ import annotations

import base64
import html
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import wellcond
from wellcond.experiments.recipes import RunConfig, recipe
from wellcond.experiments.results import Row, RunResult
from wellcond.experiments.tables import number, percent, rank

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --band: #f6f8fa; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --band: #161b22; --page: #0d1117; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.soft, caption, figcaption { color: var(--soft); font-size: .88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--band); } tbody { border-bottom: 1px solid var(--line); }
figure { margin: 1rem 0; } figure img { width: 100%; background: #fff; border-radius: 6px; padding: .5rem;
         box-sizing: border-box; }
pre { background: var(--band); padding: .8rem; overflow-x: auto; border-radius: 6px; font-size: .85rem; }
.note { border-left: 4px solid #bf8700; padding-left: .8rem; }
"""

_FIGURES = {
    "condition": "Condition number of the covariance that the layer sees, over the training steps, without and with "
    "its ε. A gap is where κ(P) is infinite: the covariance had not full rank there.",
    "learning": "Training loss and validation error over the epochs.",
}


def page(
    results: Sequence[RunResult],
    rows: Sequence[Row],
    label: Callable[[RunConfig], str],
    notes: Sequence[str],
    figures: Mapping[str, Path],
) -> str:
    """The whole page. ``figures`` are SVG files by name."""
    configs = [result.config for result in results]
    data, models, seeds = (sorted({str(getattr(c, f)) for c in configs}) for f in ("data", "model", "seed"))
    title = f"{', '.join(models)} on {', '.join(Path(name).name for name in data)}"
    plural = "s" if len(results) > 1 else ""
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{len(results)} run{plural}, seeds {_text(", ".join(seeds))}; '
        f"wellcond {_text(wellcond.__version__)}</p>",
        *(f'<p class="note">{_text(note)}</p>' for note in notes),
        "<h2>Results</h2>",
        _results(rows),
        *(
            f'<figure><img alt="{_text(text)}" src="data:image/svg+xml;base64,'
            f'{base64.b64encode(figures[name].read_bytes()).decode()}"><figcaption>{_text(text)}</figcaption></figure>'
            for name, text in _FIGURES.items()
        ),
        "<h2>Runs</h2>",
        _runs(results, label),
        "<h2>Configuration</h2>",
        _configuration(configs),
        "<h2>To make the runs again</h2>",
        f"<pre>{_text(chr(10).join(map(command, configs)))}</pre>",
        "<h2>Machine</h2>",
        _machines(results),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</html>\n"
    )


def command(config: RunConfig) -> str:
    """The command line that trains ``config`` again: what departs from the recipe of its data."""
    default = recipe(data=config.data).to_dict()
    words = ["wellcond", "train", "--data", config.data]
    for name, value in config.to_dict().items():
        if name == "data" or value == default[name]:
            continue
        flag = "--" + name.replace("_", "-")
        words += [flag if value else "--no-augment"] if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(words)


def _results(rows: Sequence[Row]) -> str:
    """As the paper's tables, with the conditioning beside; the best of a column is bold."""
    first = {row.label: row for row in reversed(rows)}  # the error is that of the configuration, not of a layer
    least_error = min(row.test_error_mean for row in rows)
    least_min = min(row.test_error_min for row in rows)
    least_kappa = min(row.kappa for row in rows)
    body = []
    for row in rows:
        std = "" if math.isnan(row.test_error_std) else f" ± {percent(row.test_error_std)}"
        head = first[row.label] is row
        body.append(
            [
                _text(row.label if head else ""),
                _best(f"{percent(row.test_error_mean)}{std}", row.test_error_mean == least_error) if head else "",
                _best(percent(row.test_error_min), row.test_error_min == least_min) if head else "",
                _text(row.layer.removeprefix("model.")),
                _best(number(row.kappa), row.kappa == least_kappa and math.isfinite(least_kappa)),
                number(row.kappa_eps),
                rank(row.numerical_rank, row.dim),
                number(row.effective_rank),
                str(row.failures),
                f"{row.seconds_per_step:.4f}",
            ]
        )
    several = any(row.seeds > 1 for row in rows)
    spread = "± is the sample standard deviation over the seeds (n − 1). " if several else ""
    heads = ["configuration", "test error, %", "min", "layer", "κ(P)", "κ(P + εI)", "rank", "effective rank"]
    return _table(
        [*heads, "failures", "s per step"],
        body,
        f"{spread}κ and ranks: medians over steps, then over seeds, of the layer's batch covariance P. Failures: "
        "decompositions that failed at first, all seeds together. Time: median step.",
        text=(3,),
    )


def _runs(results: Sequence[RunResult], label: Callable[[RunConfig], str]) -> str:
    body = [
        [
            _text(label(result.config)),
            str(result.config.seed),
            percent(result.test_error),
            percent(1 - result.best_val_accuracy),
            str(result.best_epoch + 1),
            number(result.conditions[0].kappa) if result.conditions else "",
            str(result.steps),
            f"{result.seconds:.1f}",
            _text(result.folder),
        ]
        for result in results
    ]
    heads = ["configuration", "seed", "test error, %", "best val. error, %", "epoch", "κ(P)", "steps", "s"]
    caption = "The test images are seen once, with the weights of the last epoch."
    return _table([*heads, "folder"], body, caption, text=(8,))


def _configuration(configs: Sequence[RunConfig]) -> str:
    """Every field with all its values."""
    names = [field.name for field in fields(RunConfig)]
    values = {name: list(dict.fromkeys(str(getattr(config, name)) for config in configs)) for name in names}
    return _table(["option", "value"], [[name, _text(", ".join(values[name]))] for name in names], "", text=(1,))


def _machines(results: Sequence[RunResult]) -> str:
    kinds = dict.fromkeys(tuple(result.environment.items()) for result in results)
    lines = ["; ".join(f"{name} {value}" for name, value in kind) for kind in kinds]
    return "".join(f'<p class="soft">{_text(line)}</p>' for line in lines)


def _table(heads: Sequence[str], body: Iterable[Sequence[str]], caption: str, text: Sequence[int] = ()) -> str:
    """``body`` is HTML already; ``text`` are the columns to set flush left beside the first."""
    mark = {column: ' class="text"' for column in text}
    head = "".join(f"<th{mark.get(i, '')}>{_text(name)}</th>" for i, name in enumerate(heads))
    lines = "\n".join(
        "<tr>" + "".join(f"<td{mark.get(i, '')}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in body
    )
    below = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{below}<thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def _best(text: str, best: bool) -> str:
    return f"<b>{text}</b>" if best else text


def _text(text: str) -> str:
    return html.escape(text)
