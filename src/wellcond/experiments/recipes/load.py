"""Loading recipes by name or from a file, resolving their base recipes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from wellcond._shared.names import choices, require_known
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.recipes.checks import RECIPE_KEYS, checked_row, require_keys, require_options
from wellcond.experiments.recipes.recipe import Recipe, Row
from wellcond.experiments.recipes.tasks import CLASSIFIER, TASKS

FILES = Path(__file__).parent / "files"
SHOWS = ("table", "figure")


def known_recipes() -> list[str]:
    """The names of the built-in recipes."""
    return sorted(path.stem for path in FILES.glob("*.toml"))


def recipe_text(source: str) -> str:
    """The text of a recipe, given by name or as a path ending in ``.toml``.

    Raises:
        ConfigError: an unknown name (with the closest valid one), or an unreadable file.
    """
    path = _path(source, Path())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ConfigError(f"cannot read the recipe '{source}': {reason}") from None


def load_recipe(source: str) -> Recipe:
    """Load a recipe, given by name or as a path ending in ``.toml``.

    Raises:
        ConfigError: an unknown recipe; invalid TOML; a key that is unknown (with the closest valid one), missing or of
            a wrong type; an unknown run option; a duplicate row, or one compared with a missing row.

    Example:
        >>> [row.name for row in load_recipe("table1").rows][:2]
        ['SVD', 'SVD + SN']
    """
    return _loaded(_path(source, Path()), ())


def _path(source: str, beside: Path) -> Path:
    if source.endswith(".toml"):
        return beside / source
    if source not in known_recipes():
        raise ConfigError(f"unknown recipe {source!r}{choices(source, known_recipes())}; or give a file *.toml")
    return FILES / f"{source}.toml"


def _parsed(path: Path, where: str) -> dict[str, Any]:
    try:
        found = tomllib.loads(recipe_text(str(path)))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not TOML: {error}") from None
    require_keys(found, RECIPE_KEYS, where)
    if missing := [key for key in ("title", "about") if key not in found]:
        raise ConfigError(f"{where} has no {missing[0]}")
    return found


def _loaded(path: Path, children: tuple[Path, ...]) -> Recipe:
    name, where = path.stem, f"recipe '{path.stem}'"
    if path.resolve() in children:
        raise ConfigError(f"{where} is like itself")
    found = _parsed(path, where)
    base: Recipe | None = None
    if "like" in found:
        base = _loaded(_path(found["like"], path.parent), (*children, path.resolve()))
    elif "keep" in found:
        raise ConfigError(f"{where} has 'keep' without 'like'")
    task = found.get("task", base.task if base else CLASSIFIER)
    require_known(task, TASKS, f"task of {where}", error=ConfigError)
    if base is not None and base.task != task:
        raise ConfigError(f"{where} is of task '{task}', but like '{base.name}' of task '{base.task}'")
    config = TASKS[task].config
    own = [checked_row(values, where, config) for values in found.get("rows", ())]
    rows = _in_order(own, base, found.get("keep"), where)
    options = found.get("options", {})
    require_options(options, f"{where}, options", config)
    scales = found.get("scales", {})
    for scale, changes in scales.items():
        require_options(changes, f"{where}, scale '{scale}'", config)
    if found.get("seeds", 1) < 1:
        raise ConfigError(f"{where}: seeds must be at least 1, got {found['seeds']}")
    shows = found.get("shows", base.shows if base else "table")
    require_known(shows, SHOWS, f"kind of result in {where}", error=ConfigError)
    return Recipe(
        name=name,
        title=found["title"],
        about=found["about"].strip(),
        options={**(base.options if base else {}), **options},
        rows=rows,
        scales={**(base.scales if base else {}), **scales},
        seeds=found.get("seeds", base.seeds if base else 1),
        shows=shows,
        task=task,
    )


def _in_order(own: list[Row], base: Recipe | None, keep: list[str] | None, where: str) -> tuple[Row, ...]:
    """The rows taken from ``base`` and the ``own`` ones, in the order of ``keep``."""
    inherited = {row.name: row for row in (base.rows if base else ())}
    own_names = [row.name for row in own]
    if keep is not None:
        for name in keep:
            require_known(name, [*inherited, *own_names], f"row to keep in {where}", error=ConfigError)
        inherited = {name: row for name, row in inherited.items() if name in keep}
    for name in own_names:
        if name in inherited or own_names.count(name) > 1:
            raise ConfigError(f"{where} has two rows '{name}'")
    rows = {**inherited, **dict(zip(own_names, own, strict=True))}
    if not rows:
        raise ConfigError(f"{where} has no rows")
    for name, row in rows.items():
        if row.against is not None:
            require_known(row.against, rows, f"row to compare '{name}' with, in {where}", error=ConfigError)
    return tuple(rows[name] for name in dict.fromkeys([*(keep or ()), *rows]))
