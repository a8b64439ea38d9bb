"""A picture of an object, however deep, as plain values that can be compared.

They are compared bit for bit, and with the identities of the object.
"""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import decimal
import enum
import functools
import inspect
import io
import mmap
import queue
import random
import socket
import sqlite3
import struct
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

SKIPPED = {"_trainer", "_fabric", "_fabric_optimizers"}
"""Attributes of a LightningModule that lead to the Trainer."""
OURS = ("tests.hunt_cases", "tests.hunt_public")
PLAIN = (type(None), bool, int, str, bytes, np.dtype, torch.dtype, torch.device, torch.Size)


def picture(value: Any) -> Any:
    return _Picture().of(value)


class _Picture:
    def __init__(self) -> None:
        self._seen: dict[
            int, tuple[int, Any]
        ] = {}  # keeps the objects, so that no id is given twice

    def of(self, value: Any) -> Any:
        if isinstance(value, float):
            return ("float", struct.pack("d", value))
        if isinstance(value, PLAIN) and type(value).__module__ not in OURS:
            return (type(value).__name__, repr(value))
        if isinstance(value, Tensor):  # that two tensors are one shows where one is written to
            return (type(value).__name__, tensor_picture(value), self._fields(value))
        if id(value) in self._seen:
            return ("the same as", self._seen[id(value)][0])
        self._seen[id(value)] = (len(self._seen), value)
        return (type(value).__name__, self._content(value), self._fields(value))

    def _content(self, value: Any) -> Any:
        """What the object holds besides its attributes."""
        if isinstance(value, weakref.ProxyTypes):
            return "a proxy"
        if isinstance(value, np.ndarray):
            return (str(value.dtype), value.shape, value.tobytes())
        if isinstance(value, np.generic | complex | enum.Enum | range | decimal.Context):
            return repr(value)
        if isinstance(value, np.random.Generator):
            return self.of(value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return self.of(value.get_state())
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, torch.Generator):
            return tensor_picture(value.get_state())
        if isinstance(
            value, dict | collections.ChainMap | weakref.WeakKeyDictionary | types.MappingProxyType
        ):
            return [(self.of(key), self.of(item)) for key, item in value.items()]
        if isinstance(value, set | frozenset):
            return sorted((self.of(item) for item in value), key=repr)
        if isinstance(value, list | tuple | collections.deque):
            return [self.of(item) for item in value]
        if isinstance(value, bytearray | memoryview | array.array | ctypes._SimpleCData):
            return bytes(value)
        if isinstance(value, functools.partial):
            return [self.of(part) for part in (value.func, value.args, value.keywords)]
        if isinstance(value, types.MethodType):
            return [self.of(value.__self__), value.__func__.__qualname__]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, contextvars.ContextVar):
            return self.of(value.get(None))
        if isinstance(value, queue.SimpleQueue | queue.Queue):
            return [self.of(value.get_nowait()) for _ in range(value.qsize())]
        if isinstance(value, io.StringIO | io.BytesIO):
            return (value.getvalue(), value.tell())
        if isinstance(value, io.IOBase):
            return None if value.closed else (value.tell(), value.flush())
        if isinstance(value, mmap.mmap):
            return (value[:], value.tell())
        if isinstance(value, socket.socket):
            return received(value)
        if isinstance(value, sqlite3.Connection):
            return list(value.iterdump())
        if isinstance(value, Iterator):
            return [self.of(item) for item, _ in zip(value, range(3), strict=False)]
        if hasattr(value, "cache_info"):
            return value.cache_info()[1:]  # how often it was hit is no result of the step
        if isinstance(value, property):
            return self.of(value.fget)
        return None

    def _fields(self, value: Any) -> Any:
        """Its attributes: of objects, and of what usually has none."""
        if isinstance(value, type | types.ModuleType | property) or inspect.isbuiltin(value):
            return None
        names = dict(getattr(value, "__dict__", {}))
        for cls in type(value).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if cls.__module__ in OURS and hasattr(value, name):
                    names[name] = getattr(value, name)
        names = {name: item for name, item in names.items() if name not in SKIPPED}
        # their keys are numbers that count through the process
        names |= {
            name: list(item.values()) for name, item in names.items() if name.endswith("_hooks")
        }
        fields = [(name, self.of(item)) for name, item in sorted(names.items())]
        if isinstance(value, Metric):
            # a reset in the step makes inference tensors, and a graph's states are none
            for _, shown in fields:
                if isinstance(shown, tuple) and isinstance(shown[1], dict):
                    shown[1].pop("is_inference", None)
        if isinstance(value, nn.Module) and type(value).__module__ in OURS:
            fields.append(("class", self.of(type(value))))
        return fields

    def _function(self, value: types.FunctionType) -> Any:
        if value.__module__ not in OURS:
            return value.__qualname__
        cells = [self._cell(cell) for cell in value.__closure__ or ()]
        return (
            value.__qualname__,
            cells,
            self.of(value.__defaults__),
            self.of(value.__kwdefaults__),
        )

    def _cell(self, cell: types.CellType) -> Any:
        try:
            return self.of(cell.cell_contents)
        except ValueError:
            return "empty"

    def _class(self, value: type) -> Any:
        if value.__module__ not in OURS:
            return value.__qualname__
        own = [(name, self.of(item)) for name, item in vars(value).items()
               if name not in ("__dict__", "__weakref__", "__doc__", "__abstractmethods__",
                               "_abc_impl")]  # fmt: skip
        return (value.__qualname__, own, [self.of(base) for base in value.__bases__])


def tensor_picture(value: Tensor) -> Any:
    """Every bit, and what else can be asked of a tensor."""
    with torch.inference_mode():  # views of inference tensors cannot be made outside
        flat = value.clone().cpu().contiguous().reshape(-1)
        values, bits = flat.tolist(), flat.view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(value.dtype),
        "shape": tuple(value.shape),
        "values": values,
        "bits": bits,
        "stride": value.stride(),
        "device": value.device.type,
        "requires_grad": value.requires_grad,
        "is_inference": value.is_inference(),
    }


def received(value: socket.socket) -> bytes:
    """What the other end has sent."""
    value.setblocking(False)
    try:
        return value.recv(1000)
    except BlockingIOError:
        return b""


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """Where two pictures differ first; None: nowhere."""
    if one == other:
        return None
    if type(one) is type(other):
        if isinstance(one, dict) and one.keys() == other.keys():
            return next(filter(None, (difference(one[k], other[k], f"{path}.{k}") for k in one)))
        if all(isinstance(side, tuple) and side[:1] == ("float",) for side in (one, other)):
            one, other = (struct.unpack("d", side[1])[0] for side in (one, other))
        elif isinstance(one, list | tuple) and len(one) == len(other):
            parts = (
                difference(a, b, f"{path}[{i}]")
                for i, (a, b) in enumerate(zip(one, other, strict=True))
            )
            return next(filter(None, parts))
    return f"{path}: eager {shorten(one)}, with the callback {shorten(other)}"


def shorten(value: Any) -> str:
    text = f"{len(value)} items: {value!r}" if isinstance(value, list | tuple) else repr(value)
    return text if len(text) < 300 else text[:150] + " ... " + text[-150:]
