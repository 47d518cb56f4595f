"""Recipes by name or from a file of one's own, with all that they take from others."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from wellcond._shared.names import choices, require_known
from wellcond.experiments.errors import ConfigError, needs_train_extra
from wellcond.experiments.recipes.checks import RECIPE_KEYS, require_keys, require_options, row
from wellcond.experiments.recipes.recipe import Recipe, Row

FILES = Path(__file__).parent / "files"
SHOWS = ("table", "figure")


def known_recipes() -> list[str]:
    """The names of the recipes that come with wellcond."""
    return sorted(path.stem for path in FILES.glob("*.toml"))


def recipe_text(source: str) -> str:
    """The file of a recipe: by its name, or by a path that ends in ``.toml``.

    Raises:
        ConfigError: no recipe of that name (with the nearest right one), or no readable file.
    """
    path = _path(source, Path())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ConfigError(f"cannot read the recipe '{source}': {reason}") from None


def load_recipe(source: str) -> Recipe:
    """The recipe of that name, or in that file.

    Raises:
        ConfigError: there is none; it is not TOML; a key is unknown (with the nearest right one), missing, or of a
            wrong type; an option that a run does not have; a row that is named twice or compared with none that is
            there.

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
    with needs_train_extra():
        tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
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
    base = None
    if "like" in found:
        base = _loaded(_path(found["like"], path.parent), (*children, path.resolve()))
    elif "keep" in found:
        raise ConfigError(f"{where} keeps rows, but is like no other")
    rows = _in_order([row(values, where) for values in found.get("rows", ())], base, found.get("keep"), where)
    options = found.get("options", {})
    require_options(options, f"{where}, options")
    scales = found.get("scales", {})
    for scale, changes in scales.items():
        require_options(changes, f"{where}, scale '{scale}'")
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
    )


def _in_order(own: list[Row], base: Recipe | None, keep: list[str] | None, where: str) -> tuple[Row, ...]:
    """The rows that are taken from ``base`` and the ``own`` ones, as ``keep`` says, checked against each other."""
    taken = {one.name: one for one in (base.rows if base else ())}
    its = [one.name for one in own]
    if keep is not None:
        for name in keep:
            require_known(name, [*taken, *its], f"row to keep in {where}", error=ConfigError)
        taken = {name: one for name, one in taken.items() if name in keep}
    for name in its:
        if name in taken or its.count(name) > 1:
            raise ConfigError(f"{where} has two rows '{name}'")
    known = {**taken, **dict(zip(its, own, strict=True))}
    rows = [known[name] for name in dict.fromkeys([*(keep or ()), *known])]
    if not rows:
        raise ConfigError(f"{where} has no rows")
    for one in rows:
        if one.against is not None:
            require_known(one.against, known, f"row to compare '{one.name}' with, in {where}", error=ConfigError)
    return tuple(rows)
