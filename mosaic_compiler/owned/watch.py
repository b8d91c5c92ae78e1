"""Whether modules and objects hold what they held: cheap enough to be asked in every step.

A model of 32 layers has thousands of dicts.  What they hold is compared by identity, all at once: nothing that is
watched is gone (other objects are kept alive), so what has the same address is the same object.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor, nn

from mosaic_compiler.owned.objects import MODULE_PARTS, SEQUENCES, Noted, is_as_it_was, layout_of, state_of

_Look: TypeAlias = "tuple[list[type], list[int], list[int]]"


_OF_EVERY_MODULE = tuple(nn.Module().__dict__)
"""Dicts and sets that are looked at with their module, or that no forward pass looks at."""


_values, _keys = operator.methodcaller("values"), operator.methodcaller("keys")
# Views of dicts are made one at a time, each gone before the next: thousands that are there together are what Python
# collects garbage for, which takes far longer than the look.


class Watch:
    """Remembers what modules and objects hold.

    Args:
        modules: not kept alive, nor are tensors.
        holders: other objects, see :func:`~mosaic_compiler.owned.objects.is_holder`.
    """

    def __init__(self, modules: Sequence[nn.Module], holders: Sequence[Any]) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._states = [state_of(module) for module in modules]
        known = {id(module.__dict__.get(name)) for module in modules for name in _OF_EVERY_MODULE}
        holders = [holder for holder in holders if id(holder) not in known]
        self._holders = _Holders(holders)
        self._held = [state_of(holder) for holder in holders]
        noted = [item for state in (*self._states, *self._held) for item in state if isinstance(item, Noted)]
        places = {id(item.place()): item for item in noted if item.place() is not None}
        self._noted = [item.place for item in places.values()]
        self._layouts = [(item.place, item.layout) for item in places.values() if item.layout is not None]
        self._looks: tuple[_Look, _Look] = _look(modules), self._holders.look()

    @property
    def modules(self) -> list[nn.Module]:
        """Those that are there."""
        return [module for place in self._modules if (module := place()) is not None]

    def is_as_it_was(self, closely: bool) -> bool:
        """No module has another attribute, hook, parameter or child since, no tensor another layout, and none is gone;
        ``closely``: nor has an object another attribute or item."""
        modules = self.modules
        if len(modules) != len(self._modules) or any(place() is None for place in self._noted):
            return False
        if any(_layout(place()) != layout for place, layout in self._layouts):
            return False
        looks = _look(modules), self._holders.look() if closely else self._looks[1]
        if looks == self._looks:
            return True
        known = [*zip(modules, self._states, strict=True)]  # perhaps an equal number is another object
        known += [*zip(self._holders.all, self._held, strict=True)] if closely else []
        if not all(is_as_it_was(owner, state) for owner, state in known):
            return False
        # other objects now, which have to be kept alive as well
        self._states = [state_of(module) for module in modules]
        self._held = [state_of(holder) for holder in self._holders.all] if closely else self._held
        self._looks = looks
        return True


def _layout(tensor: Tensor | None) -> Any:
    return None if tensor is None else layout_of(tensor)


def _look(modules: Sequence[nn.Module]) -> _Look:
    owns = [module.__dict__ for module in modules]
    dicts = [*owns, *[own[name] for own in owns for name in MODULE_PARTS]]
    held = chain(chain.from_iterable(owns), chain.from_iterable(map(_values, dicts)))
    return [*map(type, modules)], [*map(len, dicts)], [*map(id, held)]


class _Holders:
    """Objects, sorted by how to look at them."""

    def __init__(self, holders: Sequence[Any]) -> None:
        self.all = holders
        self._dicts = [holder for holder in holders if isinstance(holder, dict)]
        self._lists = [holder for holder in holders if isinstance(holder, SEQUENCES)]
        self._others = [
            holder for holder in holders if not isinstance(holder, SEQUENCES) and hasattr(holder, "__dict__")
        ]

    def look(self) -> _Look:
        dicts = [*self._dicts, *[holder.__dict__ for holder in self._others]]
        held = chain(
            chain.from_iterable(map(_values, dicts)),
            chain.from_iterable(map(_keys, dicts)),
            chain.from_iterable(map(list, self._lists)),
        )
        return [*map(type, self.all)], [*map(len, dicts), *map(len, self._lists)], [*map(id, held)]
