"""Passes: each maps a GraphModule to a new GraphModule that still runs and equals it."""

from mosaic_compiler.passes.base import Pass, trace
from mosaic_compiler.passes.canonicalize import CanonicalizePass
from mosaic_compiler.passes.in_place import InPlacePass
from mosaic_compiler.passes.pipeline import PASSES, run_passes
from mosaic_compiler.passes.row_demand import RowDemandPass
from mosaic_compiler.passes.verifier import Verifier

__all__ = ["PASSES", "CanonicalizePass", "InPlacePass", "Pass", "RowDemandPass", "Verifier", "run_passes", "trace"]
