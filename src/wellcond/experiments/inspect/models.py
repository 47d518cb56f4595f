"""Inspecting any importable model: `timm:NAME`, `torchvision:NAME`, `transformers:NAME` or `MODULE:CALLABLE`.

Its weights are randomly initialised from a fixed seed; nothing is downloaded. The numbers of classes, channels and
pixels are those of the data set if the model takes them as arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from wellcond._shared.names import choices, require_known
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import ImageData, load_images
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.inspect.found import Inspection
from wellcond.experiments.inspect.look import Look, spectral_or_norms

FORMS = "timm:resnet18, torchvision:resnet18, transformers:resnet, or package.module:callable"


def inspect_model(
    model: str,
    *,
    data: str | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    **look: Any,
) -> Inspection:
    """Measure the condition numbers of the layers of a model.

    The options are those of `wellcond inspect`; ``look`` are those of :class:`Look`.

    Raises:
        ValueError: an unknown model, one that cannot be built, has no layer to look at or rejects the images, or an
            option invalid for :class:`Look`.
        ImportError: the model's package is not installed.
        OSError: ``out`` or the picture cannot be written.
    """
    looking = Look(**look)
    _split(model)
    found = load_images(data or "digits", image_size=image_size)
    images = ImageDataModule(found, min(128, len(found.train)) if batch_size is None else batch_size, augment=False)

    def forward(inputs: Tensor) -> object:
        size = " × ".join(map(str, inputs.shape[1:]))
        with _one_line_errors(f"'{model}' fails on images of {size}", "choose another --data or --image-size"):
            return network(inputs)

    with _current_folder():
        network = _built(model, found)
        return looking.at(network, network, images, spectral_or_norms(network), forward, title=model)


def _built(name: str, data: ImageData) -> nn.Module:
    """Build the named model for the classes, channels and pixels of the data."""
    source, attribute = _split(name)
    if source in LIBRARIES:
        try:
            library = import_module(source)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"'{name}' needs the package '{error.name}', which is not installed: pip install {error.name}"
            ) from error
        make = partial(LIBRARIES[source], library, attribute, data)
    else:
        make = _from_module(source, attribute, data)
    torch.manual_seed(0)
    with _one_line_errors(f"'{name}' cannot be built"):
        made = make()
    if not isinstance(made, nn.Module):
        raise ConfigError(f"'{name}' gave an object of class {type(made).__name__}, not a torch.nn.Module")
    return made


def _split(name: str) -> tuple[str, str]:
    source, _, attribute = name.partition(":")
    if not source or not attribute:
        raise ConfigError(f"'{name}' is not a model that can be imported; write {FORMS}")
    return source, attribute


def _from_module(source: str, attribute: str, data: ImageData) -> Callable[[], Any]:
    """A callable of a Python module with its arguments; an existing model is returned as it is."""
    try:
        with _one_line_errors(f"importing '{source}' failed"):
            module = import_module(source)
    except ConfigError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name and f"{source}.".startswith(f"{missing.name}."):
            raise ConfigError(f"there is no module '{source}' (no '{missing.name}'); write {FORMS}") from error
        raise
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [key for key in dir(found) if not key.startswith("_") and callable(getattr(found, key, None))]
            raise ConfigError(f"'{source}' has no '{attribute}'{choices(part, known)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise ConfigError(f"'{source}:{attribute}' is an object of class {type(found).__name__}, not a callable")
    return partial(found, **_arguments(f"{source}:{attribute}", found, data))


def _arguments(name: str, make: Callable[..., Any], data: ImageData) -> dict[str, Any]:
    """The arguments of the callable that are known from the data."""
    try:
        parameters = signature(make).parameters.values()
    except (TypeError, ValueError):  # a callable implemented in C
        return {}
    known = {
        **{"num_classes": data.num_classes, "in_channels": data.in_channels, "in_chans": data.in_channels},
        **{"image_size": data.image_size[0], "img_size": data.image_size[0]},
    }
    required = [
        p.name
        for p in parameters
        if p.default is Parameter.empty and p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
    if wanting := [name for name in required if name not in known]:
        raise ConfigError(
            f"'{name}' requires arguments {', '.join(wanting)}; name a callable that needs none but {', '.join(known)}"
        )
    return {p.name: known[p.name] for p in parameters if p.name in known and p.kind is not Parameter.POSITIONAL_ONLY}


def _timm(timm: Any, name: str, data: ImageData) -> Any:
    require_known(name.partition(".")[0], timm.list_models(), "model of timm", error=ConfigError)
    return timm.create_model(name, pretrained=False, num_classes=data.num_classes, in_chans=data.in_channels)


def _torchvision(torchvision: Any, name: str, data: ImageData) -> Any:
    require_known(name, torchvision.models.list_models(), "model of torchvision", error=ConfigError)
    return torchvision.models.get_model(name, weights=None, num_classes=data.num_classes)


def _transformers(transformers: Any, name: str, data: ImageData) -> Any:
    """An image classifier with the default sizes of its configuration class."""
    require_known(name, transformers.CONFIG_MAPPING, "model type of transformers", error=ConfigError)
    config = transformers.AutoConfig.for_model(name, num_labels=data.num_classes)
    for option, value in (("num_channels", data.in_channels), ("image_size", data.image_size[0])):
        if hasattr(config, option):
            setattr(config, option, value)
    return transformers.AutoModelForImageClassification.from_config(config)


LIBRARIES: dict[str, Callable[[Any, str, ImageData], Any]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


@contextmanager
def _current_folder() -> Iterator[None]:
    """Make modules in the current folder importable, as `python -m` does."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


@contextmanager
def _one_line_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turn exceptions of the model's code into a one-line `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # scripts may call sys.exit on import
        first = next(iter(str(error).splitlines()), "")
        message = f"{what}: {type(error).__name__}{': ' if first else ''}{first}"
        raise ConfigError(f"{message}; {advice}" if advice else message) from error
