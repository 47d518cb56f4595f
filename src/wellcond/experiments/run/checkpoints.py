"""Checkpoints of a run: `last.ckpt`, the `previous.ckpt` before it, and `best.ckpt` by validation accuracy.

All three hold the whole state of the training at the end of an epoch: a run continues exactly from any of
them. They hold tensors and plain values only, and are read with `weights_only=True`: reading runs no code.

A file of `torch.save` is a ZIP archive. Its comment, the last bytes of the file, has the SHA-256 of all before it:
checksum and file cannot be torn apart, and `torch.load` reads the file as any other.
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
"""What is put after the name of a checkpoint that cannot be read, when a run goes on without it."""

PARTS = (
    *("state_dict", "epoch", "global_step", "optimizer_states", "lr_schedulers", "loops", "callbacks"),
    *("treatment", "solver_events", "pytorch-lightning_version"),
)
"""What a run needs to go on."""

MARK, DIGITS = b"sha256 ", 2 * hashlib.sha256().digest_size


def sealed(archive: bytes) -> bytes:
    """A ZIP archive without a comment, with its checksum as the comment."""
    body = archive[:-2]  # up to the length of the comment, the last field of a ZIP archive
    comment = MARK + hashlib.sha256(body).hexdigest().encode()
    return body + struct.pack("<H", len(comment)) + comment


def is_whole(data: bytes) -> bool:
    """Whether the checksum of a sealed archive is right; of one that is not sealed, the CRC-32 of all its members."""
    comment = data[-len(MARK) - DIGITS :]
    if comment.startswith(MARK):
        return data == sealed(data[: -len(comment) - 2] + b"\0\0")
    try:
        return zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    except Exception:  # zipfile raises many kinds for a damaged file
        return False


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to the disk: whole files or none.

    The old `last.ckpt` becomes `previous.ckpt` once the new one is on the disk. Where the disk is full or refuses, a
    `CheckpointError` says so and what was there remains.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        # Serialised in memory first, so that a full disk is the OSError it is, not an archive half written.
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
        """Read a checkpoint to the CPU; always with `weights_only=True`, whatever Lightning asks."""
        return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: Path, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """What a checkpoint holds; a `ValueError` says in a line why it cannot be read or lacks one of the parts."""
    data = path.read_bytes()
    if not is_whole(data):
        raise ValueError("it is damaged: its contents do not have its checksum")
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # whose many lines advise to run the code
        raise ValueError("it is damaged or unsafe: it holds more than tensors and plain values") from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError("it is damaged") from error
    lacking = [part for part in parts if part not in checkpoint] if isinstance(checkpoint, Mapping) else parts
    if lacking:
        raise ValueError(f"it is not a training checkpoint: it has no {lacking[0]}")
    return dict(checkpoint)


def newest_readable(folder: Path) -> tuple[Path, dict[str, Any], dict[Path, str]]:
    """The checkpoint in `folder` that is furthest of those that can be read, its contents, and what was wrong
    with those that cannot. The others are opened only where `last.ckpt` is missing or damaged.

    Raises:
        CheckpointError: there is no checkpoint, or none can be read.
    """
    troubles: dict[Path, str] = {}
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in (folder / name for name in (LAST, PREVIOUS, BEST)):
        if not path.exists() or (found and found[0][0].name == LAST):
            continue
        try:
            found.append((path, read_checkpoint(path)))
        except ValueError as error:
            troubles[path] = f"'{path}' cannot be read ({error})"
    if not found:
        what = "; ".join(troubles.values()) or f"no checkpoint in '{folder}'"
        raise CheckpointError(f"{what}: nothing to resume from; start afresh with --overwrite")
    path, checkpoint = max(found, key=lambda one: one[1]["global_step"])
    return path, checkpoint, troubles


class BestAndLast(Checkpoint):
    """Save at the end of every epoch: `last.ckpt`, and `best.ckpt` when validation accuracy rose."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best_accuracy, self.best_epoch = -1.0, -1  # a fraction, and counted from 0, once there is one

    def state_dict(self) -> dict[str, Any]:
        return {"best_accuracy": self.best_accuracy, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_accuracy, self.best_epoch = state_dict["best_accuracy"], state_dict["best_epoch"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save on every rank (Lightning gathers what is spread), written by rank 0."""
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        if accuracy > self.best_accuracy:  # of equals the first is kept
            self.best_accuracy, self.best_epoch = accuracy, trainer.current_epoch
            trainer.save_checkpoint(self.folder / BEST)
        trainer.save_checkpoint(self.folder / LAST)
