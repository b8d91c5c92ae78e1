"""Which passes make which graph of a step, and in which order.  This is the one place that says so.

A step is a family of graphs made from one captured graph.  Each has a :class:`Recipe`; graphs share what their recipes
begin with.  A step runs the first graph whose plan fits its budget; the last recipe's graph is always there.

Order matters:

1. ``needed-rows`` first: it says what the step has to compute; all others only say how.
2. ``canonicalize`` before the rest: every later pass matches one spelling per operation.  ``visible-keys`` right behind
   it: what is known of masks is read off whole graphs.  ``split-attention`` behind both: it wants attention without
   masks, and the one spelling of its keys.
3. ``row-demand`` before ``in-place``: it calls ops again on fewer rows, which only pure ops allow.
4. ``gather-logits``, ``vocabulary-tiles`` and ``sparse-outputs`` behind ``row-demand``: they match the head, and what
   is done with its rows, as it left them.
5. ``mixtures`` right behind them, because ``row-demand`` and ``chunk-loops`` want a mixture row by row;
   ``expand-mixtures`` in front of ``fuse`` where there are no loops, so that its ops are planned and fused;
   ``causal-first``, which wants whole sequences, too.
6. ``chunk-loops`` when all graph-wide rewrites are done: those match nodes, not loop bodies.
7. ``scatter-results`` behind ``chunk-loops``: it matches a loop and the reader of its result.
8. ``fuse`` behind both: what a loop computes is known by then, and clusters hide ops from it.
9. ``reorder`` behind ``fuse``: it sees the ops that will run; and before anything is written.
10. ``in-place`` and ``reuse-rows`` last: they introduce writes, and no other pass moves or merges nodes around a
   write.  ``reuse-rows`` behind ``in-place``, because it must see when a body's results are written.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How one graph of a step is made.

    Attributes:
        name: what the graph is called.
        passes: names of passes, in order.
    """

    name: str
    passes: tuple[str, ...]

    def without(self, *passes: str, name: str) -> Recipe:
        """The same with some passes left out."""
        return Recipe(name, tuple(given for given in self.passes if given not in passes))

    def with_pass(self, name: str, before: str) -> Recipe:
        """The same with one pass more, in front of another one."""
        at = self.passes.index(before)
        return Recipe(self.name, (*self.passes[:at], name, *self.passes[at:]))


LOOPS = Recipe(
    "loops",
    (
        "needed-rows",
        "canonicalize",
        "visible-keys",
        "split-attention",
        "mixtures",
        "row-demand",
        "gather-logits",
        "vocabulary-tiles",
        "sparse-outputs",
        "chunk-loops",
        "scatter-results",
        "fuse",
        "reorder",
        "in-place",
        "reuse-rows",
    ),
)
"""Runs in any budget: what is computed row by row runs in chunks of rows."""

FLAT = (
    LOOPS.without("chunk-loops", "scatter-results", "reuse-rows", name="flat")
    .with_pass("expand-mixtures", "fuse")
    .with_pass("causal-first", "fuse")
)
"""Where nothing needs chunks, nothing is computed again in each loop."""

RECIPES = (FLAT, LOOPS)
"""The graphs of a step, the preferred ones first; the last one is always made."""

PASS_NAMES = tuple(dict.fromkeys(name for recipe in reversed(RECIPES) for name in recipe.passes))
"""All passes, those of the last recipe first."""
