"""Training all unfinished runs of a grid, recording and reporting each one as it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from wellcond.experiments.errors import RunError
from wellcond.experiments.grid.attempt import Executor, Outcome, Task, Work

log: logging.Logger = logging.getLogger("wellcond")


class Tables(Protocol):
    """Where results are written as they come: the folder, and what writes all there are."""

    @property
    def out(self) -> Path: ...

    def write(self, results: Iterable[Any], /) -> None: ...


def train_all(
    places: Mapping[Any, Path],
    tables: Tables,
    done: Mapping[Any, Any],
    executor: Executor,
    finished: Callable[[int, Any], None],
    work: Work,
    threads: int | None,
) -> list[Any]:
    """The results of all runs, trained or resumed unless ``done``; the tables are updated whenever a run ends.
    ``threads`` is for configurations that leave them open.

    Raises:
        RunError: names the runs that failed; the others have finished, unless the disk is full.
    """
    configs, results = list(places), dict(done)

    def update_tables() -> None:
        tables.write(results[config] for config in configs if config in results)

    for index, config in enumerate(configs):
        if config in results:
            finished(index, results[config])
    update_tables()
    missing = [config for config in configs if config not in results]
    troubles: dict[str, Outcome] = {}
    tasks = [Task(config, places[config], work, threads) for config in missing]
    with closing(executor(tasks)) as outcomes:
        for index, outcome in outcomes:
            config = missing[index]
            for level, message in outcome.said:
                log.log(level, "%s", message)
            result = None if outcome.trouble else work.result(places[config])
            if result is not None:
                results[config] = result
                update_tables()
                finished(configs.index(config), result)
                continue
            troubles[places[config].name] = outcome
            if outcome.hopeless:
                break
            if len(results) + len(troubles) < len(configs):
                log.warning("%s failed, the others go on: %s", places[config].name, outcome.trouble)
    if troubles:
        raise _failure(troubles, len(configs) - len(results), tables.out)
    return [results[config] for config in configs]


def _failure(troubles: Mapping[str, Outcome], missing: int, out: Path) -> RunError:
    lines = "; ".join(f"{name}: {outcome.trouble or 'ended without a result'}" for name, outcome in troubles.items())
    stopped = f"; {missing - len(troubles)} more were not trained" if missing > len(troubles) else ""
    error = RunError(f"{lines}{stopped}; what has finished is kept in '{out}': go on with --resume")
    error.__cause__ = RuntimeError("\n".join(outcome.details for outcome in troubles.values()))
    return error
