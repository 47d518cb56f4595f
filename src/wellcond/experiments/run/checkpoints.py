"""Checkpoints of a run: `last.ckpt`, the `previous.ckpt` before it, and `best.ckpt` by validation accuracy.

All three hold the complete training state at the end of an epoch: a run continues exactly from any of them. They
contain only tensors and plain values, and are read with `weights_only=True`, which executes no code.

`torch.save` writes a ZIP archive. Its comment, the last bytes of the file, holds the SHA-256 of everything before it:
the checksum cannot get separated from the file, and `torch.load` reads it as usual.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from wellcond.experiments.errors import CheckpointError, needs_train_extra
from wellcond.experiments.files import write_atomically

with needs_train_extra():
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.plugins.io import TorchCheckpointIO

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
DAMAGED = ".damaged"
"""Suffix of a damaged file that is set aside when a run continues without it."""

PARTS = (
    *("state_dict", "epoch", "global_step", "optimizer_states", "lr_schedulers", "loops", "callbacks"),
    *("treatment", "solver_events", "pytorch-lightning_version"),
)
"""The entries of a checkpoint that a run needs to continue."""

MARK, DIGITS = b"sha256 ", 2 * hashlib.sha256().digest_size


def sealed(archive: bytes) -> bytes:
    """The ZIP archive (without a comment) with its checksum as comment."""
    body = archive[:-2]  # up to the length of the comment, the last field of a ZIP archive
    comment = MARK + hashlib.sha256(body).hexdigest().encode()
    return body + struct.pack("<H", len(comment)) + comment


def is_whole(data: bytes) -> bool:
    """Whether the checksum of a sealed archive matches; without a seal, the CRC-32 of all its members."""
    comment = data[-len(MARK) - DIGITS :]
    if comment.startswith(MARK):
        return data == sealed(data[: -len(comment) - 2] + b"\0\0")
    try:
        return zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    except Exception:  # zipfile raises many types for a damaged file
        return False


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints atomically.

    The old `last.ckpt` becomes `previous.ckpt` once the new one is on disk. If writing fails, a `CheckpointError` is
    raised and the existing files remain.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        # Serialised in memory first, so that a full disk raises a plain OSError.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            previous = path.with_name(PREVIOUS) if path.name == LAST else None
            write_atomically(path, sealed(buffer.getvalue()), previous=previous)
        except OSError as error:
            kept = [name for name in (LAST, PREVIOUS, BEST) if path.with_name(name).exists()]
            raise CheckpointError(
                f"cannot save '{path}': {error.strerror or error}; the earlier checkpoints remain "
                f"({', '.join(kept) or 'none yet'}): make room, then continue with --resume"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU, always with `weights_only=True`."""
        return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: Path, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """The contents of a checkpoint; a one-line `ValueError` if it cannot be read or lacks one of the parts."""
    data = path.read_bytes()
    if not is_whole(data):
        raise ValueError("it is damaged: its contents do not have its checksum")
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # its long message suggests to execute the code
        raise ValueError("it is damaged or unsafe: it holds more than tensors and plain values") from error
    except Exception as error:  # torch raises many types for a damaged file
        raise ValueError("it is damaged") from error
    lacking = [part for part in parts if part not in checkpoint] if isinstance(checkpoint, Mapping) else parts
    if lacking:
        raise ValueError(f"it is not a training checkpoint: it has no {lacking[0]}")
    return dict(checkpoint)


def newest_readable(folder: Path, parts: Sequence[str] = PARTS) -> tuple[Path, dict[str, Any], dict[Path, str]]:
    """The most advanced readable checkpoint in `folder`, its contents, and what is wrong with unreadable ones.

    Others than `last.ckpt` are opened only if that is missing or damaged.

    Raises:
        CheckpointError: there is no checkpoint, or none can be read.
    """
    troubles: dict[Path, str] = {}
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in (folder / name for name in (LAST, PREVIOUS, BEST)):
        if not path.exists() or (found and found[0][0].name == LAST):
            continue
        try:
            found.append((path, read_checkpoint(path, parts)))
        except ValueError as error:
            troubles[path] = f"'{path}' cannot be read ({error})"
    if not found:
        what = "; ".join(troubles.values()) or f"no checkpoint in '{folder}'"
        raise CheckpointError(f"{what}: nothing to resume from; start afresh with --overwrite")
    path, checkpoint = max(found, key=lambda one: one[1]["global_step"])
    return path, checkpoint, troubles


class BestAndLast(Checkpoint):
    """Saves `last.ckpt` after every epoch, and `best.ckpt` when validation accuracy has improved."""

    best_accuracy: float
    best_epoch: int

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best_accuracy, self.best_epoch = -1.0, -1  # accuracy as a fraction, epochs counted from 0

    def state_dict(self) -> dict[str, Any]:
        return {"best_accuracy": self.best_accuracy, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_accuracy, self.best_epoch = state_dict["best_accuracy"], state_dict["best_epoch"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; called on every rank, as Lightning gathers sharded state, and written by rank 0."""
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        if accuracy > self.best_accuracy:  # ties keep the earlier one
            self.best_accuracy, self.best_epoch = accuracy, trainer.current_epoch
            trainer.save_checkpoint(self.folder / BEST)
        trainer.save_checkpoint(self.folder / LAST)
