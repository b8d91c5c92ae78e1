"""``Owned``: a function whose compiled graphs are kept on disk, and run without being traced in other processes.

What a trace depends on is known here by hash (:mod:`~mosaic_compiler.owned.fingerprint`), so there are no guards to
look at: either everything is as it was, or it is another entry.  A call that finds nothing is compiled by Dynamo, as
ever; what it became is learned from that call, and kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mosaic_compiler.compat import trees
from mosaic_compiler.disk.codec import CodecError, pack, unpack
from mosaic_compiler.disk.folder import Folder, sources_digest, the_folder
from mosaic_compiler.errors import CacheError, MosaicError
from mosaic_compiler.kernels.artifacts import machine_of
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.owned.fingerprint import Fingerprint
from mosaic_compiler.planning.facts import Bindings, GraphFacts
from mosaic_compiler.runtime.bindings import Caller, Ran, learn, watching
from mosaic_compiler.runtime.keeping import facts_of, kinds_facts, kinds_from, step_from
from mosaic_compiler.runtime.named import NamedStep
from mosaic_compiler.runtime.store import kind_asked_for

if TYPE_CHECKING:
    from mosaic_compiler.planning.reach import Reach
    from mosaic_compiler.runtime.kinds import Kinds

logger = logging.getLogger("mosaic_compiler")


class Owned:
    """Call it as the function: the results of the compiled one.

    Args:
        function: a function or module.
        options: of the backend.
        label: what people call it.

    Raises:
        OptionsError: for an option that makes no sense.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any], label: str = "") -> None:
        self.function = function
        self._given = dict(options)
        self._options = MosaicOptions.parse(self._given)
        self._label = label or _label_of(function)
        self._compiled: Callable[..., Any] | None = None
        self._print: Fingerprint | None = None
        self._served: dict[str, list[_Served]] = {}
        self._missed: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        folder = None if self._options.dump is not None else the_folder()
        modes = None if folder is None else trees.modes()
        if folder is None or modes is None:
            return self._dynamo()(*args, **kwargs)
        leaves, spec = trees.flatten((args, kwargs))
        prefix = self._prefix(leaves, spec, modes)
        served = self._served.get(prefix)
        if served is None and prefix in self._missed:
            return self._dynamo()(*args, **kwargs)
        if served is None:
            served = self._served[prefix] = self._load(folder, prefix)
        for candidate in served:
            if candidate.accepts(leaves) and candidate.can_serve():
                return candidate(leaves)
        return self._compile(folder, prefix, args, kwargs, leaves)

    def _prefix(self, leaves: Sequence[Any], spec: Any, modes: tuple[Any, ...]) -> str:
        """The beginning of the keys of what may serve a call."""
        if self._print is None or not self._print.is_current():
            self._print = Fingerprint(self.function)
            self._served = {}
        tensors = self._print.tensors
        device = next((leaf.device for leaf in (*leaves, *tensors) if isinstance(leaf, Tensor)), torch.device("cpu"))
        numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        parts = (
            self._print.digest, str(spec), [_class_of(leaf, numbers) for leaf in leaves], modes,
            self._options.for_passes, machine_of(device), sources_digest(),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:48]

    # ------------------------------------------------------------------------------------------- hits
    def _load(self, folder: Folder, prefix: str) -> list[_Served]:
        """What is kept for such calls."""
        found = []
        assert self._print is not None
        for key in folder.keys("step", prefix):
            if (data := folder.read("step", key)) is None:
                continue
            try:
                found.append(_Served(folder, key, unpack(data), self._options, self._print.tensors))
            except (CodecError, MosaicError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
                folder.drop("step", key, f"{type(error).__name__}: {error}")
        if found:
            logger.info("mosaic: %s: compiled before, taken from %s", self._label, folder.root)
        return found

    # ------------------------------------------------------------------------------------------ misses
    def _dynamo(self) -> Callable[..., Any]:
        if self._compiled is None:
            from mosaic_compiler.compat.dynamo import lookup_backend

            lookup_backend("mosaic")
            self._compiled = torch.compile(self.function, backend="mosaic", dynamic=True, options=self._given)
        return self._compiled

    def _compile(
        self, folder: Folder, prefix: str, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Any]
    ) -> Any:
        """Call the function that Dynamo compiles; if it has just compiled one graph for this call, keep it."""
        from mosaic_compiler.backend import observing

        self._missed.add(prefix)
        compiled: list[NamedStep] = []
        ran: list[Ran] = []
        compile_now = self._dynamo()
        with observing(compiled.append), watching(ran.append):
            result = compile_now(*args, **kwargs)
        if compiled:
            try:
                self._keep(folder, prefix, compiled, ran, leaves, trees.flatten((args, kwargs))[0], result)
            except CacheError as error:
                logger.info("mosaic: %s is compiled again in every process: %s", self._label, error)
        return result

    def _keep(
        self,
        folder: Folder,
        prefix: str,
        compiled: Sequence[NamedStep],
        ran: Sequence[Ran],
        before: Sequence[Any],
        leaves: Sequence[Any],
        result: Any,
    ) -> None:
        """Write down what one call became."""
        if len(ran) != 1 or len(compiled) != 1 or ran[0][0] is not compiled[0]:
            raise CacheError("it is several graphs, with Python between them")
        if len(before) != len(leaves) or any(a is not b for a, b in zip(before, leaves, strict=True)):
            raise CacheError("it changes its arguments")
        assert self._print is not None
        if Fingerprint(self.function).state != self._print.state:
            raise CacheError("a call changes what the model holds")
        step: Any = compiled[0]
        bindings = learn(ran[0], leaves, self._print.tensors, result, step.conditions)
        data = pack((facts_of(step), bindings))
        if pack(unpack(data)) != data:
            raise CacheError("what is read back is not what was written")
        key = f"{prefix}{hashlib.sha256(pack((step.kept.inputs, bindings))).hexdigest()[:16]}"
        folder.write("step", key, data, self._label)

        def derived(name: str, made: Any) -> None:
            try:
                folder.write(name, key, pack(kinds_facts(made) if name == "kinds" else made), self._label)
            except CacheError as error:
                logger.info("mosaic: %s of %s is made again in every process: %s", name, self._label, error)

        for name in ("kinds", "reach"):
            if name in step.__dict__:
                derived(name, getattr(step, name))
        step.on_derived = derived


class _Served:
    """A graph that another process has compiled, for one function."""

    def __init__(
        self,
        folder: Folder,
        key: str,
        known: tuple[GraphFacts, Bindings],
        options: MosaicOptions,
        tensors: Sequence[Tensor],
    ) -> None:
        facts, bindings = known
        self._folder, self._key, self._options = folder, key, options
        self.step = step_from(facts, options, self._kinds, self._reach)
        self._caller = Caller(bindings, self.step, facts.kept.inputs, facts.kept.readings, tensors)

    def accepts(self, leaves: Sequence[Any]) -> bool:
        """It is for arguments of such sizes."""
        return self._caller.accepts(leaves)

    def can_serve(self) -> bool:
        """What the step that is asked for needs is kept, too: kinds of steps are made when they are first used."""
        kind, automatic = kind_asked_for(), self.step.automatic
        is_exact = kind == "exact" or (automatic is not None and automatic.is_exact)
        if not kind and automatic is None:
            return True
        if is_exact and not self._has("reach"):
            return False
        return (is_exact and self.step.reach is None) or self._has("kinds")

    def __call__(self, leaves: Sequence[Any]) -> Any:
        return self._caller(leaves)

    def _has(self, name: str) -> bool:
        if name in self.step.__dict__:
            return True
        try:
            getattr(self.step, name)
        except _MissingError:
            return False
        return True

    def _kinds(self) -> Kinds:
        known: Any = self._read("kinds")
        return kinds_from(known, self._options)

    def _reach(self) -> Reach | None:
        known: Any = self._read("reach")
        return known  # type: ignore[no-any-return]

    def _read(self, name: str) -> Any:
        data = self._folder.read(name, self._key)
        if data is None:
            raise _MissingError
        try:
            return unpack(data)
        except CodecError as error:
            self._folder.drop(name, self._key, str(error))
            raise _MissingError from error


class _MissingError(Exception):
    """Something is not kept."""


def _class_of(leaf: Any, numbers: Mapping[int, int]) -> Any:
    """What has to be equal of an argument, besides sizes."""
    if isinstance(leaf, Tensor):
        same = numbers.get(id(leaf), -1)
        bits = (leaf.is_conj(), leaf.is_neg()) if leaf.layout is torch.strided else ()
        return type(leaf).__qualname__, str(leaf.dtype), str(leaf.device), leaf.dim(), leaf.requires_grad, same, bits
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
        return type(leaf).__name__, repr(leaf)
    return Fingerprint(leaf).digest


def _label_of(function: Callable[..., Any]) -> str:
    """``LlamaForCausalLM``, or what a function is called."""
    inner = getattr(function, "model", None)
    owner = inner if isinstance(inner, nn.Module) else function
    return type(owner).__name__ if isinstance(owner, nn.Module) else getattr(function, "__qualname__", str(function))
