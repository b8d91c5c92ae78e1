"""The walk over what a function refers to; see ``fingerprint.py``.

Whatever is met is hashed by what it holds, or named as a doubt: nothing is passed over that a trace could look at.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import logging
import re
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket

from mosaic_compiler.compat.tensors import may_be_replaced, operators_named
from mosaic_compiler.owned.objects import (
    ASK_FOR_ANYTHING,
    LOCKS,
    NAMED,
    NO_CODE,
    UNKNOWN_TO_HASHES,
    is_holder,
    is_installed,
    is_versioned,
    is_versioned_code,
    is_where_it_says,
    is_written_in_c,
    label_of,
    slots_of,
)  # fmt: skip

_SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, range)
_ALWAYS = (
    "forward", "__call__", "__init__", "__new__", "__post_init__", "__getattr__", "__getattribute__", "__iter__",
    "__getitem__", "__len__", "__contains__", "__enter__", "__exit__", "__eq__", "__bool__", "__get__",
)  # fmt: skip
"""Methods that nobody names; of classes that are not installed, all methods with two underscores are such."""
_WHERE_FROM = ("_name_or_path", "_commit_hash", "_original_object_hash")
"""Entries of configs that say where a model was loaded from, and a hash that is another one in each process."""

_OF_DYNAMO = ("_torchdynamo_wrapper_id", "_is_torch_compile", "_compiled_call_impl")
"""What ``torch.compile`` puts down at what it compiles."""


class Walk:
    """The walk: data is entered at once, functions and classes in the order in which they were found."""

    def __init__(self) -> None:
        self.hash, self.state = hashlib.sha256(), hashlib.sha256()
        self._is_installed = False
        self.doubts: dict[str, None] = {}
        self._is_wide = False
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.holders: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._later: deque[Callable[[], None]] = deque()
        self._names: dict[str, None] = dict.fromkeys(_ALWAYS)
        self._classes: list[type[Any]] = []
        self._packages: list[types.ModuleType] = []
        self._versioned: list[types.ModuleType] = []
        self._looked: set[tuple[int, str]] = set()

    def emit(self, *parts: Any) -> None:
        """Some text, as a part of what is hashed."""
        text = repr(parts).encode()
        self.hash.update(text)
        if not self._is_installed:
            self.state.update(text)

    def finish(self) -> None:
        """Enter what was put off, and what that makes reachable by name."""
        while True:
            while self._later:
                self._later.popleft()()
            known = len(self._looked)
            for number, owner in enumerate(self._classes):
                self._is_installed = is_installed(getattr(sys.modules.get(owner.__module__), "__file__", None))
                self._look(number, owner.__qualname__, owner.__dict__)
            for number, package in enumerate(self._packages):
                self._is_installed = is_installed(getattr(package, "__file__", None))
                self._look(-1 - number, package.__name__, vars(package))
            for package in self._versioned:
                held = {name: item for name, item in vars(package).items() if name in self._names}
                self._foreign({name: held[name] for name in held if (id(package), name) not in self._looked})
                self._looked.update((id(package), name) for name in held)
            if len(self._looked) == known and not self._later:
                break

    def _look(self, number: int, label: str, held: Mapping[str, Any]) -> None:
        """Attributes of a class or package whose names some code uses."""
        for name in [name for name in held if self._counts(number, name)]:
            is_imported = number < 0 and (name.startswith("__") or isinstance(held[name], types.ModuleType))
            if is_imported and (self._is_installed or name.startswith("__")):
                continue  # a part of an installed package, which is there once somebody has asked for it
            if (number, name) not in self._looked:
                self._looked.add((number, name))
                self.emit("attribute", label, name)
                self.value(held[name])

    def _counts(self, number: int, name: str) -> bool:
        """An attribute of a class (from 0 on) or package that some code may use."""
        if name in self._names:
            return True
        is_own_class = number >= 0 and not self._is_installed
        return is_own_class and name not in NO_CODE and (self._is_wide or name.startswith("__"))

    # ------------------------------------------------------------------------------------------- data
    def value(self, given: Any) -> None:
        """Any object."""
        kind = type(given)
        if kind in _SIMPLE:
            self.emit(kind.__name__, repr(given))
            return
        number = self._numbers.get(id(given))
        if number is not None:
            self.hash.update(f"@{number}".encode())
            return
        self._numbers[id(given)] = len(self._numbers)
        self._alive.append(given)  # so that no other object gets its id
        if not self._is_installed and is_holder(given):
            self.holders.append(given)
        if isinstance(given, Tensor):
            self._tensor(given)
        elif isinstance(given, nn.Module):
            self.modules.append(given)
            self._object(given)
        elif isinstance(given, enum.Enum):
            self.emit("enum", label_of(kind), given.name)
            self.value(given.value)
        elif isinstance(given, Mapping):
            self._mapping(given)
            self._own_attributes(kind, given)
        elif isinstance(given, (list, tuple, deque)):
            self.emit(label_of(kind), len(given))
            is_loose = self._is_installed and all(type(item) in _SIMPLE for item in given)
            for item in sorted(given, key=repr) if is_loose else given:
                self.value(item)
            self._own_attributes(kind, given)
        elif isinstance(given, (set, frozenset)):
            self._set(given)
        elif isinstance(given, type):
            self._class(given)
        elif isinstance(given, types.ModuleType):
            self._package(given)
        elif isinstance(given, weakref.ReferenceType):
            self.emit("weak")
            self.value(given())
        else:
            self._callable(kind, given)

    def _tensor(self, given: Tensor) -> None:
        self.tensors.append(given)
        layout = (tuple(given.shape), tuple(given.stride())) if given.layout is torch.strided else tuple(given.shape)
        self.emit("tensor", label_of(type(given)), str(given.dtype), str(given.device), layout, given.requires_grad)
        for name, item in sorted(given.__dict__.items()):
            if not name.startswith("_dynamo"):
                self.emit(name)
                self.value(item)

    def _own_attributes(self, kind: type[Any], given: Any) -> None:
        """What an object of a class derived from a container has besides what it contains."""
        if not is_versioned(kind.__module__):
            self._object(given)

    def _mapping(self, given: Mapping[Any, Any]) -> None:
        if isinstance(given, (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)):
            self.emit("weak mapping")  # something remembered about objects, not of them
            return
        self.emit(label_of(type(given)), len(given))
        items = list(given.items())
        if self._is_installed and all(isinstance(key, str) for key, _ in items):
            items.sort(key=lambda pair: pair[0])  # tables of what is installed come in any order
        for key, item in items:
            self.value(key)
            self.value(item)

    def _set(self, given: Iterable[Any]) -> None:
        items = list(given)
        if all(type(item) in _SIMPLE for item in items):
            self.emit("set", sorted(map(repr, items)))
        else:
            self.emit("set", sorted(label_of(item if isinstance(item, type) else type(item)) for item in items))
            for item in sorted(items, key=lambda item: (label_of(type(item)), str(getattr(item, "__qualname__", "")))):
                self.value(item)

    def _object(self, given: Any) -> None:
        """An instance: its class, and what it holds."""
        self.emit("object")
        self.value(type(given))
        held = getattr(given, "__dict__", None)
        if held is not None:
            for name, item in list(held.items()):
                if name not in _OF_DYNAMO and (name not in _WHERE_FROM or name in self._names):
                    self.emit(name)
                    self.value(item)
        kind: Any = type(given)
        for slot in slots_of(kind):
            self.emit(slot)
            self.value(getattr(given, slot, None))

    # ------------------------------------------------------------------------------------------- code
    def _callable(self, kind: Any, given: Any) -> None:
        if kind is types.FunctionType:
            self._function(given)
        elif kind is types.MethodType:
            self.emit("method")
            self.value(given.__func__)
            self.value(given.__self__)
        elif kind is functools.partial:
            self.emit("partial")
            for part in (given.func, given.args, given.keywords):
                self.value(part)
        elif kind in (staticmethod, classmethod, functools._lru_cache_wrapper):
            self.emit(kind.__name__)
            self.value(given.__wrapped__)
        elif kind is functools.cached_property:
            self.emit("cached_property")
            self.value(given.func)
        elif kind is property:
            self.emit("property")
            for part in (given.fget, given.fset):
                self.value(part)
        elif isinstance(given, logging.Logger):
            self.emit("logger", given.name)
        elif isinstance(given, re.Pattern):
            self.emit("pattern", given.pattern, given.flags)
        elif isinstance(given, PurePath):
            self.emit("path", str(given))
        elif kind.__module__ == "numpy" and hasattr(given, "tobytes"):
            self.emit("numpy", str(getattr(given, "dtype", "")), getattr(given, "shape", ()), bytes(given.tobytes()))
        elif hasattr(given, "__qualname__") and not hasattr(given, "__dict__"):
            self.emit("builtin", getattr(given, "__module__", ""), given.__qualname__)
            self._ask(getattr(given, "__module__", None))
            self._ask(type(getattr(given, "__self__", None)).__module__)
        elif kind.__module__.partition(".")[0] == "torch" or kind in (*NAMED, *LOCKS) or kind.__module__ == "typing":
            self._of_pytorch(kind, given)
        else:
            if is_written_in_c(kind):
                self._reduced(kind, given)
            self._object(given)

    def _reduced(self, kind: type[Any], given: Any) -> None:
        """What such an object holds besides attributes, as it would be copied."""
        try:
            parts = given.__reduce_ex__(4)
        except Exception:  # what a class does then is its own
            self.doubt(f"it holds a {label_of(kind)}, of which nobody knows what is in it")
        else:
            self.emit(parts if isinstance(parts, str) else "")
            for part in parts if isinstance(parts, tuple) else ():
                if isinstance(part, tuple):
                    for item in part:
                        self.value(item)

    def doubt(self, why: str) -> None:
        """Something that a hash does not tell.  (Installed packages remember things that no trace depends on.)"""
        if not self._is_installed:
            self.doubts[why] = None

    def _of_pytorch(self, kind: type[Any], given: Any) -> None:
        """Operators and the like are what they are called; nothing that Dynamo traces looks into the others."""
        named = isinstance(given, (OpOverload, OpOverloadPacket, torch.finfo, torch.iinfo)) or kind in NAMED
        self.emit("builtin", label_of(kind), str(given) if named or kind.__module__ == "typing" else "")
        if may_be_replaced(given):
            self.doubt(f"{given} is a composition of other operators, of somebody's own")
        if kind.__module__.startswith("torch.") and not named:
            for name, item in sorted(getattr(given, "__dict__", {}).items()):
                if type(item) in _SIMPLE or isinstance(item, (types.FunctionType, Tensor)):
                    self.emit(name)
                    self.value(item)

    def _ask(self, module: str | None) -> None:
        """Code that is not installed names something of this module's."""
        name = (module or "").partition(".")[0]
        if name in UNKNOWN_TO_HASHES:
            self.doubt(f"its code asks {name}")

    def _function(self, given: types.FunctionType) -> None:
        self.emit("function", given.__module__, given.__qualname__)
        if is_versioned(given.__module__) and is_versioned_code(given):
            self._ask(given.__module__)
            for cell in given.__closure__ or ():
                self._cell(cell)
            return
        self._later.append(functools.partial(self._body, given))

    def _body(self, given: types.FunctionType) -> None:
        """Its code, and what that refers to."""
        self._is_installed = is_installed(given.__code__.co_filename)
        names: dict[str, None] = {}
        self._code(given.__code__, names)
        for part in (given.__defaults__, given.__kwdefaults__):
            self.value(part)
        for cell in given.__closure__ or ():
            self._cell(cell)
        for name, item in given.__dict__.items():
            if name not in _OF_DYNAMO:
                self.emit(name)
                self.value(item)
        found = given.__globals__
        if "ops" in names and not self._is_installed:
            for operator in [packet for name in names for packet in operators_named(name, names)]:
                self.value(operator)
        for name in names:
            if name in found:
                self.emit("global", name)
                self.value(found[name])
        self._names.update(names)

    def _cell(self, cell: Any) -> None:
        try:
            held = cell.cell_contents
        except ValueError:
            self.emit("empty cell")
        else:
            self.value(held)

    def _code(self, code: types.CodeType, names: dict[str, None]) -> None:
        names.update(dict.fromkeys(code.co_names))
        if not self._is_installed:
            operations = [(step.opname, step.argval) for step in dis.get_instructions(code)]
            for operation, argument in operations:
                if operation == "IMPORT_NAME":
                    self._imported(argument)
                elif operation in ("LOAD_GLOBAL", "LOAD_NAME") and argument in ASK_FOR_ANYTHING:
                    self.doubt(f"its code calls {argument}")
            if "getattr" in code.co_names and any("FORMAT" in name or "BINARY" in name for name, _ in operations):
                self._is_wide = True  # a name may be put together
        self.emit(
            code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags,
            code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_exceptiontable,
        )  # fmt: skip
        self._constants(code.co_consts, names)

    def _imported(self, name: str) -> None:
        """A module that code imports when it runs."""
        self._ask(name)
        if not is_versioned(name):
            if name in sys.modules:
                self.value(sys.modules[name])
            else:
                self.doubt(f"its code imports {name} when it runs")

    def _constants(self, constants: Sequence[Any], names: dict[str, None]) -> None:
        for constant in constants:
            if isinstance(constant, types.CodeType):
                self._code(constant, names)
            elif isinstance(constant, tuple):
                self.emit("tuple", len(constant))
                self._constants(constant, names)
            elif isinstance(constant, frozenset):
                self.emit("set", sorted(map(repr, constant)))
            else:
                if isinstance(constant, str) and constant.isidentifier():
                    names[constant] = None  # getattr(self, "attend")
                self.emit(type(constant).__name__, repr(constant))

    def _class(self, given: type[Any]) -> None:
        self.emit("class", label_of(given))
        if type(given) is not type and not is_versioned(type(given).__module__):
            self.value(type(given))
        if not is_versioned(given.__module__) or not is_where_it_says(given):
            self._classes.append(given)
            for base in given.__bases__:
                self.value(base)
        else:
            self._ask(given.__module__)
            self._foreign(given.__dict__)

    def _foreign(self, held: Mapping[str, Any]) -> None:
        """Functions of somebody's own in a class or module whose version is known."""
        for name, item in list(held.items()):
            if isinstance(item, types.FunctionType) and not is_versioned_code(item):
                self.emit("replaced", name)
                self.value(item)

    def _package(self, given: types.ModuleType) -> None:
        self.emit("package", given.__name__)
        self._ask(given.__name__)
        if not is_versioned(given.__name__):
            self._packages.append(given)
        elif given.__name__.startswith("torch"):
            self._versioned.append(given)
