"""Options that change the meaning of a saved state are stored with it: PyTorch's extra state, as a tensor of text.

It is a tensor because safetensors and distributed checkpoints accept nothing else, and a floating one because state
dicts are averaged entry by entry. A state without it, from an older version, loads as before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

KEY = "_extra_state"  # PyTorch's name for it in state dicts


def written(meaning: Mapping[str, Any]) -> Tensor:
    """The options as JSON, one character code per entry: (n,) float32 on the CPU."""
    text = json.dumps(meaning, sort_keys=True, skipkeys=True, default=_named)
    return torch.tensor(list(text.encode("ascii")), dtype=torch.float32, device="cpu")


def _named(value: Any) -> str:
    """A name for a value that is not of a plain type, the same in every process."""
    return getattr(value, "__qualname__", type(value).__qualname__)


def read(state: Any) -> dict[str, Any]:
    """The options in an extra state; raises ValueError if it is damaged or not ours."""
    try:
        found = json.loads(bytes(state.detach().round().int().tolist()).decode("ascii"))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the extra state is damaged ({type(error).__name__}); leave it out") from None
    if not isinstance(found, dict):
        raise ValueError(f"the extra state is {found!r}, not options; leave it out")
    return found


def same(meaning: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of options are equal as JSON, where tuples are lists."""
    return torch.equal(written(meaning), written(other))


def listing(meaning: Mapping[str, Any]) -> str:
    """``method='zca', steps=5``, with the values as a state stores them."""
    return ", ".join(f"{name}={value!r}" for name, value in read(written(meaning)).items())


class SelfDescribing(nn.Module):
    """A module whose state dict contains its :meth:`meaning`; it refuses a state with another meaning."""

    def meaning(self) -> dict[str, Any]:
        """The options that determine how the tensors of the state are to be read, of plain types."""
        raise NotImplementedError

    def _say(self, device: torch.device | str | None) -> None:
        """Call once the options are set. Accelerate loads entry by entry, each into a tensor of the same name."""
        # The device of the other buffers, as DDP requires.
        place = torch.get_default_device() if device is None else device
        self.register_buffer(KEY, written(self.meaning()).to(place, torch.long), persistent=False)

    def get_extra_state(self) -> Tensor:
        return written(self.meaning())

    def set_extra_state(self, state: Any) -> None:
        """Raise if the meaning differs; the module itself does not change. A state on ``meta`` is accepted.

        Raises:
            ValueError: the state has other options, or is damaged.
        """
        if not isinstance(state, Tensor) or state.is_meta:  # FSDP gives such states to ranks that read no file
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
            args[-1].append(f"layer '{prefix.rstrip('.')}': {error}")  # PyTorch's error list; nothing is loaded
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        mark = self._buffers[KEY]
        if mark is not None and mark.is_meta and (loaded := [t for t in self.state_dict().values() if not t.is_meta]):
            self._say(loaded[0].device)  # assign=True gave it values


def refuse_treated(missing: list[str], unexpected: list[str], errors: list[str]) -> None:
    """Say how to load the weights of treated layers that would be skipped; the lists are PyTorch's, of one load.

    Without this, a load with ``strict=False`` silently leaves such a layer at its random initialisation.
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
