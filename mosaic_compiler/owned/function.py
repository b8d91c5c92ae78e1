"""``Owned``: a function whose compiled graphs are kept on disk, and run without being traced in other processes.

What a trace depends on is known here by hash (:mod:`~mosaic_compiler.owned.fingerprint`), so there are no guards to
look at: either everything is as it was, or it is another entry.  For a call that finds nothing the function is traced
by running it (:mod:`~mosaic_compiler.owned.direct`), or, where that cannot be, compiled by Dynamo; what it became is
then learned from that call.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_compiler.compat import trees
from mosaic_compiler.disk.behind import behind
from mosaic_compiler.disk.codec import pack
from mosaic_compiler.disk.folder import Folder, sources_digest, the_folder
from mosaic_compiler.disk.values import MISSING, read, write
from mosaic_compiler.errors import CacheError
from mosaic_compiler.kernels.artifacts import machine_of
from mosaic_compiler.kernels.fused import start_workers
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.owned.direct import trace_directly
from mosaic_compiler.owned.fingerprint import Fingerprint
from mosaic_compiler.owned.put_back import NotDirectError, ReadsTensorError
from mosaic_compiler.planning.facts import Bindings
from mosaic_compiler.runtime.bindings import Ran, is_symbolic, learn, watching
from mosaic_compiler.runtime.named import NamedStep
from mosaic_compiler.runtime.served import STEP, Made, Served, keep
from mosaic_compiler.runtime.store import kind_asked_for
from mosaic_compiler.waiting import doing, now, without_collections

logger = logging.getLogger("mosaic_compiler")

_steps: dict[str, list[tuple[str, weakref.ref[NamedStep], Bindings]]] = {}
"""What was compiled in this process, by the beginning of its keys."""

_registering = threading.Lock()
"""PyTorch registers a backend when it is first used, and not for two threads at once."""


def compile(function: Callable[..., Any], **options: Any) -> Owned:
    """``torch.compile(function, backend="mosaic", dynamic=True)`` without guards, for a function that is known as a
    whole: another process, or another session, runs what was compiled once without tracing it again.

    The function, its modules' attributes, hooks and weights' layouts are looked at in each call; code and constants of
    Python modules when it is first called, and when something of that has changed.  It is compiled under ``no_grad``.

    Args:
        function: a function or module; what it calls may be anything that Dynamo traces as one graph (else it is
            compiled by Dynamo in every process, which the log says).
        options: of the backend, see :class:`~mosaic_compiler.MosaicOptions`.

    Raises:
        OptionsError: for an option that makes no sense.

    Example:
        >>> step = mosaic_compiler.compile(DenoisingStep(model, mask_token_id), memory_budget="2GiB")
    """
    return Owned(getattr(function, "_orig_mod", function), options)


class Owned:
    """Call it as the function: the results of the compiled one.

    Args:
        function: a function or module.
        options: of the backend.
        label: what people call it.
        compiler: compiles the function by Dynamo; ``None``: ``torch.compile`` does.
        is_direct: trace the function by running it, where that can be.

    Raises:
        OptionsError: for an option that makes no sense.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        options: Mapping[str, Any],
        label: str = "",
        compiler: Callable[[], Callable[..., Any]] | None = None,
        *,
        is_direct: bool = True,
    ) -> None:
        self.function = function
        self._given = dict(options)
        self._options = MosaicOptions.parse(self._given)
        self._label = label or _label_of(function)
        self._compiler, self._is_direct = compiler or self._by_torch, is_direct
        self._compiled: Callable[..., Any] | None = None
        self._print: Fingerprint | None = None
        self._served: dict[str, list[Made]] = {}
        self._missed: set[str] = set()
        self._begun: set[tuple[str, str]] = set()
        self._unkept: set[str] = set()
        self._said: set[str] = set()
        self._key: str | None = None
        self._is_fresh, self._looks, self._is_asked = False, "closely", False

    def note(self, name: str, data: Any) -> None:
        """Keep something more about the graph of the last call, if that is kept."""
        if self._key is not None:
            write(the_folder(), name, self._key, data, self._label)

    def noted(self, name: str) -> Any:
        """What :meth:`note` has kept about the graph of the last call; ``None``: nothing."""
        known = MISSING if self._key is None else read(the_folder(), name, self._key)
        return None if known is MISSING else known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        modes = trees.modes()
        leaves, spec = trees.flatten((args, kwargs))
        prefix = None if modes is None else self._prefix(leaves, spec, modes)
        if prefix is None:
            self._key = None
            return self._guarded(args, kwargs)
        if (begun := (prefix, kind_asked_for())) in self._begun:
            return self._found(prefix, args, kwargs, leaves)
        self._begun.add(begun)
        with without_collections():  # what is read from disk is many objects that stay
            return self._found(prefix, args, kwargs, leaves)

    def _found(self, prefix: str, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Any]) -> Any:
        """Run what is there for such calls, or what is made for them now."""
        served = self._served.get(prefix)
        if served is None:
            served = self._served[prefix] = (self._shared(prefix) if self._is_direct else []) or self._load(prefix)
        for candidate in served:
            if candidate.accepts(leaves) and candidate.can_serve():
                self._key = candidate.key
                return candidate(leaves)
        self._key = None
        if self._is_direct and prefix not in self._missed:
            made = self._make(prefix, args, kwargs, leaves)
            if made is not None:
                served.append(made)
                try:
                    return made(leaves)
                finally:
                    if (folder := self._folder) is not None:
                        behind(functools.partial(self._keep, folder, made.key, made.step, made.bindings))
        return self._compile(prefix, args, kwargs, leaves)

    def _guarded(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """By Dynamo, with all its guards."""
        from mosaic_compiler.compat.dynamo import ANYTHING_MAY_CHANGE, configured

        with configured(ANYTHING_MAY_CHANGE):
            return self._dynamo()(*args, **kwargs)

    @property
    def _folder(self) -> Folder | None:
        """Where entries are; a dump is made of graphs, of which entries have none."""
        return None if self._options.dump is not None else the_folder()

    def refresh(self, looks: str = "closely") -> None:
        """Look at everything again when it is called next, code included.

        Args:
            looks: at what to look in the calls that follow: ``closely`` at modules and the objects that they hold;
                ``when asked`` at modules, in the call behind :meth:`look_again`: until then, whoever calls it sees to
                it that nothing changes.
        """
        self._is_fresh, self._looks, self._is_asked = False, looks, False

    def look_again(self) -> None:
        """Something may have changed since the last call."""
        self._is_asked = True

    def _is_current(self, known: Fingerprint) -> bool:
        if self._looks == "when asked" and not self._is_asked:
            return True
        self._is_asked = False
        return known.is_current(self._looks == "closely")

    def _prefix(self, leaves: Sequence[Any], spec: Any, modes: tuple[Any, ...]) -> str | None:
        """The beginning of the keys of what may serve a call; ``None``: nobody knows what it depends on, so it is left
        to Dynamo, which guards what it has looked at."""
        if self._print is None or not self._is_fresh or not self._is_current(self._print):
            found = Fingerprint(self.function)
            if self._print is None or not self._print.is_equal(found):
                self._served = {}
            self._print, self._is_fresh = found, True
            for why in found.doubts:
                self._say(CacheError(why))
        if self._print.doubts:
            return None
        told = [_class_of(leaf) for leaf in leaves]
        if None in told:
            return None
        tensors = self._print.tensors
        device = _device_of(leaves, self._print)
        numbers = {id(tensor): number for number, tensor in enumerate(tensors) if tensor is not None}
        same = [numbers.get(id(leaf), -1) for leaf in leaves]
        parts = (
            self._print.digest, str(spec), told, same, trees.shared_memory(leaves), modes,
            self._options.for_passes, machine_of(device), sources_digest(),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:48]

    # ------------------------------------------------------------------------------------------- hits
    def _load(self, prefix: str) -> list[Made]:
        """What is kept for such calls."""
        assert self._print is not None
        if (folder := self._folder) is None:
            return []
        tensors = self._print.tensors
        read = [Served.read(folder, key, self._options, tensors) for key in folder.keys(STEP, prefix)]
        found: list[Made] = [served for served in read if served is not None]
        if found:
            logger.info("mosaic: %s: compiled before, taken from %s", self._label, folder.root)
        return found

    # ------------------------------------------------------------------------------------------ misses
    def _make(self, prefix: str, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Any]) -> Made | None:
        """Trace the function by running it, and compile that; ``None``: it is left to Dynamo."""
        from mosaic_compiler.backend import compile_aten

        assert self._print is not None
        if "fuse" not in self._options.disable:
            start_workers(_device_of(leaves, self._print))
        with doing(f"compiling {self._label}"), without_collections():
            now("tracing")
            try:
                direct = trace_directly(self.function, args, kwargs, self._print)
                step = compile_aten(direct.module, self._options, direct.static, name=self._label)
                tensors = self._print.tensors
                values = [leaves[what] if kind == "argument" else tensors[what] for kind, what in direct.inputs]
                bindings = direct.bindings(step, leaves, values)
            except NotDirectError as why:
                if isinstance(why, ReadsTensorError):
                    self._unkept.add(prefix)
                    self._say(CacheError(str(why)))
                logger.debug("mosaic: %s is traced by Dynamo: %s", self._label, why)
                return None
        key = _key_of(prefix, step, bindings)
        self._key = None if self._folder is None else key
        alive = [known for known in _steps.get(prefix, ()) if known[1]() is not None]
        _steps[prefix] = [*alive, (key, weakref.ref(step), bindings)]
        return Made(key, step, bindings, tensors)

    def _keep(self, folder: Folder, key: str, step: NamedStep, bindings: Bindings) -> None:
        """Write a compiled graph down, or say why not."""
        try:
            keep(folder, key, step, bindings, self._label)
        except CacheError as error:
            self._key = None if self._key == key else self._key
            self._say(error)

    def _say(self, why: CacheError) -> None:
        if str(why) in self._said:
            return
        self._said.add(str(why))
        logger.info("mosaic: %s is compiled again in every process: %s", self._label, why)

    def _shared(self, prefix: str) -> list[Made]:
        """What this process has compiled for an equal function (another model of the same code), as long as that is
        there."""
        assert self._print is not None
        alive = [(key, step, bindings) for key, place, bindings in _steps.get(prefix, ()) if (step := place())]
        mine = [given for given in alive if given[1].options == self._options]
        return [Made(key, step, bindings, self._print.tensors) for key, step, bindings in mine]

    def _dynamo(self) -> Callable[..., Any]:
        if self._compiled is None:
            self._compiled = self._compiler()
        return self._compiled

    def _by_torch(self) -> Callable[..., Any]:
        from mosaic_compiler.compat.dynamo import lookup_backend

        with _registering:
            lookup_backend("mosaic")
        compiled: Callable[..., Any] = torch.compile(self.function, backend="mosaic", dynamic=True, options=self._given)
        return compiled

    def _compile(self, prefix: str, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Any]) -> Any:
        """Call the function that Dynamo compiles; if it has just compiled one graph for this call, keep it."""
        from mosaic_compiler.backend import observing
        from mosaic_compiler.compat.dynamo import ANYTHING_MAY_CHANGE, configured
        from mosaic_compiler.kept_graphs import not_kept

        self._missed.add(prefix)
        compiled: list[NamedStep] = []
        ran: list[Ran] = []
        if "fuse" not in self._options.disable:
            start_workers(_device_of(leaves, self._print))
        compile_now = self._dynamo()
        with (
            doing(f"compiling {self._label}"),
            configured(ANYTHING_MAY_CHANGE),
            observing(compiled.append),
            watching(ran.append),
            not_kept(),
            without_collections(),
        ):
            now("tracing")
            result = compile_now(*args, **kwargs)
        if compiled and (folder := self._folder) is not None and prefix not in self._unkept:
            try:
                bindings = self._learned(compiled, ran, leaves, trees.flatten((args, kwargs))[0], result)
            except CacheError as error:
                self._say(error)
            else:
                self._key = _key_of(prefix, compiled[0], bindings)
                self._keep(folder, self._key, compiled[0], bindings)
        return result

    def _learned(
        self,
        compiled: Sequence[NamedStep],
        ran: Sequence[Ran],
        before: Sequence[Any],
        leaves: Sequence[Any],
        result: Any,
    ) -> Bindings:
        """What one call became.

        Raises:
            CacheError: if that is not one run of one graph, and nothing else.
        """
        if len(ran) != 1 or len(compiled) != 1 or ran[0][0] is not compiled[0]:
            raise CacheError("it is several graphs, with Python between them")
        if len(before) != len(leaves) or any(a is not b for a, b in zip(before, leaves, strict=True)):
            raise CacheError("it changes its arguments")
        assert self._print is not None
        if Fingerprint(self.function).state != self._print.state:
            raise CacheError("a call changes what the model holds")
        step: Any = compiled[0]
        return learn(ran[0], leaves, self._print.tensors, result, step.conditions)


def forget_made() -> None:
    """Functions that are compiled from now on share nothing with those before."""
    _steps.clear()


def _key_of(prefix: str, step: NamedStep, bindings: Bindings) -> str:
    """Graphs of one function, options and kind of arguments differ in what they take for granted of sizes."""
    return f"{prefix}{hashlib.sha256(pack((step.kept.inputs, bindings))).hexdigest()[:16]}"


def _device_of(leaves: Sequence[Any], found: Fingerprint | None) -> torch.device:
    """Where a call runs."""
    tensors = [] if found is None else found.tensors
    return next((leaf.device for leaf in (*leaves, *tensors) if isinstance(leaf, Tensor)), torch.device("cpu"))


def _class_of(leaf: Any) -> Any:
    """What has to be equal of an argument, besides sizes; ``None``: that cannot be told."""
    if isinstance(leaf, Tensor):
        bits = (leaf.is_conj(), leaf.is_neg()) if leaf.layout is torch.strided else ()
        return type(leaf).__qualname__, str(leaf.dtype), str(leaf.device), leaf.dim(), leaf.requires_grad, bits
    if is_symbolic(leaf):
        return "a whole number"
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
        return type(leaf).__name__, repr(leaf)
    found = Fingerprint(leaf)
    return None if found.doubts or found.tensors or found.modules else found.digest


def _label_of(function: Callable[..., Any]) -> str:
    """``LlamaForCausalLM``, or what a function is called."""
    inner = getattr(function, "model", None)
    owner = inner if isinstance(inner, nn.Module) else function
    return type(owner).__name__ if isinstance(owner, nn.Module) else getattr(function, "__qualname__", str(function))
