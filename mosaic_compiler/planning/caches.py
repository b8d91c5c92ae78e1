"""Cache policies as data: which rows a step computes where others are kept, and when all are computed again.

Every policy but ``exact`` is an approximation for models whose rows attend to all others, unless state is refreshed in
every step.  Sources: ``prefix`` and ``dual``: Fast-dLLM (Wu et al., 2025, and its ``generate.py``); ``delayed``:
dKV-Cache (Ma et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Policy:
    """Which rows are computed in a step that uses state.

    Attributes:
        begins: from the ``block`` on; ``None``: no window of rows.
        ends: with the ``block``, or with the ``sequence``.
        takes_masked: rows of masked tokens.
        takes_changed: rows whose token is another one than in the step before.
        is_kept: state is kept, whatever is known of it.
        is_exact: state is kept where it is proven which of it stays as it is, and only that is used.
        chooses: of keys some are kept, if nobody says how many (``planning/selection.py``).
        says: what it does, for people.
    """

    begins: str | None = None
    ends: str | None = None
    takes_masked: bool = False
    takes_changed: bool = False
    is_kept: bool = True
    is_exact: bool = False
    chooses: bool = False
    says: str = ""


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "none": Policy(is_kept=False, says="every step computes every row"),
        "exact": Policy(
            is_kept=False, is_exact=True, says="rows whose state is proven to be what it would be; else all of them"
        ),
        "prefix": Policy("block", "sequence", says="the block and what is behind it"),
        "dual": Policy("block", "block", says="the block"),
        "select": Policy("block", "block", chooses=True, says="the block, against the keys that count for it"),
        "auto": Policy("block", "block", says="the block, against as much as fits the memory budget"),
        "delayed": Policy(takes_masked=True, takes_changed=True, says="masked tokens, and those of the last step"),
    }
)
"""By the names that ``cache=`` and ``--cache`` take."""


@dataclass(frozen=True)
class Refresh:
    """When a step computes all rows again.

    Attributes:
        at_blocks: where a block begins.
        every: as each so-manyth step; ``None``: never for that reason.
    """

    at_blocks: bool = True
    every: int | None = None

    def is_due(self, steps_since: int | None, begins_block: bool) -> bool:
        """Whether a step is to be a full one.

        Args:
            steps_since: steps since the last full one; ``None``: there was none.
            begins_block: it is the first one of its block.
        """
        if steps_since is None or (self.at_blocks and begins_block):
            return True
        return self.every is not None and steps_since + 1 >= self.every


def policy_of(name: str) -> Policy:
    """Raises :class:`ValueError` for a policy that there is not."""
    if name not in POLICIES:
        raise ValueError(f"cache must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name]


def refresh_of(given: str | int) -> Refresh:
    """What ``cache_refresh`` says: ``block``, ``never`` or a number of steps.

    Raises:
        ValueError: for anything else.
    """
    if given == "block":
        return Refresh()
    if given == "never":
        return Refresh(at_blocks=False)
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return Refresh(at_blocks=False, every=given)
    raise ValueError(f"cache_refresh must be block, never, or a number of steps from 1, got {given!r}")
