"""What a function's trace can depend on, as a hash: its code, all it refers to, and the state of its modules.

A walk over Python objects, from the function on: modules with all their attributes and hooks, configs, closures, and
the functions and classes that their code names, by their bytecode and constants.  Tensors count by layout, not by what
is in them: they are inputs of a graph.  Packages whose version is part of every key (PyTorch, the standard library,
this one) are not entered; others are, so a patched function or a changed constant of transformers is another hash.

Methods of a class count if some code on the way uses their name; a model's classes have hundreds (to load, save and
quantise) that no forward pass calls.
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

from mosaic_compiler.owned.objects import is_holder, is_installed, is_versioned, is_versioned_code, label_of, slots_of

_SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, range)
_ALWAYS = (
    "forward", "__call__", "__init__", "__new__", "__post_init__", "__getattr__", "__getattribute__", "__iter__",
    "__getitem__", "__len__", "__contains__", "__enter__", "__exit__", "__eq__", "__bool__", "__get__",
)  # fmt: skip
_WHERE_FROM = ("_name_or_path", "_commit_hash", "_original_object_hash")
"""Entries of configs that say where a model was loaded from, and a hash that is another one in each process."""

_OF_DYNAMO = ("_torchdynamo_wrapper_id", "_is_torch_compile", "_compiled_call_impl")
"""What ``torch.compile`` puts down at what it compiles."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")


class Fingerprint:
    """What a function depends on.

    Args:
        root: the function or module.

    Attributes:
        digest: the hash.
        state: of what the function and its modules hold, and code that is not installed refers to.  A call that changes
            that has effects besides its result.  (Installed packages remember things in their modules: whether they
            have been compiled, say.)
        asks: modules of Python's own that code which is not installed names.
        tensors: every tensor that was found, in the order of the walk; they are the same for equal digests.
    """

    def __init__(self, root: Any) -> None:
        walk = _Walk()
        walk.value(root)
        walk.finish()
        self.digest: str = walk.hash.hexdigest()
        self.state: str = walk.state.hexdigest()
        self.asks = frozenset(walk.asked)
        self._places = [weakref.ref(tensor) for tensor in walk.tensors]
        self._modules = [(weakref.ref(module), _state_of(module)) for module in walk.modules]

    @property
    def tensors(self) -> list[Tensor | None]:
        """Those that were found; ``None`` for one that is gone."""
        return [place() for place in self._places]

    @property
    def modules(self) -> list[nn.Module]:
        """Every module that was found and is there."""
        return [module for place, _ in self._modules if (module := place()) is not None]

    def is_current(self) -> bool:
        """No module has another attribute, hook, parameter or child since, and no tensor is gone: cheap enough for
        every step."""
        if any(place() is None for place in self._places):
            return False
        for place, state in self._modules:
            module = place()
            if module is None or _state_of(module) != state:
                return False
        return True


def holders_of(root: Any) -> list[Any]:
    """Lists, dicts, sets and objects that a function and its modules hold, and what they hold; no modules."""
    walk = _Walk()
    walk.value(root)
    walk.finish()
    return walk.holders


def _state_of(module: nn.Module) -> tuple[Any, ...]:
    own = module.__dict__
    return (
        type(module),
        tuple(map(id, own.values())),
        tuple(map(id, own["_parameters"].values())),
        tuple(map(id, own["_buffers"].values())),
        tuple(map(id, own["_modules"].values())),
        *[len(own[name]) for name in _HOOKS],
    )


class _Walk:
    """The walk: data is entered at once, functions and classes in the order in which they were found."""

    def __init__(self) -> None:
        self.hash, self.state = hashlib.sha256(), hashlib.sha256()
        self._is_installed = False
        self.asked: set[str] = set()
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.holders: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._later: deque[Callable[[], None]] = deque()
        self._names: dict[str, None] = dict.fromkeys(_ALWAYS)
        self._classes: list[type[Any]] = []
        self._packages: list[types.ModuleType] = []
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
            if len(self._looked) == known and not self._later:
                break

    def _look(self, number: int, label: str, held: Mapping[str, Any]) -> None:
        """Attributes of a class or package whose names some code uses."""
        for name in [name for name in held if name in self._names]:
            is_imported = number < 0 and (name.startswith("__") or isinstance(held[name], types.ModuleType))
            if is_imported and (self._is_installed or name.startswith("__")):
                continue  # a part of an installed package, which is there once somebody has asked for it
            if (number, name) not in self._looked:
                self._looked.add((number, name))
                self.emit("attribute", label, name)
                self.value(held[name])

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
        elif isinstance(given, Mapping):
            self._mapping(given)
        elif isinstance(given, (list, tuple, deque)):
            self.emit(label_of(kind), len(given))
            is_loose = self._is_installed and all(type(item) in _SIMPLE for item in given)
            for item in sorted(given, key=repr) if is_loose else given:
                self.value(item)
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
        self._class_of(type(given))
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
    def _callable(self, kind: type[Any], given: Any) -> None:
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
        elif kind.__module__ == "numpy":
            self.emit("numpy", str(getattr(given, "dtype", "")), getattr(given, "shape", ()), bytes(given.tobytes()))
        elif hasattr(given, "__qualname__") and not hasattr(given, "__dict__"):
            self.emit("builtin", getattr(given, "__module__", ""), given.__qualname__)
            self._ask(getattr(given, "__module__", None))
            self._ask(type(getattr(given, "__self__", None)).__module__)
        elif kind.__module__.partition(".")[0] in ("torch", "typing", "types", "builtins", "_thread", "threading"):
            self._of_pytorch(kind, given)
        else:
            self._object(given)

    def _of_pytorch(self, kind: type[Any], given: Any) -> None:
        """Operators and the like are what they are called; nothing that Dynamo traces looks into the others."""
        named = isinstance(given, (OpOverload, OpOverloadPacket, torch.finfo, torch.iinfo))
        self.emit("builtin", label_of(kind), str(given) if named else "")
        if kind.__module__.startswith("torch.") and not named:
            for name, item in sorted(getattr(given, "__dict__", {}).items()):
                if type(item) in _SIMPLE or isinstance(item, (types.FunctionType, Tensor)):
                    self.emit(name)
                    self.value(item)

    def _ask(self, module: str | None) -> None:
        """Code that is not installed names something of this module's."""
        if module and not self._is_installed:
            self.asked.add(module.partition(".")[0])

    def _function(self, given: types.FunctionType) -> None:
        self.emit("function", given.__module__, given.__qualname__)
        if is_versioned(given.__module__) and is_versioned_code(given.__code__):
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
            for step in dis.get_instructions(code):
                if step.opname == "IMPORT_NAME":
                    self._ask(step.argval)
        self.emit(
            code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags,
            code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_exceptiontable,
        )  # fmt: skip
        self._constants(code.co_consts, names)

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
        if not is_versioned(given.__module__):
            self._classes.append(given)
            for base in given.__bases__:
                self._class_of(base)
        else:
            self._ask(given.__module__)

    def _class_of(self, kind: type[Any]) -> None:
        self.value(kind)

    def _package(self, given: types.ModuleType) -> None:
        self.emit("package", given.__name__)
        self._ask(given.__name__)
        if not is_versioned(given.__name__):
            self._packages.append(given)
