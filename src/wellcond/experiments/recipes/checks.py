"""Validation of recipe files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from wellcond._shared.names import require_known
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.recipes.recipe import PaperFigures, Row

RECIPE_KEYS: dict[str, Any] = {
    **dict.fromkeys(("title", "about", "like", "shows", "task"), str),
    "seeds": int,
    **dict.fromkeys(("keep", "rows"), list),
    **dict.fromkeys(("options", "scales"), dict),
}
ROW_KEYS: dict[str, Any] = {"name": str, "options": dict, "against": str, "paper": dict}
PAPER_KEYS: dict[str, Any] = dict.fromkeys(PaperFigures._fields, (int, float))
KINDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
    list: "a list",
}


def require_keys(values: Any, kinds: Mapping[str, Any], where: str) -> None:
    """Reject unknown keys, suggesting the closest valid one, and values of a wrong type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a table of keys, got {values!r}")
    for key, value in values.items():
        require_known(key, kinds, f"key in {where}", error=ConfigError)
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ConfigError(f"{where}: {key} must be {_in_words(kinds[key])}, got {value!r}")


def require_options(values: Any, where: str, config: type) -> None:
    """Reject values of a wrong type and what is no option of this class; the seed is not an option here."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a table of options, got {values!r}")
    hints = get_type_hints(config)
    kinds = {f.name: hints[f.name] for f in fields(config) if f.name != "seed"}
    for key, value in values.items():
        require_known(key, kinds, f"option in {where}", error=ConfigError)
        taken = get_args(kinds[key]) if get_origin(kinds[key]) else (kinds[key],)
        if type(value) not in taken and not (float in taken and type(value) is int):
            raise ConfigError(f"{where}: {key} must be {_in_words(taken)}, got {value!r}")


def checked_row(values: Any, where: str, config: type) -> Row:
    """A validated row, with options of this class."""
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise ConfigError(f"{where} has a row without a name")
    where = f"{where}, row '{values['name']}'"
    require_keys(values, ROW_KEYS, where)
    require_options(values.get("options", {}), where, config)
    paper = {}
    for data, figures in values.get("paper", {}).items():
        require_keys(figures, PAPER_KEYS, f"{where}, paper.{data}")
        if "error" not in figures:
            raise ConfigError(f"{where}, paper.{data} has no error")
        paper[data] = PaperFigures(**figures)
    return Row(values["name"], values.get("options", {}), values.get("against"), paper)


def _in_words(kinds: Any) -> str:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(dict.fromkeys(KINDS[kind] for kind in kinds if kind in KINDS))
