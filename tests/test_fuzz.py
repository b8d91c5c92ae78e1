"""Random programs against eager PyTorch: a minute of ``make fuzz``."""

from __future__ import annotations

import time

import pytest
from effort import examples
from fuzz import check, program_of

SECONDS = examples(6, 12)  # of each run, and longer if it is not through with the least number of programs
LEAST, PROGRAMS = 10, 60


@pytest.mark.parametrize("first", [0, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_random_programs_return_what_eager_pytorch_returns(first):
    started, outcomes = time.monotonic(), []
    for seed in range(first, first + PROGRAMS):
        outcomes.append(check(seed))
        if len(outcomes) >= LEAST and time.monotonic() - started > SECONDS:
            break
    assert outcomes.count("ok") >= 0.8 * len(outcomes)


@pytest.mark.fuse
def test_random_programs_with_kernels():
    assert [check(seed, fuse=True) for seed in (0, 5, 7)] == ["ok"] * 3


def test_a_program_says_what_it_is_made_from():
    assert program_of(3) == program_of(3)
    assert program_of(3).startswith("def f(x, y, i, w, k):\n    n = x.shape[0]\n")
