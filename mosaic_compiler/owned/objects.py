"""Questions about Python objects: where their code comes from, and what they hold."""

from __future__ import annotations

import enum
import functools
import sys
import threading
import types
import weakref
from collections import deque
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

_VERSIONED = frozenset(
    {*sys.stdlib_module_names, "torch", "numpy", "sympy", "triton", "networkx", "mosaic_compiler", "functorch"}
)

UNKNOWN_TO_HASHES = frozenset(
    [
        "time",
        "datetime",
        "uuid",
        "secrets",
        "socket",
        "os",
        "random",
        "numpy",
        "io",
        "pathlib",
        "subprocess",
        "tempfile",
    ]
)
"""Modules whose functions say something else in each call, or process; what a user's own code asks them, a hash does
not know."""

ASK_FOR_ANYTHING = frozenset({"open", "input", "eval", "exec", "globals", "locals", "vars", "__import__"})

NO_CODE = frozenset({"__module__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__qualname__"})

NAMED = (types.GenericAlias, types.UnionType, types.EllipsisType, types.NotImplementedType)
"""Objects that are what they are called."""

LOCKS = (type(threading.Lock()), type(threading.RLock()))
"""Objects that no result depends on."""


SEQUENCES = (list, set, deque)


def is_holder(given: Any) -> bool:
    """It may be written to: a list, dict, set or deque, or an object with attributes that is no module or tensor."""
    if isinstance(given, (type, types.ModuleType, types.FunctionType, nn.Module, Tensor, enum.Enum)):
        return False
    return isinstance(given, (dict, *SEQUENCES)) or isinstance(getattr(given, "__dict__", None), dict)


def label_of(kind: type[Any]) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_versioned(module: str | None) -> bool:
    """A module of a package whose version is part of every key."""
    return not isinstance(module, str) or module.partition(".")[0] in _VERSIONED


_OWN_FOLDERS = tuple(
    str(PurePath(found).parent)
    for name in ("torch", "numpy", "functools", "mosaic_compiler")
    if (found := getattr(sys.modules.get(name), "__file__", None)) is not None
)


@functools.cache
def is_installed(file: str | None) -> bool:
    """A file of an installed package, so nothing that a user is working on."""
    return file is not None and ("site-packages" in file or "dist-packages" in file)


@functools.cache
def _is_versioned_file(name: str) -> bool:
    return name.startswith(_OWN_FOLDERS) or name.startswith("<")


def is_versioned_code(given: types.FunctionType) -> bool:
    """It stands where its module says: somebody may have put a function of his own there, or made it of a text."""
    file = given.__code__.co_filename
    if file.startswith("<") and not file.startswith("<frozen"):
        return given.__globals__ is vars(sys.modules.get(given.__module__ or "", object))
    return _is_versioned_file(file)


def is_where_it_says(kind: type[Any]) -> bool:
    """A class is that of its module, and not one that somebody has made with its name (``Parametrized...``)."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind or "<locals>" in kind.__qualname__


@functools.cache
def is_written_in_c(kind: Any) -> bool:
    """Its objects may hold what is no attribute of theirs."""
    known = (object, *(base for base in kind.__mro__ if "__slots__" in base.__dict__ or "__dict__" in base.__dict__))
    return any(base not in known and (is_versioned(base.__module__) and not _has_code(base)) for base in kind.__mro__)


def _has_code(kind: type[Any]) -> bool:
    return any(isinstance(item, types.FunctionType) for item in kind.__dict__.values())


MODULE_PARTS = (
    "_parameters", "_buffers", "_modules",
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs",
)  # fmt: skip
"""Dicts of a module whose items count."""


def state_of(owner: Any) -> list[Any]:
    """What a module, an object or a container holds; of tensors and modules without keeping them alive."""
    if isinstance(owner, nn.Module):
        own = owner.__dict__
        held = [*own, *own.values(), *(value for name in MODULE_PARTS for value in own[name].values())]
    elif isinstance(owner, dict):
        held = [*owner.keys(), *owner.values(), *getattr(owner, "__dict__", {}).values()]
    elif isinstance(owner, SEQUENCES):
        held = list(owner)
    else:
        held = [*owner.__dict__, *owner.__dict__.values()]
    return [type(owner), *map(_noted, held)]


def is_as_it_was(owner: Any, known: list[Any]) -> bool:
    """Nothing of :func:`state_of` is another object, and no tensor has another layout."""
    now = state_of(owner)
    return len(now) == len(known) and all(map(_is_same, now, known))


def _noted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Noted(weakref.ref(value), layout_of(value))
    if isinstance(value, nn.Module):
        return Noted(weakref.ref(value), None)
    return value


def layout_of(value: Tensor) -> tuple[Any, ...]:
    """What a trace can see of a tensor."""
    return value.dtype, value.device, value.shape, value.stride() if value.layout is torch.strided else ()


def _is_same(now: Any, known: Any) -> bool:
    if isinstance(now, Noted):
        return isinstance(known, Noted) and now.place() is known.place() and now.layout == known.layout
    return now is known or (type(now) is type(known) and type(now) in (int, float, bool, str) and now == known)


class Noted:
    """A tensor or module that is not kept alive.

    Attributes:
        place: a weak reference to it.
        layout: of a tensor; ``None`` of a module.
    """

    __slots__ = ("layout", "place")

    def __init__(self, place: Any, layout: Any) -> None:
        self.place, self.layout = place, layout


@functools.cache
def slots_of(kind: Any) -> tuple[str, ...]:
    """Names of the slots of a class."""
    found: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))
