"""Every error this project raises.

All of them derive from :class:`MosaicError`, and each message says what to do next.  An error
raised while a graph is being compiled reaches the caller inside Dynamo's ``BackendCompilerFailed``
(its ``inner_exception``), with the message printed in full.
"""

from __future__ import annotations


class MosaicError(Exception):
    """Base class: catch this to catch everything the compiler raises on purpose."""


class OptionsError(MosaicError, ValueError):
    """An option or environment switch is unknown or malformed."""


class GradientError(MosaicError):
    """The captured graph needs gradients; this compiler is for inference only."""


class CaptureError(MosaicError):
    """A graph uses something that the compiler cannot represent."""


class InvariantError(MosaicError):
    """A pass broke one of the graph invariants of ``passes/verifier/``."""

    def __init__(self, pass_name: str, invariant: str, detail: str) -> None:
        super().__init__(f"pass {pass_name!r} broke the invariant {invariant!r}: {detail}")
        self.pass_name = pass_name
        self.invariant = invariant
        self.detail = detail


class ConfigError(MosaicError, ValueError):
    """A model's config, or what is asked about it, makes no sense."""


class PlanError(MosaicError):
    """A memory plan is not valid: overlap, out of bounds, or a malformed plan file."""


class BudgetError(MosaicError):
    """No chunk sizes make a step fit its memory budget.

    Attributes:
        needed: bytes that the step needs at least.
        budget: bytes that it was given.
        longest: the number of tokens that would fit, in proportion; ``None`` if lengths are fixed.
    """

    def __init__(self, message: str, needed: int, budget: int, longest: int | None) -> None:
        super().__init__(message)
        self.needed, self.budget, self.longest = needed, budget, longest


class ArenaError(MosaicError):
    """The virtual-memory arena cannot provide the memory a plan asks for."""


class StateError(MosaicError):
    """What lives from step to step cannot be had, or is not what is asked for: closed, stale, of another length."""


class MissingStateError(StateError):
    """State is not there, or not for these sizes and weights: a step for all rows makes it."""


class CanaryError(MosaicError):
    """Poison mode found a write outside of a planned buffer."""


class StaleGraphError(MosaicError):
    """A weight is not what the graph was compiled for, and Dynamo did not notice."""


class FallbackError(MosaicError):
    """Strict mode: something would have run in a slower or fatter way than planned."""


class CacheError(MosaicError):
    """What is kept on disk is damaged, or something cannot be kept there."""
