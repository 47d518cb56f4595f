"""Options that change what a saved state means travel in the state: PyTorch's extra state, as a tensor of text.

A tensor, since safetensors and distributed checkpoints take nothing else, and a floating one, since averages of state
dicts are made entry by entry. A state without it, of an older version, loads as it always did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

KEY = "_extra_state"  # what PyTorch calls it in state dicts


def written(meaning: Mapping[str, Any]) -> Tensor:
    """The options as the codes (n,) of the characters of their JSON, on the CPU."""
    text = json.dumps(meaning, sort_keys=True, skipkeys=True, default=_named)
    return torch.tensor(list(text.encode("ascii")), dtype=torch.float32, device="cpu")


def _named(value: Any) -> str:
    """What else than plain types there is, by a name that is the same in every process."""
    return getattr(value, "__qualname__", type(value).__qualname__)


def read(state: Any) -> dict[str, Any]:
    """The options in an extra state; a ValueError if it is not one of ours or damaged."""
    try:
        found = json.loads(bytes(state.detach().round().int().tolist()).decode("ascii"))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the extra state is damaged ({type(error).__name__}); leave it out") from None
    if not isinstance(found, dict):
        raise ValueError(f"the extra state is {found!r}, not options; leave it out")
    return found


def same(meaning: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of options are one once they are JSON, where tuples are lists."""
    return torch.equal(written(meaning), written(other))


def listing(meaning: Mapping[str, Any]) -> str:
    """``method='zca', steps=5``, as a state has them."""
    return ", ".join(f"{name}={value!r}" for name, value in read(written(meaning)).items())


class SelfDescribing(nn.Module):
    """A module whose state dict holds its :meth:`meaning`, and which refuses the state of one with another."""

    def meaning(self) -> dict[str, Any]:
        """The options, of plain types, under which the tensors of the state are to be read."""
        raise NotImplementedError

    def _say(self, device: torch.device | str | None) -> None:
        """To be called when the options are there: Accelerate loads entry by entry, each into a tensor of its name."""
        place = torch.get_default_device() if device is None else device  # that of the other buffers, as DDP wants it
        self.register_buffer(KEY, written(self.meaning()).to(place, torch.long), persistent=False)

    def get_extra_state(self) -> Tensor:
        return written(self.meaning())

    def set_extra_state(self, state: Any) -> None:
        """Refuse another meaning; of the module nothing changes. A state without values says nothing.

        Raises:
            ValueError: the state is of other options, or damaged.
        """
        if not isinstance(state, Tensor) or state.is_meta:  # as in what FSDP gives ranks that read no file
            return
        if not same(theirs := read(state), mine := self.meaning()):
            raise ValueError(
                f"the saved state is of {listing(theirs)}, this {type(self).__name__} has {listing(mine)}; make it "
                f"with {listing(theirs)}, or leave '{KEY}' out of the state to load it all the same"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            self.set_extra_state(state_dict.setdefault(prefix + KEY, self.get_extra_state()))
        except ValueError as error:
            args[-1].append(f"layer '{prefix.rstrip('.')}': {error}")  # to PyTorch's list; nothing is loaded here
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        mark = self._buffers[KEY]
        if mark is not None and mark.is_meta and (loaded := [t for t in self.state_dict().values() if not t.is_meta]):
            self._say(loaded[0].device)  # given values by assign=True


def refuse_treated(missing: list[str], unexpected: list[str], errors: list[str]) -> None:
    """Say how to load the weights of treated layers that are about to be left out; the lists are PyTorch's, of a load.

    Without this a load that is not strict leaves such a layer at random in silence.
    """
    for key in unexpected:
        path, found, rest = key.rpartition(".parametrizations.")
        name = rest.split(".")[0]
        if found and rest.endswith(f".{KEY}") and f"{path}.{name}" in missing:
            message = (
                f"layer '{path}': its {name} was treated when it was saved, and is not here; load with "
                "model.load_state_dict(wellcond.orthogonality.treat_like(model, state)), or save "
                "wellcond.nn.to_plain(model)"
            )
            if message not in errors:
                errors.append(message)
