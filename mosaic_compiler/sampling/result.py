"""What ``generate`` returns, and who watches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from mosaic_compiler.planning.plan import Fallback, MemoryPlan
from mosaic_compiler.waiting import old_objects_set_aside


class Streamer(Protocol):
    """What transformers calls a streamer: it gets the draft of all ids after each step, then the end."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Generation:
    """What :func:`generate` returns.

    Attributes:
        sequences: int64 [B, N], prompt and what was generated.
        steps: forward passes of the model.
        plan: the plan with the highest peak; ``None`` if nothing was compiled.
        history: the ids after each step, if asked for.
        fallbacks: what ran in a slower or fatter way than planned, by name; ``eager`` if nothing was compiled although
            it was to be.
    """

    sequences: Tensor
    steps: int
    plan: MemoryPlan | None
    history: tuple[Tensor, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    steps_by_kind: Mapping[str, int] = field(default_factory=dict)
    """How many of them computed all rows (``full``), and how many some, with what was kept (``reuse``)."""
    state_bytes: int = 0
    """Bytes that lived from step to step."""
    is_approximate: bool = False
    """Some step used state that is not proven to be what all rows would give."""
    cache_dtype: str | None = None
    """The precision in which values were kept; ``None``: as they are computed, if any were."""
    cache_keep: float | int | None = None
    """How many keys of other rows were kept, a share or a number; ``None``: all, if any were."""


class Steps(Protocol):
    """A generation that runs: its drafts, and the forward passes so far."""

    forwards: int

    def ids_by_step(self) -> Iterator[Tensor]: ...

    def look_again(self) -> None:
        """Somebody else's code has run between two steps."""


def watched(
    run: Steps,
    on_step: Callable[[int, Tensor], None] | None,
    streamer: Streamer | None,
    *,
    keep: bool,
    advance: Callable[[Tensor], None] = lambda ids: None,
) -> tuple[Tensor, ...]:
    """Run to the end, and tell those who watch; the ids after each step, if they are to be kept."""
    history: list[Tensor] = []
    try:
        with old_objects_set_aside():
            for ids in run.ids_by_step():
                if keep:
                    history.append(ids.clone())
                if on_step is not None:
                    on_step(run.forwards, ids)
                if streamer is not None:
                    streamer.put(ids.cpu())
                if on_step is not None or streamer is not None:
                    run.look_again()
                advance(ids)
    finally:
        if streamer is not None:
            streamer.end()
    return tuple(history)
