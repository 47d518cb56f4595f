"""What was measured, as tables of ratios: on the terminal and, with everything beside, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich import box
from rich.table import Table

from wellcond.experiments.bench.contestants import AUTO, ISQRT, REFERENCE
from wellcond.experiments.bench.measure import CaseResult, Measured

Cells = list[list[str]]

EXPLAINED = (
    f"Times as fast as {REFERENCE}, forward and backward, least of the timings; above 1 is faster. "
    "— is not offered there, or failed."
)

SUMMARY_EXPLAINED = (
    f"{AUTO} with its default solver, forward and backward: times as fast as autograd through eigh, through svd, and "
    "as iSQRT-COV of five steps; its time over that of the decomposition and five products alone; bytes kept for the "
    "backward pass and the most allocated at once, in units of the input; relative error against double precision."
)


def by_task(results: Iterable[CaseResult]) -> list[tuple[str, list[CaseResult]]]:
    """The results of each task."""
    return [(task, list(group)) for task, group in groupby(results, key=lambda result: result.case.task)]


def ratio_cells(results: Sequence[CaseResult]) -> Cells:
    """The contestants of one task down, its shapes across; the heading first."""
    names = list(dict.fromkeys(row.name for result in results for row in result.rows))
    cells = [[results[0].case.task, *(result.case.size for result in results)]]
    for name in names:
        found = [next((row for row in result.rows if row.name == name), None) for result in results]
        ratios = [result.faster(row) if row else None for result, row in zip(results, found, strict=True)]
        cells.append([name, *(ratio(value) for value in ratios)])
    return cells


def summary_cells(results: Sequence[CaseResult]) -> Cells:
    """What `wellcond` is on every case: ratios to the others, memory, error, and the distance to the limit."""
    heading = [
        "task",
        "shape",
        "ms",
        "vs eigh",
        "vs svd",
        "vs iSQRT",
        "limit",
        "saved",
        "peak",
        "error",
        "grad. error",
    ]
    cells = [heading]
    for result in results:
        ours = result[AUTO]
        others = [result[name] for name in (REFERENCE, "autograd through svd", ISQRT)]
        cells.append(
            [
                result.case.task,
                result.case.size,
                f"{1e3 * ours.both.least:.3g}" if ours.both else "—",
                *(ratio(o.both.least / ours.both.least if o.both and ours.both else None) for o in others),
                f"{100 * result.overhead:+.0f} %" if result.overhead is not None else "—",
                inputs(ours.saved, result),
                inputs(ours.peak, result),
                small(ours.error),
                small(ours.gradient_error),
            ]
        )
    return cells


def detail_cells(result: CaseResult) -> Cells:
    """Everything about one case."""
    heading = [
        "",
        "forward ms",
        "both ms",
        "× forward",
        "× both",
        "saved",
        "peak",
        "error",
        "grad. error",
        "GFLOP/s",
        "of peak",
    ]
    body = [
        [
            row.name,
            *(f"{1e3 * time.least:.3g}" if time else "—" for time in (row.forward, row.both)),
            ratio(result.faster(row, "forward")),
            ratio(result.faster(row)),
            inputs(row.saved, result),
            inputs(row.peak, result),
            small(row.error),
            small(row.gradient_error),
            *throughput(result, row),
        ]
        for row in result.rows
    ]
    return [heading, *body]


def line(result: CaseResult) -> str:
    """One case in a line, while the others are still running."""
    return f"{result.case.task} {result.case.size}: {AUTO} {ratio(result.faster(result[AUTO]))} × {REFERENCE}"


def remarks(results: Sequence[CaseResult], missing: Mapping[str, str], truths: Mapping[str, float | None]) -> list[str]:
    """What there is to say beside the tables, a line each: who is missing, who failed where, how good the truth is."""
    lines = [f"{name}: {why}" for name, why in missing.items()]
    failed: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        for row in result.rows:
            if row.failure:
                failed.setdefault((row.name, result.case.task, row.failure), []).append(result.case.size)
    lines += [f"{name} on {task} {', '.join(sizes)}: {why}" for (name, task, why), sizes in failed.items()]
    for name, error in truths.items():
        off = "not compared (mpmath or scipy is not installed)" if error is None else f"off by {error:.1e}"
        lines.append(f"{name} against mpmath at 50 digits, 8×8, κ = 1e4: {off}")
    return lines


def throughput(result: CaseResult, row: Measured) -> tuple[str, str]:
    """GFLOP/s and their share of a large product's, of those that only multiply."""
    rate = result.operations_per_second(row)
    return ("—", "—") if rate is None else (f"{rate / 1e9:.3g}", f"{rate / result.peak:.0%}")


def ratio(value: float | None) -> str:
    """Two digits; one digit more is noise."""
    return "—" if value is None else f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


def small(value: float | None) -> str:
    """An error: two digits."""
    return "—" if value is None else f"{value:.1e}"


def inputs(size: int | None, result: CaseResult) -> str:
    """Bytes in units of the input: d × d matrices per matrix where those are the input."""
    return "—" if size is None else f"{size / result.input_bytes:.2g}"


def tables(results: Sequence[CaseResult]) -> list[Table]:
    """For the terminal: the ratios of every task, and what `wellcond` is on every case."""
    groups = [rich_table(ratio_cells(group)) for _, group in by_task(results)]
    # Milliseconds and the error of the value are in tables.md; the rest fits 80 columns.
    summary = [[*row[:2], *row[3:9], row[10]] for row in summary_cells(results)]
    return [*groups, rich_table(summary, SUMMARY_EXPLAINED)]


def rich_table(cells: Cells, caption: str = "") -> Table:
    """For the terminal; a shape's batch goes above its size, so that many fit beside each other."""
    table = Table(caption=caption, box=box.SIMPLE_HEAVY, pad_edge=False, collapse_padding=True)
    heading, *body = cells
    for index, name in enumerate(heading):
        lines = name.replace("×", "×\n", 1) if name[:1].isdigit() else name.replace(" ", "\n")
        table.add_column(lines, justify="right" if index else "left", no_wrap=True)
    for row in body:
        table.add_row(*row, style="bold" if row[0] == AUTO else "")
    return table


def markdown_table(cells: Cells) -> str:
    """For the file; numbers to the right."""
    heading, *body = cells
    rule = ["---", *("---:" for _ in heading[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, rule, *body])
