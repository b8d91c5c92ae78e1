"""Which keys are kept for the queries of some rows: how keys are scored, and how many stay.

Sources: ``sparse-dllm``: Song et al., 2025, arXiv 2508.02558, as its code does it (``n = int((N - B) * r)``, scores
without softmax); ``mage``: arXiv 2602.14209, its votes (its budgets per layer are not taken over: all layers keep as
many).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Score:
    """One way to score keys.

    Attributes:
        says: what it is, for people.
        delay: steps of a block that keep nothing, before keys are chosen.
        is_of_layers: published as one set of keys per layer.
    """

    says: str
    delay: int = 0
    is_of_layers: bool = False


SCORES: Mapping[str, Score] = MappingProxyType(
    {
        "probability": Score("the largest probability that any of the queries gives a key"),
        "mage": Score("how many of the queries have a key among their likeliest"),
        "sparse-dllm": Score("mean query times key, mean over heads, largest of three neighbours", 1, True),
    }
)
"""By the names that ``cache_score=`` and ``--cache-score`` take."""

SETS = ("head", "layer")
"""One set of keys for each key head, or one for all heads of a layer."""

DEFAULT_KEEP = 0.05
"""Of ``cache="select"``."""


@dataclass(frozen=True)
class Selection:
    """Which keys steps read.

    Attributes:
        score: its name.
        sets: ``head`` or ``layer``.
        evicts: the others are not kept (they are chosen in a step for all rows); else all are, and they are chosen in
            the first step for some rows.
    """

    score: str = "probability"
    sets: str = "head"
    evicts: bool = True

    def __str__(self) -> str:
        return f"{self.score}, per {self.sets}{'' if self.evicts else ', all kept'}"

    @property
    def options(self) -> dict[str, Any]:
        """Of the backend: keys are chosen so, however many (which is a number of whoever steps)."""
        found = {"cache_keep": 1.0, "cache_score": self.score, "cache_sets": self.sets}
        return found if self.evicts else {**found, "cache_evict": False}


def selection_of(score: str, sets: str | None, evicts: bool = True) -> Selection:
    """The selection of this name.

    Args:
        sets: ``None``: as the score was published.
        evicts: see :class:`Selection`.

    Raises:
        ValueError: if there is none.
    """
    if score not in SCORES:
        raise ValueError(f"cache_score must be one of {', '.join(SCORES)}, got {score!r}")
    if sets is None:
        sets = "layer" if SCORES[score].is_of_layers else "head"
    if sets not in SETS:
        raise ValueError(f"cache_sets must be one of {', '.join(SETS)}, got {sets!r}")
    if SCORES[score].is_of_layers and sets != "layer":
        raise ValueError(f"cache_score={score!r} is a mean over heads: it has one set per layer (cache_sets='layer')")
    return Selection(score, sets, evicts)


def check_keep(keep: float | int | None) -> None:
    """Raises :class:`ValueError` for what is neither a share nor a count of keys."""
    is_count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    is_share = isinstance(keep, float) and 0 < keep <= 1
    if keep is not None and not is_count and not is_share:
        raise ValueError(
            f"cache_keep must be a share of the keys above 0 and up to 1.0, or a number of keys from 1, got {keep!r}"
        )


def keep_text(keep: float | int) -> str:
    """``5%``, or a number of keys."""
    return f"{keep:.1%}".replace(".0%", "%") if isinstance(keep, float) else str(keep)


def kept_keys(keep: float | int, length: int, rows: int) -> int:
    """Keys that stay of a sequence: those of the rows that are computed, and a share (or number) of the others, at
    least one of them."""
    others = max(length - rows, 0)
    wanted = int(others * keep) if isinstance(keep, float) else keep
    return min(length, rows + max(wanted, 1))
