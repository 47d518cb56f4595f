"""The command `wellcond`: `train` a network, `compare` a grid, `report` on both, `inspect` a network, look at `data`,
`bench` solvers.

Every error that a user can act on is one line on the standard error and exit status 2; Ctrl-C and SIGTERM say how to
go on and are exit status 130 and 143. What needs torch is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import inspect as introspection
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

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
from wellcond._shared.streams import make_patient
from wellcond.experiments.errors import RunError, Terminated
from wellcond.experiments.folders import read_config
from wellcond.experiments.run.config import (
    NO_TREATMENT,
    RunConfig,
    grid,
    refuse_what_nothing_takes,
    run_config,
    said_default,
)
from wellcond.experiments.run.parts import is_treatable

app = typer.Typer(
    help="Spectral layers that stay well-conditioned: train, measure and compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of the processes of torchrun, one prints
stderr = Console(stderr=True)

DEFAULT_COMPARISON = Path("comparison")
DEFAULT_TREATS = (NO_TREATMENT, "nog", "olr", "ow", "nog+ow+olr")

Resume = Annotated[bool, typer.Option("--resume", help="go on with what the output folder holds")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="delete what the output folder holds")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def say(line: str, to: Console = console) -> None:
    """Print a line as it is."""
    to.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


class _Lines(logging.Handler):
    """What the library has to say, a line each on the standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), stderr)


@contextmanager
def reporting(debug: bool, level: int, how_to_go_on: list[str]) -> Iterator[None]:
    """Turn what goes wrong inside into one line and an exit status; `how_to_go_on` may be filled inside."""
    log, handler = logging.getLogger("wellcond"), _Lines()
    log.addHandler(handler)
    log.setLevel(level)
    try:
        with _terminable():
            yield
    except KeyboardInterrupt as stopped:
        what, status = ("terminated", 143) if isinstance(stopped, Terminated) else ("interrupted", 130)
        again = "".join(f"; go on with: {command}" for command in how_to_go_on)
        if not console.quiet:
            say(f"{what}{'; finished epochs are kept' if how_to_go_on else ''}{again}", stderr)
        raise typer.Exit(status) from None
    except (RunError, ValueError, OSError, ImportError) as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError):
            said = f"the package '{error.name}' is not installed: pip install \"wellcond[train]\""
        elif isinstance(error, UnicodeEncodeError):  # such as a path that was typed in another encoding
            said = f"{error.object!a} has letters that this locale lacks; set PYTHONUTF8=1"
        else:
            said = str(error) or type(error).__name__
        say(f"error: {said}", stderr)
        raise typer.Exit(2) from None
    finally:
        log.removeHandler(handler)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` inside, once: schedulers repeat it, and the end is not to be disturbed."""
    if threading.current_thread() is not threading.main_thread():  # where no signal handler can be set
        yield
        return

    def terminate(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def takes_run_options(**instead: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make every field of `RunConfig` an option of a command, which gets those that were given as a dictionary.

    `instead` has the annotations of options that differ from the field, or that come in addition.
    """
    kinds = get_type_hints(RunConfig)
    options = {
        f.name: Annotated[kinds[f.name] | None, typer.Option(help=f.metadata["help"], show_default=said_default(f))]
        for f in fields(RunConfig)
    }
    options |= instead

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def called(**given: Any) -> None:
            asked = {name: value for name in options if (value := given.pop(name, None)) is not None}
            command(asked, **given)

        _, *own = introspection.signature(command, eval_str=True).parameters.values()
        kind = introspection.Parameter.KEYWORD_ONLY
        shared = [introspection.Parameter(name, kind, default=None, annotation=a) for name, a in options.items()]
        called.__signature__ = introspection.Signature(  # pyright: ignore[reportFunctionMemberAccess]
            [*shared, *(parameter.replace(kind=kind) for parameter in own)]
        )
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        return called

    return decorate


def _listed(values: list[str]) -> list[str]:
    """Of an option that is repeated or has commas, every value."""
    return [one.strip() for many in values for one in many.split(",")]


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        say(f"wellcond {wellcond.__version__}")
        raise typer.Exit


@app.command()
@takes_run_options()
def train(
    asked: dict[str, Any],
    out: Annotated[Path | None, typer.Option(help="the run's folder; by default runs/…")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train one network: weights, metrics, condition numbers and logs in one folder, and the test error."""
    again: list[str] = []
    with reporting(debug, logging.WARNING if console.is_terminal else logging.INFO, again):
        config = run_config(**asked)
        folder = out or _run_folder(config)
        if resume and not overwrite:  # what is held there; `run` refuses what was asked beside it
            config = RunConfig.from_dict({**read_config(folder, "run"), **asked})
        refuse_what_nothing_takes(asked, [config])
        from wellcond.experiments.results.tables import run_table
        from wellcond.experiments.run.train import run
        from wellcond.experiments.show.render import for_terminal

        again.append(f"wellcond train --out {folder} --resume")
        result = run(config, folder, resume=resume, overwrite=overwrite, progress=console.is_terminal)
        console.print(for_terminal(run_table(result)))
        say(f"in {folder}")


@app.command()
@takes_run_options(
    norm=Annotated[list[str] | None, typer.Option(help="repeat, or separate by commas; default batch,zca")],
    head=Annotated[list[str] | None, typer.Option(help="as --norm; default avg")],
    treat=Annotated[list[str] | None, typer.Option(help=f"as --norm; default {','.join(DEFAULT_TREATS)}")],
    seed=Annotated[int | None, typer.Option("--seeds", help="runs of each configuration, seeded 0, 1, …; default 2")],
)
def compare(
    asked: dict[str, Any],
    recipe: Annotated[str | None, typer.Option(help="table4, fig1, …: see wellcond recipes; or a file .toml")] = None,
    scale: Annotated[str | None, typer.Option(help="of the recipe: full, or what makes it smaller, as small")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="these rows of the recipe, repeat; default all")] = None,
    out: Annotated[
        Path | None, typer.Option(help="the comparison's folder; default comparison, or the recipe's name")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="runs at once, each in a process of its own; default 1")] = None,
    executor: Annotated[str | None, typer.Option(help="ray or ray://HOST:PORT: on a cluster")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train a grid of configurations × seeds; a table as the paper's with condition numbers, and the figure."""
    again: list[str] = []
    with reporting(debug, logging.WARNING, again):
        if recipe is None and (scale or rows):
            raise ValueError(f"{'--scale' if scale else '--rows'} is of a recipe: give --recipe, as table4")
        out = out or (Path(Path(recipe).stem) if recipe else DEFAULT_COMPARISON)
        from wellcond.experiments.compare import compare as compare_runs
        from wellcond.experiments.results.tables import comparison_table, differences_table
        from wellcond.experiments.show.render import for_terminal

        if recipe is not None:
            configs, experiment = _of_recipe(recipe, scale or "full", rows, asked)
        else:
            configs, experiment = _of_grid(asked, out, resume)
        refuse_what_nothing_takes(asked, configs)
        again.append(f"wellcond compare --out {out} --resume")

        ends = itertools.count(1)

        results: list[Any] = []

        def finished(index: int, result: Any) -> None:
            config = result.config
            results.append(result)
            say(
                f"[{next(ends)}/{len(configs)}] {experiment.label(config)}, seed {config.seed}: "
                f"test error {100 * result.test_error:.2f} %, {result.seconds:.1f} s"
            )

        options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "jobs": jobs, "executor": executor}
        options |= {"experiment": experiment, "progress": console.is_terminal, "finished": finished}
        summary = compare_runs(configs, out, **options)
        console.print(for_terminal(comparison_table(summary, experiment.heading)))
        if found := [one for one in experiment.differences(results) if one.seeds > 1]:
            console.print(for_terminal(differences_table(found, experiment.papers_differences())))
        say(f"in {out}: results.csv, results.json, results.parquet, condition.parquet, condition.png, condition.svg")


def _of_recipe(source: str, scale: str, rows: list[str] | None, asked: dict[str, Any]) -> tuple[Any, Any]:
    """The runs of a recipe, and what they are about."""
    from wellcond.experiments.recipes import load_recipe
    from wellcond.experiments.results.experiment import Experiment

    options = {**asked}
    for name in ("norm", "head", "treat"):
        if name in options:
            values = _listed(options[name])
            if len(values) > 1:
                raise ValueError(f"--{name} of a recipe is one for all its rows, got {', '.join(values)}")
            options[name] = values[0]
    recipe = load_recipe(source)
    if rows:
        recipe = recipe.with_rows(rows)
    configs = recipe.configs(scale, options.pop("seed", None), **options)
    return [config for row in configs.values() for config in row], Experiment.of_recipe(recipe, configs)


def _of_grid(asked: dict[str, Any], out: Path, resume: bool) -> tuple[Any, Any]:
    """The runs of a grid; or of whatever comparison is resumed without a word on what it is."""
    from wellcond.experiments.results.experiment import Experiment

    held = read_config(out, "comparison") if resume else {}
    described = held.get("experiment") or {}
    if (recipe := described.get("recipe")) is None:
        configs = _configs(asked, out, resume)
        return configs, Experiment.from_dict(described or None if not asked else None, configs)
    from wellcond.experiments.results.summary import configs_in

    configs = configs_in(held)
    experiment = Experiment.from_dict(described, configs)
    if set(asked) - {"seed"}:
        raise ValueError(
            f"'{out}' holds recipe '{recipe}': beside --resume give --recipe {recipe} with all of its options, or "
            "nothing but --seeds"
        )
    if "seed" in asked:
        rows = dict.fromkeys(replace(config, seed=0) for config in configs)
        configs = [replace(config, seed=seed) for config in rows for seed in range(asked["seed"])]
    return configs, experiment


@app.command()
def recipes(
    show: Annotated[
        str | None, typer.Argument(metavar="[show]", help="show: print a recipe, to read or to change")
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="its name, or a file .toml")] = None,
    debug: Debug = False,
) -> None:
    """The paper's tables and figures, and experiments of our own, for compare --recipe; `show NAME` prints one."""
    with reporting(debug, logging.WARNING, []):
        from wellcond.experiments.recipes import known_recipes, load_recipe, recipe_text
        from wellcond.experiments.results.recipes import recipes_table
        from wellcond.experiments.show.render import for_terminal

        if show is None:
            console.print(for_terminal(recipes_table([load_recipe(known) for known in known_recipes()])))
            say("one of them: wellcond recipes show NAME; to run it: wellcond compare --recipe NAME --scale small")
            return
        if show != "show" or name is None:
            raise ValueError(f"write wellcond recipes, or wellcond recipes show NAME ({', '.join(known_recipes())})")
        load_recipe(name)
        print(recipe_text(name), end="")


@app.command()
def data(
    source: Annotated[str, typer.Argument(metavar="PATH", help="as --data of train")] = "digits",
    image_size: Annotated[int | None, typer.Option(help="as --image-size of train")] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="decode every image, to find those that are truncated")
    ] = False,
    debug: Debug = False,
) -> None:
    """What is in a data set: images by split and class, sizes and modes, and what was skipped and why."""
    with reporting(debug, logging.WARNING, []):
        from wellcond.experiments.data.overview import overview
        from wellcond.experiments.results.images import images_table
        from wellcond.experiments.show.render import for_terminal

        found = overview(source, image_size=image_size, decode=decode)
        console.print(for_terminal(images_table(found)))
        for line in found.lines():
            say(line)
        if found.trouble:
            raise ValueError(found.trouble)


@app.command()
def inspect(
    run: Annotated[Path | None, typer.Argument(help="the folder of a run, or one of its checkpoints")] = None,
    model: Annotated[
        str | None, typer.Option(help="instead of RUN: timm:NAME, torchvision:NAME, transformers:NAME, MODULE:CALLABLE")
    ] = None,
    data: Annotated[str | None, typer.Option(help="images to look at; those of the run, of a model digits")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "train",
    image_size: Annotated[int | None, typer.Option(help="as --image-size of train; by default as in the run")] = None,
    batches: Annotated[int, typer.Option(help="how many batches at most")] = 10,
    batch_size: Annotated[int | None, typer.Option(help="images in each; as in the run, of a model 128")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="names or patterns as 'stage1.*.norm?'; default spectral layers, or norms")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write every batch's numbers here too: .csv or .jsonl")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw the eigenvalues of each layer here, PNG and SVG")] = None,
    debug: Debug = False,
) -> None:
    """Condition numbers of a checkpoint's layers on a data set, or of those of any model that can be imported.

    Without RUN it takes the newest run below runs/ and comparison/, and if there is none trains the default first.
    """
    again: list[str] = []
    with reporting(debug, logging.INFO, again):
        from wellcond.experiments.inspect import inspect as inspect_run
        from wellcond.experiments.inspect import inspect_model, newest_run
        from wellcond.experiments.show.render import for_terminal

        options = {
            **{"data": data, "image_size": image_size, "split": split, "batches": batches, "batch_size": batch_size},
            **{"layers": _listed(layers or []), "out": out, "picture": picture},
        }
        if model is None:
            run = run or newest_run((Path("runs"), DEFAULT_COMPARISON / "runs")) or _train_default(again)
            found = inspect_run(run, **options)
        elif run is not None:
            raise ValueError(f"give a run or a --model, not both: '{run}', '{model}'")
        else:
            found = inspect_model(model, **options)
        console.print(for_terminal(found.table()))
        for line in found.lines():
            say(line)
        if picture is not None:
            say(f"in {picture.with_suffix('.png')} and {picture.with_suffix('.svg')}: the eigenvalues")


def _train_default(again: list[str]) -> Path:
    from wellcond.experiments.run.train import run as run_training

    config = run_config()
    folder = _run_folder(config)
    again.append(f"wellcond train --out {folder} --resume")
    say(f"there is no run yet: training the default into {folder}")
    run_training(config, folder, progress=console.is_terminal)
    return folder


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="folders of runs or comparisons, or that hold such")] = None,
    out: Annotated[Path, typer.Option(help="the report's folder; one that is there is replaced")] = Path("report"),
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
            say(note, stderr)
        say(f"in {out}: {page.name}, condition.png, condition.svg, learning.png, learning.svg")


def _run_folder(config: RunConfig) -> Path:
    return Path("runs") / f"{Path(config.data).name}-{config.model}-{config.folder_name}"


def _configs(asked: dict[str, Any], out: Path, resume: bool) -> list[RunConfig]:
    """The grid as asked; what is not asked of a comparison that is resumed is as it holds it."""
    axes: dict[str, Any] = {"norm": ["batch", "zca"], "head": ["avg"], "treat": list(DEFAULT_TREATS), "seed": range(2)}
    shared: dict[str, Any] = {}
    if resume:
        from wellcond.experiments.results.summary import configs_in

        held = configs_in(read_config(out, "comparison"))
        if not asked:
            return held
        treatable = [config for config in held if is_treatable(config.norm, config.head)]
        axes = {
            name: list(dict.fromkeys(getattr(config, name) for config in (name == "treat" and treatable) or held))
            for name in axes
        }
        shared = {name: value for name, value in held[0].to_dict().items() if name not in axes}
    for name, value in asked.items():
        if name == "seed":
            if value < 1:
                raise ValueError(f"seeds must be at least 1, got {value}")
            axes[name] = range(value)
        elif name in axes:
            axes[name] = _listed(value)
        else:
            shared[name] = value
    return grid(*axes.values(), **shared)


@app.command()
def bench(
    full: Annotated[bool, typer.Option("--full/--quick", help="all shapes, in minutes; quick: a few, in one")] = False,
    task: Annotated[list[str] | None, typer.Option(help="repeat, or separate by commas; default all")] = None,
    shapes: Annotated[str | None, typer.Option(help="128x64x64 (matrices), 32x256x7x7 (maps), with commas")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default cuda where there is one")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    seconds: Annotated[float | None, typer.Option(help="of timing each case; default 1.5, with --full 8")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a process")] = None,
    out: Annotated[Path, typer.Option(help="the benchmark's folder")] = Path("benchmark"),
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Measure speed, memory and error of every solver and layer here, beside autograd and what else is installed."""
    with reporting(debug, logging.WARNING, []):
        from wellcond.bench import report
        from wellcond.bench.cases import parse_shapes
        from wellcond.bench.run import bench as run_bench
        from wellcond.experiments.show.render import for_terminal

        results, remarks = run_bench(
            out,
            full=full,
            tasks=_listed(task) if task else None,
            shapes=parse_shapes(shapes) if shapes else None,
            device=device,
            dtype=dtype,
            seconds=seconds,
            threads=threads,
            overwrite=overwrite,
            finished=lambda index, count, result: say(f"[{index + 1}/{count}] {report.line(result)}"),
        )
        for table in report.tables(results):
            console.print(for_terminal(table))
        for line in remarks:
            say(line)
        say(f"in {out}: bench.json, tables.md, speed.png, speed.svg")


def main() -> None:
    """The entry point of the package."""
    make_patient()
    app()


if __name__ == "__main__":
    main()
