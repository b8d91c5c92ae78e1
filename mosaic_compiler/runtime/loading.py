"""A kept step, run where nobody has its graphs: weights are given by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.compat.symbols import ShapeEnv, new_number, size_of
from mosaic_compiler.compat.tensors import with_lazy_bits
from mosaic_compiler.compat.tracing import FakeTensorMode
from mosaic_compiler.errors import CaptureError
from mosaic_compiler.ir.clusters import Cluster
from mosaic_compiler.kernels.fused import FusedUse
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning.kept import KeptStep
from mosaic_compiler.planning.lowered import Input, LoweredCluster, LoweredStep, TensorFacts
from mosaic_compiler.runtime.engine import Step
from mosaic_compiler.runtime.instructions import GUARD
from mosaic_compiler.runtime.link import Linked, LinkedStep, object_of
from mosaic_compiler.runtime.programs import Variant

_HINT = 64


class LoadedStep(Step):
    """A kept step with its weights: call it with the other inputs, in their order.

    Args:
        kept: of a :class:`~mosaic_compiler.runtime.step.CompiledStep` (:meth:`KeptStep.data`, where it was pickled).
        weights: parameters and buffers by the names of the graph's inputs (:attr:`KeptStep.inputs`); constants of the
            graphs by theirs.
        options: those of running (``memory_budget``, ``chunk_rows``, ``poison``, ``program_cache``); what passes did is
            done.

    Raises:
        CaptureError: if a weight or an operator is missing.
    """

    def __init__(self, kept: KeptStep, weights: Mapping[str, Any], options: MosaicOptions | None = None) -> None:
        static = set(kept.static)
        needed = [given.name for index, given in enumerate(kept.inputs) if index in static]
        needed += [name for lowered in kept.variants.values() for name in lowered.constants]
        if missing := [name for name in dict.fromkeys(needed) if name not in weights]:
            raise CaptureError(f"the step needs {len(missing)} more weights: {', '.join(missing[:4])}, ...")
        self._given = [weights[given.name] if i in static else None for i, given in enumerate(kept.inputs)]
        self._free = [i for i in range(len(kept.inputs)) if i not in static]
        variants = {name: _variant(lowered, weights) for name, lowered in kept.variants.items()}
        options = options or MosaicOptions()
        outline = replace(kept.outline.data(), guard=GUARD if options.poison else 0, chunk_rows=options.chunk_rows)
        super().__init__(replace(kept, outline=outline), variants, options)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        if len(inputs) != len(self._free):
            names = ", ".join(self.kept.inputs[i].name for i in self._free)
            raise CaptureError(f"the step takes {len(self._free)} inputs besides weights ({names}), got {len(inputs)}")
        values = list(self._given)
        for position, value in zip(self._free, inputs, strict=True):
            values[position] = value
        return super().__call__(values)


def _variant(lowered: LoweredStep, constants: Mapping[str, Any]) -> Variant:
    clusters = {
        graph: {name: FusedUse(cluster_from(cluster)) for name, cluster in graph.clusters.items()}
        for graph in lowered.graphs
    }
    return Variant(LinkedStep(lowered, clusters, constants))


def cluster_from(lowered: LoweredCluster) -> Cluster:
    """A fused region as a graph again, with fake tensors of a mode of its own: what kernels are compiled from."""
    maker = _Maker(lowered)
    for given in lowered.inputs:
        maker.add_input(given)
    for op in lowered.ops:
        maker.add(Linked(op, {}))
    return Cluster(maker.finish(lowered.results), lowered.into)


class _Maker:
    """Builds the body of one cluster."""

    def __init__(self, lowered: LoweredCluster) -> None:
        self.environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.environment)
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        symbols: set[sympy.Symbol] = set()
        for given in lowered.inputs:
            facts = given.tensor
            numbers = (given.number,) if facts is None else (*facts.shape, *facts.strides, facts.offset)
            symbols |= {symbol for number in numbers if number is not None for symbol in number.free_symbols}
        made = [(s, new_number(self.environment, f"kept_{s}", _HINT + 8 * i)) for i, s in enumerate(_sorted(symbols))]
        self._names = {symbol: own for symbol, (own, _) in made}
        self._hints = {own: sympy.Integer(_HINT + 8 * i) for i, (_, (own, _)) in enumerate(made)}

    def add_input(self, given: Input) -> None:
        """A placeholder."""
        node = self.nodes[given.name] = self.graph.placeholder(given.name)
        if given.tensor is not None:
            node.meta["val"] = self._tensor(given.tensor)
        elif given.number is not None:
            node.meta["val"] = self._number(given.number)

    def add(self, linked: Linked) -> None:
        """A call, and what it returns."""
        args, kwargs = linked.arguments(self.nodes)
        node = self.nodes[linked.name] = self.graph.call_function(linked.function, tuple(args), kwargs)
        fake_args, fake_kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), ir.value_of)
        with self.mode:
            node.meta["val"] = linked.function(*fake_args, **fake_kwargs)

    def finish(self, results: Sequence[str]) -> fx.GraphModule:
        """The graph that returns these values."""
        nodes = tuple(self.nodes[name] for name in results)
        self.graph.output(nodes).meta["val"] = tuple(map(ir.value_of, nodes))
        return ir.graph_module(torch.nn.Module(), self.graph)

    def _number(self, expr: sympy.Expr) -> Any:
        own = expr.xreplace(self._names)
        if own.is_Integer:
            return int(own)
        return size_of(self.environment, own, int(own.xreplace(self._hints)))

    def _tensor(self, facts: TensorFacts) -> torch.Tensor:
        shape, strides = [*map(self._number, facts.shape)], [*map(self._number, facts.strides)]
        device = object_of(f"device:{facts.device}")
        with self.mode:
            made = torch.empty_strided(shape, strides, dtype=object_of(facts.dtype), device=device)
            if facts.offset != 0:
                made = torch.as_strided(made, shape, strides, self._number(facts.offset))
            return with_lazy_bits(made, facts.bits)


def _sorted(symbols: set[sympy.Symbol]) -> list[sympy.Symbol]:
    return sorted(symbols, key=str)
