"""Questions about Python objects: where their code comes from, and what they hold."""

from __future__ import annotations

import enum
import functools
import sys
import types
from pathlib import PurePath
from typing import Any

from torch import Tensor, nn

_VERSIONED = frozenset(
    {*sys.stdlib_module_names, "torch", "numpy", "sympy", "triton", "networkx", "mosaic_compiler", "functorch"}
)


def is_holder(given: Any) -> bool:
    """It may be written to: a list, dict or set, or an object with attributes that is no module or tensor."""
    if isinstance(given, (type, types.ModuleType, types.FunctionType, nn.Module, Tensor, enum.Enum)):
        return False
    return isinstance(given, (dict, list, set)) or isinstance(getattr(given, "__dict__", None), dict)


def label_of(kind: type[Any]) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_versioned(module: str | None) -> bool:
    """A module of a package whose version is part of every key."""
    return module is None or module.partition(".")[0] in _VERSIONED


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


def is_versioned_code(code: types.CodeType) -> bool:
    """It stands where its module says: somebody may have put a function of his own there."""
    return _is_versioned_file(code.co_filename)


@functools.cache
def slots_of(kind: Any) -> tuple[str, ...]:
    """Names of the slots of a class."""
    found: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))
