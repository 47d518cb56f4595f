"""Opening sources of images: a name, a path, arrays or a Hugging Face `DatasetDict`, as labelled splits.

Files are read only through `datasets`; no code of a data set is executed and nothing is unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wellcond._shared.names import did_you_mean, listed
from wellcond.experiments.data.contents import IMAGE_SUFFIXES, Skipped, files_below
from wellcond.experiments.data.image_folders import from_image_folders
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.named import NAMED
from wellcond.experiments.data.parquet_files import from_parquet, with_images
from wellcond.experiments.data.tables import Source, classes_of, from_tables, refuse_no_labels
from wellcond.experiments.errors import DataError, needs_train_extra

EXPECTED = f"a data set is one of {listed(NAMED)}; a name on the Hugging Face hub, OWNER/NAME; or a path"
_HUB_TIMEOUT = 10.0  # seconds


def open_source(source: Any) -> Source:
    """The splits of any source that `load_images` accepts. Images in files are not decoded yet."""
    if isinstance(source, os.PathLike):
        return _from_path(Path(source))
    if isinstance(source, tuple) and len(source) == 2:
        return _from_arrays(*source)
    if isinstance(source, str):
        return _from_name(source)
    if isinstance(source, Mapping):  # such as a DatasetDict
        return from_tables("the data set given", source, "datasets")
    raise TypeError(
        f"images come from a name, a path, a pair (images, labels) or a datasets.DatasetDict, not {type(source)}"
    )


def _from_name(name: str) -> Source:
    """A data set in `NAMED`, an existing path, or a name on the hub, in this order."""
    if name in NAMED:
        return from_hub(NAMED[name].HUB, name) if hasattr(NAMED[name], "HUB") else NAMED[name].load()
    path = Path(name).expanduser()
    if (name and path.exists()) or re.match(r"[./~]|[A-Za-z]:[\\/]|.*\\", name) or name.count("/") > 1:
        return _from_path(path)
    # Only very similar names, as this rejects a name that might exist on the hub.
    if "/" not in name and get_close_matches(name.lower(), NAMED, cutoff=0.8):
        raise DataError(f"unknown data set '{name}'{did_you_mean(name, NAMED)} ({EXPECTED})")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name):
        raise DataError(f"'{name}' is not the name of a data set ({EXPECTED})")
    return from_hub(name, name)


def _from_arrays(images: Any, labels: Any) -> Source:
    """Arrays in memory with integer labels, whose sorted values become classes 0, 1, …"""
    images, values = torch.as_tensor(images), np.asarray(labels)
    if images.dtype != torch.uint8:
        raise DataError(f"images in memory must be uint8 with values 0 to 255, got {images.dtype}")
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"images in memory must be (N, H, W), (N, 1, H, W) or (N, 3, H, W), got {tuple(images.shape)}"
            + ("; move the channels: images.transpose(0, 3, 1, 2)" if images.shape[-1] in (1, 3) else "")
        )
    if values.shape != images.shape[:1] or values.dtype.kind not in "iu":
        raise DataError(
            f"labels must be {len(images)} integers, one per image, got shape {values.shape} of {values.dtype}"
        )
    refuse_no_labels("labels", values)
    codes, classes = classes_of("labels", {"train": values})
    return Source("arrays", {"train": ImageSet(images, codes["train"])}, classes)


def from_hub(hub_name: str, name: str) -> Source:
    """A data set on the hub, `OWNER/NAME` or `OWNER/NAME:CONFIGURATION`, downloaded and cached by `datasets`."""
    with needs_train_extra():
        import datasets
        from datasets import config
        from huggingface_hub import HfApi
        from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    repository, _, configuration = hub_name.partition(":")
    reachable, trouble = True, ""
    try:  # fail fast: without a network `datasets` would retry for half a minute
        HfApi().dataset_info(repository, timeout=_HUB_TIMEOUT)
    except GatedRepoError as error:
        raise DataError(f"data set '{name}' is gated on the hub: accept its terms there and log in") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"no data set '{name}' on the hub{_nearby(Path(name))} ({EXPECTED})") from error
    except Exception as error:  # the type depends on the HTTP client of the installed version
        reachable, trouble = isinstance(error, HfHubHTTPError), f"{type(error).__name__}: {error}"
    offline = config.HF_HUB_OFFLINE
    try:
        config.HF_HUB_OFFLINE = offline or not reachable  # use only the cache
        tables = datasets.load_dataset(repository, configuration or None)
    except Exception as error:
        if not reachable:
            raise DataError(
                f"data set '{name}' is not on this machine and the hub cannot be reached ({trouble})"
                f"{_nearby(Path(name))}; download it where there is a network, or give a path ({EXPECTED})"
            ) from error
        hint = " (a configuration is chosen by OWNER/NAME:CONFIGURATION)" if "onfig" in str(error) else ""
        raise DataError(f"data set '{name}' cannot be loaded from the hub: {trouble} {error}{hint}") from error
    finally:
        config.HF_HUB_OFFLINE = offline
    return from_tables(f"'{name}'", tables, name)


def _from_path(path: Path) -> Source:
    """A folder with Parquet files in the hub's layout or with one image folder per class, or one Parquet file."""
    path = path.expanduser()
    if not path.exists():
        raise DataError(f"no such path: '{path}'{_nearby(path)}")
    place, name = f"'{path}'", path.name or path.resolve().name
    if path.suffix == ".parquet" and path.is_file():
        return from_tables(place, from_parquet(path, [path]), name)
    if not path.is_dir():
        raise DataError(f"'{path}' is neither a folder nor a parquet file")
    skipped = Skipped(path)
    files = list(files_below(path, skipped))
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    tables = with_images(parquet) or ([] if images else parquet)  # no images anywhere: let the tables raise
    if tables and len({image.parent for image in images}) > 1:
        raise DataError(
            f"'{path}' holds images in folders and parquet files with images ({listed(f.name for f in tables)}): "
            "remove one of the two, or name the parquet file"
        )
    for file in sorted(set(files).difference(tables or images)):
        skipped.add(_reason(file), file)
    if tables:
        found = from_tables(place, from_parquet(path, tables), name)
        return replace(found, notes=(*found.notes, *skipped.lines()))
    folders, notes = from_image_folders(path, images, skipped)
    found = from_tables(place, folders, name)
    return replace(found, notes=(*found.notes, *notes, *skipped.lines()))


def _reason(file: Path) -> str:
    """Why a file is skipped."""
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return "an image next to parquet files, which are the data set"
    return "a table without images" if file.suffix.lower() == ".parquet" else "not an image by its name"


def _nearby(path: Path) -> str:
    """`; did you mean 'X'?` if the parent folder contains a similar name."""
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
