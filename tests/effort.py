"""How many examples of a property are tried: ``make test`` tries some, ``make test-all`` many."""

from __future__ import annotations

import os

IS_THOROUGH = os.environ.get("TEST_ALL", "") == "1"


def examples(some: int, many: int) -> int:
    """``max_examples`` of a property whose examples take seconds each."""
    return many if IS_THOROUGH else some
