"""The entry point, top to bottom: capture -> passes -> planning -> running.

``torch.compile(step, backend="mosaic", dynamic=True)`` calls :func:`mosaic` once per captured graph.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import book, graph_log, ir
from mosaic_compiler.capture import forget_floats, specialize_floats
from mosaic_compiler.compat.tracing import get_decompositions, static_inputs
from mosaic_compiler.dump import GraphDump
from mosaic_compiler.errors import GradientError
from mosaic_compiler.ir import fake_mode_of, main_device_of
from mosaic_compiler.ir.notes import STATE, STATIC_INPUTS
from mosaic_compiler.kept_graphs import kept_or
from mosaic_compiler.kernels.fused import start_workers
from mosaic_compiler.methods import watch_methods
from mosaic_compiler.one_depth import give_one_depth
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes.base import Machine, Pass
from mosaic_compiler.passes.mixtures import MixturesPass
from mosaic_compiler.passes.needed_rows import settle_sizes, token_ids_of
from mosaic_compiler.passes.pipeline import make_family, passes_until, run_passes
from mosaic_compiler.passes.state import (
    Attended,
    ChooseKeysPass,
    Coding,
    Cut,
    KeepSelectedPass,
    KeepStatePass,
    ReadChosenPass,
    ReuseSelectedPass,
    ReuseStatePass,
    attended_in,
    codings_of,
    cut_for,
    find_reach,
    inputs_of,
    leading_parts,
    residual_in,
    residual_nbytes,
)
from mosaic_compiler.passes.visible_keys import VisibleKeysPass, hides_keys
from mosaic_compiler.planning.ladder import Rung, rungs_of
from mosaic_compiler.planning.reach import Reach
from mosaic_compiler.planning.selection import Selection
from mosaic_compiler.runtime.kinds import Kinds
from mosaic_compiler.runtime.observers import Observers
from mosaic_compiler.runtime.sparse import page_bytes
from mosaic_compiler.runtime.step import CompiledStep
from mosaic_compiler.settings import read_settings
from mosaic_compiler.true_masks import drop_true_masks
from mosaic_compiler.waiting import doing, now, without_collections

_compiling: Observers[CompiledStep] = Observers()
watch_methods()


def mosaic(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend (registered as ``"mosaic"``).

    Args:
        module: the graph that Dynamo captured.
        example_inputs: fake inputs, in placeholder order.
        options: ``torch.compile``'s ``options`` dict; see :class:`MosaicOptions`.
        mode: must be ``None`` or ``"default"``.

    Raises:
        OptionsError: for an unknown or malformed option or environment switch.
        GradientError: if the graph needs gradients.
        InvariantError, PlanError, CaptureError: if the compiler would otherwise be wrong.
    """
    parsed = MosaicOptions.parse(options, mode)
    if "fuse" not in parsed.disable:
        for device in {value.device for value in example_inputs if isinstance(value, torch.Tensor)}:
            start_workers(device)
    inputs = specialize_floats(module, example_inputs)

    def compile_graph(graph: fx.GraphModule, aten_inputs: Sequence[Any]) -> CompiledStep:
        return compile_aten(graph, parsed, static_inputs=static_inputs())

    def compile_module() -> Callable[..., Any]:
        from mosaic_compiler.compat.aot import aot_autograd  # which takes a while, and is not always needed

        backend = aot_autograd(
            fw_compiler=_refuse_gradients,
            inference_compiler=compile_graph,
            decompositions=_decompositions(),
            keep_inference_input_mutations=True,
        )
        with doing("compiling a graph"), without_collections():
            now("from the model's operators to those of its kernels")
            compiled: Callable[..., Any] = backend(give_one_depth(drop_true_masks(module)), inputs)
        return compiled

    found = kept_or(module, inputs, parsed, compile_module, _compiling.tell)
    forget_floats()
    return found


def compile_aten(
    module: fx.GraphModule, options: MosaicOptions, static_inputs: Sequence[int] = (), name: str = ""
) -> CompiledStep:
    """Passes, lives and the callable for one functional ATen graph with fake-tensor metadata.

    Args:
        module: for example from :func:`mosaic_compiler.passes.trace`.
        static_inputs: positions of placeholders (weights) whose memory rarely moves.
        name: of the function, for the log, where Dynamo does not know it.
    """
    step = _made(module, options, static_inputs)
    step.end_at(graph_log.compiled(step.fallbacks, name))
    _compiling.tell(step)
    return step


def _made(module: fx.GraphModule, options: MosaicOptions, static_inputs: Sequence[int]) -> CompiledStep:
    """Passes, lives and the callable."""
    settings = read_settings()
    dump = GraphDump(options.dump, module, settings.debug)
    STATIC_INPUTS.write(module, tuple(static_inputs))
    if options.needed_rows != "all":
        settle_sizes(module)
    machine = Machine(page_bytes(main_device_of(module)))
    with _no_guards(module):
        family = make_family(module, options, machine, observe=dump.after_pass)
    known = functools.cache(lambda: kept_of(module, options))
    step = CompiledStep(
        family.graphs,
        options,
        family.records,
        static_inputs,
        on_plan=dump.plan,
        captured=module,
        derive=lambda: _kinds_of(module, options, known()),
        prove=lambda: known().reach if hides_keys(module.graph) else None,
    )
    dump.compiled(step)
    return step


@dataclass(frozen=True)
class Kept:
    """What a graph would keep from step to step.

    Attributes:
        module: the graph, canonical.
        cut: see ``passes/state/cut.py``.
        is_heavy: there are products in it.
        reach: which rows depend on which, where that is known.
        codings: how each value is written.
        chosen, selection: the attentions whose keys are chosen, if some are, and how.
        residual: bytes of the last rows that are kept as they are computed as well.
    """

    module: fx.GraphModule
    cut: Cut
    is_heavy: bool
    reach: Reach | None = None
    codings: Mapping[fx.Node, Coding] = field(default_factory=dict)
    chosen: tuple[Attended, ...] = ()
    selection: Selection | None = None
    residual: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))

    @property
    def nbytes(self) -> sympy.Expr:
        """Bytes of all values, as they are kept, in the graph's symbols."""
        return sum((coding.nbytes(value) for value, coding in self.codings.items()), self.residual)

    def rungs(self) -> tuple[tuple[Rung, sympy.Expr], ...]:
        """Bytes of state on each rung of the ladder; where keys are chosen, of each of them.  None of those that this
        graph cannot be on."""
        found: list[tuple[Rung, sympy.Expr]] = []
        for rung in rungs_of("auto", None, None):
            if not rung.is_kept:
                continue
            selection = None if rung.keep is None else Selection()
            cut, codings, chosen = _written(self.module.graph, rung.precision, selection)
            there = replace(self, cut=cut, codings=codings, chosen=chosen, selection=selection)
            if not cut.problem:
                found.append((rung, there.nbytes if rung.keep is None else there.key_nbytes))
        return tuple(found)

    @property
    def key_nbytes(self) -> sympy.Expr:
        """Where keys are chosen: bytes that each takes, in all attentions (its position, where all are kept)."""
        if self.selection is None:
            return sympy.Integer(0)
        return sum((each.key_nbytes(self.selection) for each in self.chosen), sympy.Integer(0))


def kept_of(module: fx.GraphModule, options: MosaicOptions) -> Kept:
    """What a captured graph would keep."""
    shown = [name for name in options.disable if name in (VisibleKeysPass.name, MixturesPass.name)]
    with _no_guards(module):
        canonical, _ = run_passes(module, passes=passes_until("mixtures", options), disable=shown)
        is_heavy = any(book.entry(node).is_heavy for node in canonical.graph.nodes)
        selection = options.selection
        has_residual = bool(options.cache_residual)
        cut, codings, chosen = _written(canonical.graph, options.cache_dtype, selection, has_residual)
        reach = None
        if not cut.problem and selection is None:  # what was chosen is right for some rows only
            reach = find_reach(canonical.graph, cut, STATIC_INPUTS.of(canonical))
        residual = sympy.Integer(0)
        if has_residual and not cut.problem:
            last = residual_in(cut, options.cache_dtype, codings)
            residual = residual_nbytes(last, options.cache_residual)
        return Kept(canonical, cut, is_heavy, reach, codings, chosen, selection, residual)


def _written(
    graph: fx.Graph, precision: str | None, selection: Selection | None, has_residual: bool = False
) -> tuple[Cut, Mapping[fx.Node, Coding], tuple[Attended, ...]]:
    """The cut of a canonical graph (why it cannot be kept so, if it cannot), how its values are written, and the
    attentions whose keys are chosen."""
    cut = cut_for(graph, precision)
    codings, problem = codings_of(cut, precision)
    chosen: list[Attended] = []
    if selection is not None and not cut.problem:
        chosen, problem = attended_in(cut, precision)
    if has_residual and not cut.problem and not problem and not residual_in(cut, precision, codings):
        problem = "no attention reads codes, beside which rows could be kept as they are computed (cache_residual)"
    cut = replace(cut, problem=problem) if problem and not cut.problem else cut
    return cut, codings, tuple(chosen)


def _kinds_of(module: fx.GraphModule, options: MosaicOptions, kept: Kept | None = None) -> Kinds:
    """Steps that keep state, and steps for some rows that use it, of one captured graph: nothing is captured again."""
    with _no_guards(module), without_collections():
        kept = kept or kept_of(module, options)
        canonical, cut = kept.module, kept.cut
        if cut.problem:
            return Kinds(problem=cut.problem, is_heavy=kept.is_heavy)
        made = []
        selection = options.selection
        precision = options.cache_dtype
        has_residual = bool(options.cache_residual)
        passes: list[Pass] = [KeepStatePass(precision, has_residual), ReuseStatePass(precision, has_residual)]
        if selection is not None and selection.evicts:
            passes = [KeepSelectedPass(precision, selection), ReuseSelectedPass(precision, selection)]
        elif selection is not None:
            passes = [
                KeepStatePass(precision), ReadChosenPass(precision, selection), ChooseKeysPass(precision, selection)
            ]  # fmt: skip
        for kind in passes:
            derived = kind(canonical)
            dump = None if options.dump is None else os.path.join(options.dump, kind.name)
            given = replace(options, needed_rows="all", cache="none", dump=dump)
            made.append((_made(derived, given, STATIC_INPUTS.of(derived)), STATE.of(derived)))
    (full, _), (reuse, _), *more = made
    reuse.replays = True
    weights = tuple(i for i in inputs_of(cut.values) if i in STATIC_INPUTS.of(canonical))
    leading = leading_parts(canonical.graph)
    ids = token_ids_of(module)
    origins = tuple(f"{origin.module} {origin.source}" for origin in map(ir.provenance, cut.values))
    return Kinds(
        full,
        reuse,
        notes=tuple(note for _, note in made),
        space=cut.space,
        origins=origins,
        is_heavy=kept.is_heavy,
        ids=ids,
        weights=weights,
        reach=kept.reach,
        parts=tuple(leading.get(weight) for weight in weights),
        is_rounded=not all(coding.is_exact for coding in kept.codings.values()),
        selects=selection is not None and selection.evicts,
        choose=more[0][0] if more else None,
        has_residual=bool(options.cache_residual),
    )


@functools.cache
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Ops without an ``out=`` form of their own that are compositions of ops that have one."""
    aten = torch.ops.aten
    return get_decompositions([aten.rsub, aten._safe_softmax])


def _no_guards(module: fx.GraphModule) -> AbstractContextManager[None]:
    """What fake tensors ask about symbols that a pass invented (chunk sizes) must not become Dynamo's guards: it
    does not know them."""
    mode = fake_mode_of(module)
    environment = getattr(mode, "shape_env", None)
    return nullcontext() if environment is None else environment.suppress_guards()


def observing(observe: Callable[[CompiledStep], None]) -> AbstractContextManager[None]:
    """Call ``observe`` with every step that this thread compiles inside the ``with`` block."""
    return _compiling.told(observe)


def _refuse_gradients(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    raise GradientError(
        "backend 'mosaic' is for inference, and this graph needs gradients: call the compiled function "
        "under torch.no_grad() or torch.inference_mode(), or set requires_grad_(False) on the weights"
    )
