"""The command `wellcond`: `train` a network, `compare` a grid, `report` on both, `inspect` a network, `bench` solvers.

Every error that a user can act on is one line on the standard error and exit status 2; Ctrl-C says how to go on
and is exit status 130. What needs torch is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    print(
        f"error: the command wellcond needs the package '{missing.name}', which is not installed: "
        'pip install "wellcond[train]"',
        file=sys.stderr,
    )
    raise SystemExit(2) from None

import wellcond
from wellcond.experiments.errors import RunError
from wellcond.experiments.recipes import HEADS, NO_TREATMENT, NORMS, PRECISIONS, RunConfig, grid, recipe

app = typer.Typer(
    help="Spectral layers that stay well-conditioned: train, measure and compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of the processes of torchrun, one prints
stderr = Console(stderr=True)

DEFAULT_COMPARISON = Path("comparison")
DEFAULT_BENCHMARK = Path("benchmark")
DEFAULT_REPORT = Path("report")
DEFAULT_TREATS = (NO_TREATMENT, "nog", "olr", "ow", "nog+ow+olr")

# -- options that both commands share ----------------------------------------------------------------------------

Data = Annotated[str | None, typer.Option(help="digits, a data set's name (cifar10, cifar100, NAME) or a path")]
Limit = Annotated[int | None, typer.Option(help="use this many images of each split at most")]
Model = Annotated[str | None, typer.Option(help="resnet8, resnet18, resnet50, …")]
Width = Annotated[int | None, typer.Option(help="channels after the stem")]
StemKernel = Annotated[int | None, typer.Option(help="size of the first convolution")]
Groups = Annotated[int | None, typer.Option(help="groups of the decorrelated batch norm")]
Eps = Annotated[float | None, typer.Option(help="ε added to the covariance")]
Epochs = Annotated[int | None, typer.Option(help="passes over the training images; the schedule scales with them")]
BatchSize = Annotated[int | None, typer.Option(help="images a step (of each process)")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="learning rate at the start")]
Augment = Annotated[bool | None, typer.Option("--augment/--no-augment", help="random crops and flips")]
Precision = Annotated[str | None, typer.Option(help=", ".join(PRECISIONS))]
Devices = Annotated[int | None, typer.Option(help="processes, on as many GPUs or CPU shares")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of a process")]
MonitorEvery = Annotated[int | None, typer.Option(help="steps between condition numbers")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with what the output folder holds")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="delete what the output folder holds")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


class _Lines(logging.Handler):
    """What the library has to say, a line each on the standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        stderr.print(record.getMessage(), soft_wrap=True, markup=False, highlight=False)


@contextmanager
def reporting(debug: bool, level: int, how_to_go_on: list[str]) -> Iterator[None]:
    """Turn what goes wrong inside into one line and an exit status; `how_to_go_on` may be filled inside."""
    log = logging.getLogger("wellcond")
    handler = _Lines()
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    except KeyboardInterrupt:
        again = "".join(f"; go on with: {command}" for command in how_to_go_on)
        kept = "; finished epochs are kept" if how_to_go_on else ""
        stderr.print(f"interrupted{kept}{again}", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(130) from None
    except (RunError, ValueError, OSError, ImportError) as error:
        if debug:
            raise
        stderr.print(f"error: {_message(error)}", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(2) from None
    finally:
        log.removeHandler(handler)


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package '{error.name}' is not installed: pip install \"wellcond[train]\""
    return str(error) or type(error).__name__


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    """Spectral layers that stay well-conditioned: train, measure and compare."""
    if version:
        console.print(f"wellcond {wellcond.__version__}", highlight=False)
        raise typer.Exit


@app.command()
def train(
    data: Data = None,
    model: Model = None,
    norm: Annotated[str | None, typer.Option(help=f"of the stem: {', '.join(NORMS)}")] = None,
    head: Annotated[str | None, typer.Option(help=", ".join(HEADS))] = None,
    treat: Annotated[str | None, typer.Option(help="none, or of sn, ol, ow, nog, olr, as nog+ow+olr")] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, typer.Option(help="of weights, order and augmentation")] = None,
    limit: Limit = None,
    width: Width = None,
    stem_kernel: StemKernel = None,
    groups: Groups = None,
    eps: Eps = None,
    augment: Augment = None,
    precision: Precision = None,
    devices: Devices = None,
    threads: Threads = None,
    monitor_every: MonitorEvery = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder; by default runs/…")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train one network: weights, metrics, condition numbers and logs in one folder, and the test error."""
    asked = _given({name: value for name, value in locals().items() if name in RunConfig.__dataclass_fields__})
    again: list[str] = []
    with reporting(debug, logging.WARNING if console.is_terminal else logging.INFO, again):
        config = recipe(**asked)
        folder = out or _run_folder(config)
        if resume:
            from wellcond.experiments import folders

            folders.check(folder, "run", resume=resume, overwrite=overwrite)
            held = folders.read_config(folder, "run")
            folders.refuse_conflicts(held, asked, folder)
            config = RunConfig.from_dict(held)
        from wellcond.experiments.runs import run
        from wellcond.experiments.tables import run_table

        again.append(f"wellcond train --out {folder} --resume")
        result = run(config, folder, resume=resume, overwrite=overwrite, progress=console.is_terminal)
        console.print(run_table(result))
        console.print(f"in {folder}", highlight=False, soft_wrap=True)


@app.command()
def compare(
    data: Data = None,
    model: Model = None,
    norm: Annotated[list[str] | None, typer.Option(help="repeat, or separate by commas; default batch,zca")] = None,
    head: Annotated[list[str] | None, typer.Option(help="likewise; default avg")] = None,
    treat: Annotated[list[str] | None, typer.Option(help=f"likewise; default {','.join(DEFAULT_TREATS)}")] = None,
    seeds: Annotated[int | None, typer.Option(help="runs of each configuration, seeded 0, 1, …; default 2")] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    limit: Limit = None,
    width: Width = None,
    stem_kernel: StemKernel = None,
    groups: Groups = None,
    eps: Eps = None,
    augment: Augment = None,
    precision: Precision = None,
    devices: Devices = None,
    threads: Threads = None,
    monitor_every: MonitorEvery = None,
    out: Annotated[Path, typer.Option(help="the comparison's folder")] = DEFAULT_COMPARISON,
    resume: Resume = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train a grid of configurations × seeds; a table as the paper's with condition numbers, and the figure."""
    fields = {**RunConfig.__dataclass_fields__, "seeds": None}
    asked = _given({name: value for name, value in locals().items() if name in fields})
    again: list[str] = []
    with reporting(debug, logging.WARNING, again):
        configs = _configs(asked, out, resume)
        from wellcond.experiments.compare import compare as compare_runs
        from wellcond.experiments.tables import comparison_table

        again.append(f"wellcond compare --out {out} --resume")

        def finished(index: int, result: Any) -> None:
            console.print(
                f"[{index + 1}/{len(configs)}] {result.config.label}, seed {result.config.seed}: "
                f"test error {100 * result.test_error:.2f} %, {result.seconds:.1f} s",
                markup=False,
                highlight=False,
            )

        rows = compare_runs(
            configs, out, resume=resume, overwrite=overwrite, progress=console.is_terminal, finished=finished
        )
        config = configs[0]
        title = f"{config.model} on {config.data}, {config.epochs} epochs"
        console.print(comparison_table(rows, title))
        console.print(f"in {out}: results.csv, results.json, condition.png, condition.svg", highlight=False)


@app.command()
def inspect(
    run: Annotated[Path | None, typer.Argument(help="the folder of a run, or one of its checkpoints")] = None,
    data: Annotated[str | None, typer.Option(help="images to look at; by default those of the run")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "train",
    batches: Annotated[int, typer.Option(help="how many batches at most")] = 10,
    batch_size: Annotated[int | None, typer.Option(help="images in each; by default as in the run")] = None,
    out: Annotated[Path | None, typer.Option(help="write every batch's numbers here too: .csv or .jsonl")] = None,
    debug: Debug = False,
) -> None:
    """Condition numbers of a checkpoint's layers on a data set.

    Without RUN it takes the newest run below runs/ and comparison/, and if there is none trains the default first.
    """
    again: list[str] = []
    with reporting(debug, logging.INFO, again):
        if out is not None and out.exists():
            raise ValueError(f"'{out}' is there already; choose another --out")
        from wellcond.experiments.inspect import inspect as inspect_run
        from wellcond.experiments.inspect import newest_run
        from wellcond.experiments.tables import inspection_table, weight_lines

        run = run or newest_run((Path("runs"), DEFAULT_COMPARISON / "runs"))
        if run is None:
            run = _train_default(again)
        found = inspect_run(
            run, data=data, split=split, batches=batches, batch_size=batch_size, writers=() if out is None else out
        )
        console.print(inspection_table(found))
        for line in weight_lines(found):
            console.print(line, highlight=False, soft_wrap=True)
        console.print(f"of {found.checkpoint}", highlight=False, soft_wrap=True)


def _train_default(again: list[str]) -> Path:
    from wellcond.experiments.runs import run as run_training

    config = recipe()
    folder = _run_folder(config)
    again.append(f"wellcond train --out {folder} --resume")
    console.print(f"there is no run yet: training the default into {folder}", highlight=False)
    run_training(config, folder, progress=console.is_terminal)
    return folder


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="folders of runs or comparisons, or that hold such")] = None,
    out: Annotated[Path, typer.Option(help="the report's folder; one that is there is replaced")] = DEFAULT_REPORT,
    debug: Debug = False,
) -> None:
    """One page of HTML that needs nothing else, and its figures as PNG and SVG.

    Without RUNS it is on the comparison in the folder comparison/; if there is none, that is made first.
    """
    with reporting(debug, logging.WARNING, ["wellcond compare --resume"]):
        if not runs:
            runs = [DEFAULT_COMPARISON]
            if not DEFAULT_COMPARISON.exists():
                compare(out=DEFAULT_COMPARISON)
        from wellcond.experiments.report import report as write_report

        page, notes = write_report(runs, out)
        for note in notes:
            stderr.print(note, soft_wrap=True, markup=False, highlight=False)
        console.print(
            f"in {out}: {page.name}, condition.png, condition.svg, learning.png, learning.svg", highlight=False
        )


def _run_folder(config: RunConfig) -> Path:
    return Path("runs") / f"{Path(config.data).name}-{config.model}-{config.folder_name}"


def _configs(asked: dict[str, Any], out: Path, resume: bool) -> list[RunConfig]:
    """The grid as asked, or, when nothing is asked of a comparison that is resumed, the one it holds."""
    if resume and not asked:
        from wellcond.experiments import folders

        return [RunConfig.from_dict(run) for run in folders.read_config(out, "comparison")["runs"]]
    options = dict(asked)
    seeds = options.pop("seeds", 2)
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    axes = [
        [one.strip() for many in options.pop(name, default) for one in many.split(",")]
        for name, default in (("norm", ("batch", "zca")), ("head", ("avg",)), ("treat", DEFAULT_TREATS))
    ]
    return grid(*axes, seeds=range(seeds), **options)


@app.command()
def bench(
    full: Annotated[bool, typer.Option("--full/--quick", help="all shapes, in minutes; quick: a few, in one")] = False,
    task: Annotated[list[str] | None, typer.Option(help="repeat, or separate by commas; default all")] = None,
    shapes: Annotated[str | None, typer.Option(help="128x64x64 (matrices), 32x256x7x7 (maps), with commas")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default cuda where there is one")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    seconds: Annotated[float | None, typer.Option(help="of timing each case; default 1.5, with --full 8")] = None,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="the benchmark's folder")] = DEFAULT_BENCHMARK,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Measure speed, memory and error of every solver and layer here, beside autograd and what else is installed."""
    with reporting(debug, logging.WARNING, []):
        from wellcond.experiments.bench import report
        from wellcond.experiments.bench.cases import parse_shapes
        from wellcond.experiments.bench.run import bench as run_bench

        def finished(index: int, count: int, result: Any) -> None:
            console.print(f"[{index + 1}/{count}] {report.line(result)}", markup=False, highlight=False)

        found = run_bench(
            out,
            full=full,
            tasks=[one.strip() for many in task for one in many.split(",")] if task else None,
            shapes=parse_shapes(shapes) if shapes else None,
            device=device,
            dtype=dtype,
            seconds=seconds,
            threads=threads,
            overwrite=overwrite,
            finished=finished,
        )
        for table in report.tables(found.results):
            console.print(table)
        for line in report.remarks(found.results, found.missing, found.truths):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(f"in {out}: bench.json, tables.md, speed.png, speed.svg", highlight=False, soft_wrap=True)


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
