"""Saved states of layers with treated weights, loaded into layers that are treated differently or not at all."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wellcond._shared.meaning import KEY, listing, read, same
from wellcond._shared.models import bare_name, layers_by_name, unwrapped

from ._matrix import parametrisations
from ._registry import class_of
from ._sharded import is_sharded

_STORED = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\.(.+)$")


def prepare(layer: nn.Module, state: dict[str, Any], prefix: str, errors: list[str]) -> bool:
    """Convert ``state`` to one that the parametrisations of ``layer`` load; otherwise add to ``errors``, return False.

    A plain weight becomes what treating it would have stored. On failure the layer does not change.
    """
    chains: Any = layer.parametrizations
    for name, chain in chains.items():
        stored = f"{prefix}parametrizations.{name}."
        if not chain.is_tensor:  # a parametrisation of another library
            continue
        try:
            if prefix + name in state and stored + "original" not in state:
                state.update(_treated(chain, state.pop(prefix + name), stored))
            else:
                _require_alike(chain, state, stored)
        except (ValueError, RuntimeError) as error:
            errors.append(f"{name} of layer '{prefix.rstrip('.')}': {error}")
            stored = f"{prefix}parametrizations."
            for key in [key for key in state if key.startswith(stored)]:
                del state[key]
            state.update(chains.state_dict(prefix=stored))
            return False
    return True


def _treated(chain: Any, weight: Tensor, stored: str) -> dict[str, Any]:
    """The state of ``chain`` (under the prefix ``stored``) if it were applied to ``weight``."""
    shape = getattr(chain[0], "plain_shape", chain.original.shape)
    if weight.shape != shape:
        raise ValueError(f"its saved shape is {tuple(weight.shape)}, here it is {tuple(shape)}")
    if is_sharded(chain.original):
        raise ValueError("it was saved untreated, and is treated and sharded here; load it before fully_shard")
    chain = copy.deepcopy(chain)  # since the frame depends on the weight
    with torch.no_grad():
        for parametrisation in reversed(chain):
            weight = parametrisation.right_inverse(weight)
    return {**chain.state_dict(prefix=stored), stored + "original": weight}


def _require_alike(chain: Any, state: dict[str, Any], stored: str) -> None:
    """Raise for the state of other treatments. An older state without marks gets those of ``chain``."""
    marks = [state[key] for i in range(len(state)) if (key := f"{stored}{i}.{KEY}") in state]
    theirs = [read(mark) for mark in marks if not getattr(mark, "is_meta", False)]
    mine = [one.meaning() for one in chain if hasattr(one, "meaning")]
    if theirs and not alike(theirs, mine):
        raise ValueError(
            f"it was saved under {_shown(theirs)}, and is under {_shown(mine)} here; treat it as it was when it was "
            "saved, or load into an untreated model by wellcond.orthogonality.treat_like(model, state)"
        )
    for i, one in enumerate(chain):
        if hasattr(one, "meaning"):
            state.setdefault(f"{stored}{i}.{KEY}", one.get_extra_state())


def alike(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def _shown(treatments: list[dict[str, Any]]) -> str:
    parts = []
    for treatment in treatments:
        options = {key: value for key, value in treatment.items() if key != "treatment" and value is not None}
        parts.append(f"'{treatment.get('treatment')}'" + (f" ({listing(options)})" if options else ""))
    return " and ".join(parts) or "no treatment"


def treat_like(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Treat the weights of a model like those of a saved state, so that it loads; other weights stay as they are.

    Write ``model.load_state_dict(treat_like(model, state))`` if you do not know what the state was saved from. The
    parameters stay the same tensors, so an existing optimizer holds the right ones.

    Args:
        model: has the layers of the saved model; changed in place.
        state: from a model treated by this version (``ow``, ``sn``, or a :class:`WeightTreatment` of your own) or an
            untreated one; a wrapper may have added a prefix such as ``module.`` to its names.

    Returns:
        The state with the names of ``model``: the entries under the prefix, without it.

    Raises:
        ValueError: a treated layer that is not in ``model`` or is treated differently there, or one whose treatment the
            state does not specify because an older version saved it.

    Complexity: O(number of entries), and the cost of the treatments that are applied.

    Example:
        >>> from torch import nn
        >>> from wellcond.orthogonality import orthogonal_weight
        >>> trained, fresh = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
        >>> state = orthogonal_weight(trained[0], map="cayley") and trained.state_dict(prefix="module.")
        >>> fresh.load_state_dict(treat_like(fresh, state))
        <All keys matched successfully>
    """
    inner = unwrapped(model)
    prefix = _prefix(state, {_plain(bare_name(key)) for key in inner.state_dict()})
    found = {bare_name(key.removeprefix(prefix)): value for key, value in state.items() if key.startswith(prefix)}
    _treat_all(inner, found)
    lead = next(name + "." if name else "" for name, module in model.named_modules() if module is inner)
    mine = {bare_name(key): lead + key for key in inner.state_dict()}
    renamed = {mine.get(key, lead + key): value for key, value in found.items()}
    # PyTorch's own dict also carries version metadata, so return it unchanged if possible.
    return state if list(renamed) == list(state) else renamed


def _plain(key: str) -> str:
    """The key without treatments: that of the weight, for all entries stored in its place."""
    return _STORED.sub(r"\1", key)


def _prefix(state: Mapping[str, Any], own: set[str]) -> str:
    """The prefix after which most names in ``state`` are those in ``own``, ignoring compiled parts."""
    votes: Counter[str] = Counter({"": 0})
    for key in state:
        parts = _plain(key).split(".")
        starts = (i for i, part in enumerate(parts) if part != "_orig_mod")  # it belongs to the part before it
        votes.update(".".join([*parts[:i], ""]) for i in starts if bare_name(".".join(parts[i:])) in own)
    return max(votes, key=lambda prefix: (votes[prefix], -len(prefix)))


def _treat_all(model: nn.Module, state: Mapping[str, Any]) -> None:
    saved: dict[tuple[str, str], dict[str, Any]] = {}
    for key, value in state.items():
        if match := _STORED.search(key):
            saved.setdefault((key[: match.start()].rstrip("."), match[1]), {})[match[2]] = value
    todo = []
    for (path, name), entries in saved.items():
        (layer,) = layers_by_name(model, [path] if path else model).values()
        marks = [read(entries[key]) for i in range(len(entries)) if (key := f"{i}.{KEY}") in entries]
        mine = [one.meaning() for one in parametrisations(layer, name) if hasattr(one, "meaning")]
        if not marks and not parametrisations(layer, name):
            raise ValueError(
                f"layer '{path}': its {name} was treated when it was saved, by an older version that did not save how; "
                "treat the model as it was then, and load the state"
            )
        if marks and mine and not alike(marks, mine):
            raise ValueError(
                f"layer '{path}': its {name} was saved under {_shown(marks)}, here it is under {_shown(mine)}; take "
                "that off first"
            )
        if marks and not mine and all(layer is not other or name != its for _, its, other, _ in todo):
            todo.append((path, name, layer, marks))
    for path, name, layer, marks in todo:
        for mark in marks:
            options = {key: value for key, value in mark.items() if key != "treatment"}
            class_of(mark["treatment"]).put_on(layer, name, path, **options)
