"""A step that can be kept: everything that planning, binding and running need, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mosaic_compiler.planning.lowered import Input, LoweredStep, Reading
from mosaic_compiler.planning.outline import StepOutline


@dataclass(frozen=True)
class KeptStep:
    """One compiled graph of a caller's.  :meth:`data` has no graphs, tensors or functions in it: that can be pickled,
    and planning it needs no torch.

    Attributes:
        variants: its graphs by the names of their recipes, the preferred ones first; the last one is always there.
        outline: what plans are made from.
        readings: where symbols have their values.
        static: positions of inputs that are weights.
    """

    variants: Mapping[str, LoweredStep]
    outline: StepOutline
    readings: tuple[Reading, ...]
    static: tuple[int, ...]

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What it is called with, weights included."""
        return [*self.variants.values()][-1].graph.inputs

    def data(self) -> KeptStep:
        """This without anything that planning has made meanwhile, to be pickled."""
        return replace(self, outline=self.outline.data())
