"""Steps that another process has compiled: written to the cache on disk, and read from there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mosaic_compiler.disk.codec import pack, unpack
from mosaic_compiler.disk.folder import Folder
from mosaic_compiler.disk.values import MISSING, read, write
from mosaic_compiler.errors import CacheError, CaptureError
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning.check import check_lowered
from mosaic_compiler.planning.facts import Bindings, GraphFacts, KeptKinds
from mosaic_compiler.runtime.bindings import Caller
from mosaic_compiler.runtime.keeping import facts_of, kinds_facts, kinds_from, step_from
from mosaic_compiler.runtime.named import NamedStep
from mosaic_compiler.runtime.store import kind_asked_for

if TYPE_CHECKING:
    from mosaic_compiler.planning.reach import Reach
    from mosaic_compiler.runtime.kinds import Kinds

logger = logging.getLogger("mosaic_compiler")

STEP, KINDS, REACH = "step", "kinds", "reach"

_DAMAGED = (CacheError, CaptureError, KeyError, TypeError, IndexError, AttributeError, AssertionError)
"""What data leads to that does not hold together; a fallback in strict mode, or a budget for another machine, is none
of these."""


class MissingError(Exception):
    """Something is not kept that a step needs."""


def keep(folder: Folder, key: str, step: NamedStep, bindings: Bindings, label: str) -> None:
    """Write a compiled graph down, and its kinds when they are made.

    Raises:
        CacheError: if it cannot be.
    """
    data = pack((facts_of(step), bindings))
    if pack(unpack(data)) != data:
        raise CacheError("what is read back is not what was written")
    folder.write(STEP, key, data, label)

    def derived(name: str, made: Any) -> None:
        try:
            write(folder, name, key, kinds_facts(made) if name == KINDS else made, label)
        except CacheError as error:
            logger.info("mosaic: %s of %s: made again in every process: %s", name, label, error)

    step.on_derived = derived
    for name, made in list(step.derived.items()):
        derived(name, made)


class Made:
    """A graph that this process has compiled, for one function.

    Args:
        tensors: what the function refers to.

    Attributes:
        key: of its entries, if it has any.
        step: what runs.
        bindings: where its inputs come from.
    """

    def __init__(self, key: str, step: NamedStep, bindings: Bindings, tensors: Sequence[Tensor | None]) -> None:
        self.key, self.step, self.bindings = key, step, bindings
        self._caller = Caller(bindings, step, step.kept.inputs, step.kept.readings, tensors)

    def accepts(self, leaves: Sequence[Any]) -> bool:
        """It is for arguments of such sizes."""
        return self._caller.accepts(leaves)

    def can_serve(self) -> bool:
        """The step that is asked for is there, or can be made."""
        return True

    def __call__(self, leaves: Sequence[Any]) -> Any:
        return self._caller(leaves)


class Served(Made):
    """A graph that another process has compiled, for one function.

    Args:
        known: what was kept.
        options: those of running.
    """

    def __init__(
        self,
        folder: Folder,
        key: str,
        known: tuple[GraphFacts, Bindings],
        options: MosaicOptions,
        tensors: Sequence[Tensor | None],
    ) -> None:
        facts, bindings = known
        check_lowered(facts.kept)
        self._folder, self._options = folder, options
        super().__init__(key, step_from(facts, options, self._kinds, self._reach), bindings, tensors)

    @classmethod
    def read(cls, folder: Folder, key: str, options: MosaicOptions, tensors: Sequence[Tensor | None]) -> Served | None:
        """What is kept under a key; ``None`` if there is nothing, or it does not hold together."""
        if (data := folder.read(STEP, key)) is None:
            return None
        try:
            return cls(folder, key, unpack(data), options, tensors)
        except _DAMAGED as error:
            folder.drop(STEP, key, f"{type(error).__name__}: {error}")
            return None

    def can_serve(self) -> bool:
        """What the step that is asked for needs is kept, too: kinds of steps are made when they are first used."""
        kind, automatic = kind_asked_for(), self.step.automatic
        is_exact = kind == "exact" or (automatic is not None and automatic.is_exact)
        if not kind and automatic is None:
            return True
        if is_exact and not self._has(REACH):
            return False
        return (is_exact and self.step.reach is None) or self._has(KINDS)

    def _has(self, name: str) -> bool:
        try:
            getattr(self.step, name)
        except MissingError:
            return False
        return True

    def _kinds(self) -> Kinds:
        known: KeptKinds = self._read(KINDS)
        try:
            for facts in (known.full, known.reuse):
                if facts is not None:
                    check_lowered(facts.kept)
            return kinds_from(known, self._options)
        except _DAMAGED as error:
            self._folder.drop(KINDS, self.key, f"{type(error).__name__}: {error}")
            raise MissingError from error

    def _reach(self) -> Reach | None:
        known: Reach | None = self._read(REACH)
        return known

    def _read(self, name: str) -> Any:
        known = read(self._folder, name, self.key)
        if known is MISSING:
            raise MissingError
        return known
