"""What something is: a metric, the user's or a framework's, a part of Lightning."""

from __future__ import annotations

import functools
import sys
import sysconfig
from pathlib import Path

from torch import nn
from torchmetrics import Metric, MetricCollection

_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "torchmetrics")
_LIGHTNING = ("lightning.", "pytorch_lightning.")
_OURS = str(Path(__file__).resolve().parent.parent)


def is_metric(module: nn.Module) -> bool:
    """Whether ``module`` is a metric or a collection of them."""
    return isinstance(module, (Metric, MetricCollection))


def is_user_class(cls: type) -> bool:
    """Whether a class is none of Python, torch, Lightning or torchmetrics."""
    return cls.__module__.split(".")[0] not in ("builtins", "functools", *_FRAMEWORKS)


def is_user_module(module: nn.Module) -> bool:
    """Whether the class of ``module`` is none of torch, Lightning or torchmetrics."""
    return is_user_class(type(module))


def lightning_class(cls: type, *names: str) -> type | None:
    """Return the first base of ``cls`` that Lightning defines by one of these names, if any.

    There are two packages that define them, ``lightning`` and ``pytorch_lightning``. Neither is
    imported for the question.
    """
    return next(
        (
            base
            for base in cls.__mro__
            if base.__name__ in names and base.__module__.startswith(_LIGHTNING)
        ),
        None,
    )


def _folder(package: str) -> str | None:
    file = getattr(sys.modules.get(package), "__file__", None)
    return None if file is None else f"{Path(file).parent}/"


def _is_library(file: str) -> bool:
    """Whether a file is in a folder for libraries, or in that of a framework, wherever it is installed."""
    installed = [sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")]
    folders = [*installed, *map(_folder, _FRAMEWORKS)]
    return file.startswith(("<frozen", *[folder for folder in folders if folder]))


@functools.lru_cache(maxsize=4096)
def is_user_file(file: str) -> bool:
    """Whether code in this file is none of a library or of this package; the demo counts as the user's."""
    is_ours = file.startswith(_OURS) and not file.startswith(f"{_OURS}/app")
    return not is_ours and not _is_library(file)
