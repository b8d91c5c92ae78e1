"""State: steps that keep values for other steps, and steps for some rows that use them.

``cut.py`` finds what has to be kept, ``keep.py`` and ``reuse.py`` make the two kinds of steps of one captured graph;
``select.py`` those of which only chosen keys are kept, ``read.py`` those that read chosen keys of all that are kept;
``attended.py`` looks at attentions, ``coding.py`` writes fewer bits, ``residual.py`` keeps the last rows beside them;
``places.py`` adds what takes state in and gives it out.
They change what a graph takes and returns, so they are no part of a pipeline: what they make goes through one.
"""

from __future__ import annotations

from mosaic_compiler.passes.state.attended import Attended, attended_in, cut_for
from mosaic_compiler.passes.state.coding import Coding, codings_of
from mosaic_compiler.passes.state.cut import Cut, find_cut, inputs_of, leading_parts
from mosaic_compiler.passes.state.keep import KeepStatePass
from mosaic_compiler.passes.state.reach import find_reach
from mosaic_compiler.passes.state.read import ChooseKeysPass, ReadChosenPass
from mosaic_compiler.passes.state.residual import residual_in, residual_nbytes
from mosaic_compiler.passes.state.reuse import ReuseStatePass
from mosaic_compiler.passes.state.select import KeepSelectedPass, ReuseSelectedPass

__all__ = [
    "Attended",
    "ChooseKeysPass",
    "Coding",
    "Cut",
    "KeepSelectedPass",
    "KeepStatePass",
    "ReadChosenPass",
    "ReuseSelectedPass",
    "ReuseStatePass",
    "attended_in",
    "codings_of",
    "cut_for",
    "find_cut",
    "find_reach",
    "inputs_of",
    "leading_parts",
    "residual_in",
    "residual_nbytes",
]
