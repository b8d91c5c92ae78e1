"""``NamedStep``: a step that says by name what it does in another way than asked for, with its kinds and its state."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mosaic_compiler.errors import FallbackError
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning.caches import POLICIES, refresh_of
from mosaic_compiler.planning.kept import KeptStep
from mosaic_compiler.planning.lowered import LoweredOp
from mosaic_compiler.planning.plan import Fallback
from mosaic_compiler.planning.reach import Reach
from mosaic_compiler.runtime.automatic import Automatic
from mosaic_compiler.runtime.devices import check_machine
from mosaic_compiler.runtime.kinds import Kinds
from mosaic_compiler.runtime.program import Program
from mosaic_compiler.runtime.programs import Variant
from mosaic_compiler.runtime.store import Stateful

logger = logging.getLogger("mosaic_compiler")


class NamedStep(Stateful):
    """One graph: call it with the list of graph inputs, get the list of outputs.

    Args:
        kept, variants, options: see :class:`~mosaic_compiler.runtime.engine.Step`.
        planned_fallbacks: what its plans do not fully cover.
        derive: makes its kinds.
        prove: finds out which of its rows depend on which.

    Attributes:
        on_derived: called with ``kinds`` or ``reach``, and what was made, when that is first asked for.
        derived: what was, by these names.
    """

    def __init__(
        self,
        kept: KeptStep,
        variants: Mapping[str, Variant],
        options: MosaicOptions,
        planned_fallbacks: Sequence[Fallback] = (),
        derive: Callable[[], Kinds] = Kinds,
        prove: Callable[[], Reach | None] = lambda: None,
    ) -> None:
        self._derive, self._prove = derive, prove
        self.on_derived: Callable[[str, Any], None] = lambda name, made: None
        self.derived: dict[str, Any] = {}
        self.planned_fallbacks = tuple(planned_fallbacks)
        policy = POLICIES[options.cache]
        self.automatic: Automatic | None = None
        if policy.is_kept or (policy.is_exact and options.needed_rows != "all"):
            assert options.mask_token_id is not None
            shifted = options.needed_rows == "before_masked"
            refresh = refresh_of(options.cache_refresh)
            self.automatic = Automatic(policy, refresh, options.mask_token_id, shifted=shifted)
        self._found_late: dict[str, Fallback] = {}
        self._has_said_approximate = False
        super().__init__(kept, variants, options)
        check_machine(options.budget, self.device)
        self._be_strict()

    @functools.cached_property
    def kinds(self) -> Kinds:
        """Steps for all rows that keep state, and for some rows that use it: made of the captured graph when they are
        first asked for."""
        made = self.derived["kinds"] = self._derive()  # first: who wants to be told looks at what is there
        self.on_derived("kinds", made)
        return made

    @functools.cached_property
    def reach(self) -> Reach | None:
        """Which rows depend on which, if not all on all."""
        found = self.derived["reach"] = self._prove()
        self.on_derived("reach", found)
        return found

    def run_alone(self, inputs: Sequence[Any]) -> list[Any]:
        """A call outside of sessions; with the option ``cache``, with state of its own."""
        if self.automatic is None or (self.automatic.is_exact and self.reach is None):
            return super().run_alone(inputs)
        kinds = self.kinds
        if not kinds.keeps or kinds.ids is None:
            if kinds.is_heavy and "no-state" not in self._found_late:
                reason = kinds.why or "which input holds the token ids cannot be told"
                reason = f"nothing is kept from call to call, every row is computed: {reason}"
                self._found_late["no-state"] = Fallback("no-state", "", "", reason, "")
                logger.warning("mosaic: no-state: %s", reason)
                self._be_strict()
            return super().run_alone(inputs)
        if not self._has_said_approximate and not self.automatic.is_exact:
            self._has_said_approximate = True
            logger.info(
                "mosaic: cache=%r is an approximation: calls compute rows of masked and changed tokens (all rows: %s), "
                "and other rows stay as they were kept",
                self.options.cache,
                self.options.cache_refresh,
            )
        return self.automatic.run(kinds, inputs)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """All named fallbacks; those of fused kernels are known once the step has been bound, what opaque ops really
        return once it has run."""
        found: dict[str, Fallback] = dict(self._found_late)
        for variant in reversed([*self.variants.values()]):
            for op, use in variant.linked.fused:
                if use.is_made and (failure := use.kernel.failure) is not None:
                    found.setdefault(op.name, Fallback(failure.name, op.name, "", failure.reason, op.source))
        return (*self.planned_fallbacks, *found.values())

    def end_at(self, breaks: Sequence[str]) -> None:
        """Dynamo has cut the function behind this graph: what is between graphs runs in eager PyTorch.

        Raises:
            FallbackError: in strict mode.
        """
        for number, reason in enumerate(breaks):
            reason = f"{reason}: what stands between graphs runs in eager PyTorch, outside of any plan or budget"
            self._found_late[f"graph break {number}"] = Fallback("graph-break", "", "", reason, "")
        if breaks:
            self._be_strict()

    def found(self, op: LoweredOp, problem: str) -> None:
        """An op returned something else than its schema or fake kernel says: it was copied."""
        if op.name not in self._found_late:
            reason = {
                "undeclared-alias": "returns memory that is not its own, which its schema does not say: it is copied",
                "undeclared-layout": "returns other strides than its fake kernel says: it is copied",
            }[problem]
            self._found_late[op.name] = Fallback(problem, op.name, op.target, reason, op.source)
            self._be_strict()

    def unrecorded(self, problem: str) -> None:
        """A program that was to be replayed runs call by call."""
        if "not-recorded" not in self._found_late:
            self._found_late["not-recorded"] = Fallback("not-recorded", "", "", problem, "")
            logger.info("mosaic: not-recorded: %s", problem)

    def _be_strict(self) -> None:
        if self.options.strict and (found := self.fallbacks):
            raise FallbackError(
                "strict mode: " + "; ".join(f"{f.name}: {f.node} ({f.reason}) {f.source}" for f in found)
            )

    def bound(self, program: Program) -> None:
        """A new program was bound: a kernel that does not compile is found out then."""
        if self.options.strict:
            program.finish()
            self._be_strict()
