"""What a function's trace can depend on, as a hash: its code, all it refers to, and the state of its modules.

A walk over Python objects, from the function on: modules with all their attributes and hooks, configs, closures, and
the functions and classes that their code names, by their bytecode and constants.  Tensors count by layout, not by what
is in them: they are inputs of a graph.  Packages whose version is part of every key (PyTorch, the standard library,
this one) are not entered; others are, so a patched function or a changed constant of transformers is another hash.

Methods of a class count if some code on the way uses their name; a model's classes have hundreds (to load, save and
quantise) that no forward pass calls.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from mosaic_compiler.owned.walk import Walk
from mosaic_compiler.owned.watch import Watch


class Fingerprint:
    """What a function depends on.

    Args:
        root: the function or module.

    Attributes:
        digest: the hash.
        state: of what the function and its modules hold, and code that is not installed refers to.  A call that changes
            that has effects besides its result.  (Installed packages remember things in their modules: whether they
            have been compiled, say.)
        doubts: why another call, or another process, with an equal hash may do something else all the same; empty: it
            may not, for all that is known.
        tensors: every tensor that was found, in the order of the walk; they are the same for equal digests.
        holders: lists, dicts, sets and objects that the function and its modules hold, and what they hold; no modules.
    """

    def __init__(self, root: Any) -> None:
        walk = Walk()
        try:
            walk.value(root)
            walk.finish()
        except Exception as error:  # whatever objects do when they are looked at
            walk.doubts[f"an object cannot be looked at: {type(error).__name__}: {error}"] = None
        self.digest: str = walk.hash.hexdigest()
        self.state: str = walk.state.hexdigest()
        self.doubts = walk.doubts
        self._places = [weakref.ref(tensor) for tensor in walk.tensors]
        self.holders = walk.holders
        self._watch = Watch(walk.modules, walk.holders)

    @property
    def tensors(self) -> list[Tensor | None]:
        """Those that were found; ``None`` for one that is gone."""
        return [place() for place in self._places]

    @property
    def modules(self) -> list[nn.Module]:
        """Every module that was found and is there."""
        return self._watch.modules

    def is_equal(self, other: Fingerprint) -> bool:
        """The same is found, in the same tensors."""
        mine, theirs = self.tensors, other.tensors
        same = len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))
        return same and self.digest == other.digest

    def is_current(self, closely: bool = True) -> bool:
        """No module, nor anything that modules hold, has another attribute, item, hook, parameter or child since, no
        parameter has another layout, and no tensor is gone: cheap enough for every step.  Not ``closely``: what modules
        hold is not looked into."""
        return all(place() is not None for place in self._places) and self._watch.is_as_it_was(closely)
