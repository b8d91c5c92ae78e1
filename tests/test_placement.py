"""Placement on random lives: no overlap, between the bound and no reuse, deterministic."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_compiler.errors import PlanError
from mosaic_compiler.planning import Buffer, MemoryPlan, make_plan
from mosaic_compiler.planning.plan import align, check_overlaps

ALGORITHMS = ["auto", "live-total", "size", "naive"]
HORIZON = 24


@st.composite
def lives(draw: st.DrawFn) -> list[Buffer]:
    spans = draw(
        st.lists(st.tuples(st.integers(0, HORIZON - 1), st.integers(1, HORIZON), st.integers(0, 5000)), max_size=30)
    )
    return [
        Buffer(f"b{i}", "arena", size, start, min(start + length, HORIZON))
        for i, (start, length, size) in enumerate(spans)
    ]


def schedule() -> list[str]:
    return [f"n{i}" for i in range(HORIZON)]


def oracle_bound(buffers: list[Buffer]) -> int:
    return max((sum(align(b.nbytes) for b in buffers if b.start <= t < b.end) for t in range(HORIZON)), default=0)


def overlap(a: Buffer, b: Buffer) -> bool:
    in_time = a.start < b.end and b.start < a.end
    return in_time and a.offset < b.offset + b.size and b.offset < a.offset + a.size


@given(lives(), st.sampled_from(ALGORITHMS))
def test_no_live_buffers_share_a_byte(buffers, algorithm):
    plan = make_plan(buffers, schedule(), algorithm=algorithm)
    placed = plan.of_kind("arena")
    for i, a in enumerate(placed):
        assert not any(overlap(a, b) for b in placed[i + 1 :] if a.size and b.size)
    assert oracle_bound(buffers) == plan.lower_bound <= plan.height <= plan.naive


@given(lives(), st.sampled_from(ALGORITHMS), st.randoms(use_true_random=False))
def test_deterministic_and_independent_of_input_order(buffers, algorithm, rng):
    shuffled = list(buffers)
    rng.shuffle(shuffled)
    assert make_plan(buffers, schedule(), algorithm=algorithm) == make_plan(shuffled, schedule(), algorithm=algorithm)


@given(lives())
def test_auto_is_never_worse_than_its_parts(buffers):
    heights = {name: make_plan(buffers, schedule(), algorithm=name).height for name in ALGORITHMS}
    assert heights["auto"] <= min(heights["live-total"], heights["size"], heights["naive"])


@given(lives())
def test_json_round_trip(buffers):
    plan = make_plan(buffers, schedule(), symbols=[("s0", 8)])
    assert MemoryPlan.from_json(plan.to_json()) == plan
    assert hash(MemoryPlan.from_json(plan.to_json())) == hash(plan)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 6), st.integers(0, 6), st.integers(1, 3)), max_size=8))
def test_overlap_check_agrees_with_brute_force(spans):
    buffers = [
        Buffer(f"b{i}", "arena", size * 512, start, start + length, offset=offset * 512)
        for i, (start, length, offset, size) in enumerate(spans)
    ]
    bad = any(overlap(a, b) for i, a in enumerate(buffers) for b in buffers[i + 1 :])
    if bad:
        with pytest.raises(PlanError, match="overlap"):
            check_overlaps(buffers)
    else:
        check_overlaps(buffers)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (Buffer("a", "heap", 8, 0, 1), "unknown kind"),
        (Buffer("a", "arena", 8, 1, 1, offset=0), "not a life"),
        (Buffer("a", "arena", 8, 0, 3, offset=0), "not a life"),
        (Buffer("a", "arena", -8, 0, 1, offset=0), "not a life"),
        (Buffer("a", "arena", 8, 0, 1), "have an offset"),
        (Buffer("a", "output", 8, 0, 1, offset=0), "have an offset"),
        (Buffer("a", "arena", 8, 0, 1, offset=100), "multiple of 512"),
    ],
)
def test_malformed_plans_are_refused(buffer, message):
    with pytest.raises(PlanError, match=message):
        MemoryPlan(buffers=(buffer,), schedule=("n0", "n1"))


def test_overlap_names_both_buffers_with_lives_and_offsets():
    first = Buffer("mm_1", "arena", 1024, 0, 2, offset=0, module="layers.0", source="model.py:7")
    second = Buffer("mm_2", "arena", 512, 1, 3, offset=512)
    with pytest.raises(PlanError) as error:
        MemoryPlan(buffers=(first, second), schedule=("a", "b", "c"))
    for part in ("mm_1 [0, 2) 1024 bytes at 0 (layers.0, model.py:7)", "mm_2 [1, 3) 512 bytes at 512"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("[]", "not a plan"),
        ('{"schema": "other"}', "not a plan"),
        ('{"schema": "mosaic.plan", "version": 99}', "version 99"),
        ('{"schema": "mosaic.plan", "version": 2}', "malformed plan: KeyError"),
    ],
)
def test_bad_plan_files(text, message):
    with pytest.raises(PlanError, match=message):
        MemoryPlan.from_json(text)


def test_edited_plan_file_is_caught():
    plan = make_plan([Buffer("a", "arena", 512, 0, 2), Buffer("b", "arena", 512, 1, 2)], ["x", "y"])
    with pytest.raises(PlanError, match="overlap"):
        MemoryPlan.from_json(plan.to_json().replace('"offset": 512', '"offset": 0'))
    with pytest.raises(PlanError, match="timeline"):
        MemoryPlan.from_json(plan.to_json().replace('"timeline": [\n  512', '"timeline": [\n  513'))


def test_random_transformer_like_lives_reach_the_bound():
    """A residual stream updated in place, with short-lived temporaries: what real steps look like."""
    for seed in range(200):
        rng = random.Random(seed)
        layers, time, buffers = rng.randint(2, 12), 0, []
        wide, narrow = rng.randint(20, 90) * 512, rng.randint(4, 12) * 512
        layer_lives = (
            ("q", narrow, 1, 4),
            ("k", narrow, 2, 4),
            ("h", wide, 5, 7),
            ("g", wide, 6, 8),
            ("y", narrow, 7, 9),
        )
        for layer in range(layers):
            buffers += [Buffer(f"{n}{layer}", "arena", size, time + a, time + b) for n, size, a, b in layer_lives]
            time += 8
        buffers.append(Buffer("x", "arena", narrow, 0, time + 2))
        plan = make_plan(buffers, [f"n{i}" for i in range(time + 2)])
        assert plan.height == plan.lower_bound


def test_the_search_turns_a_chain_around():
    """k and v are placed while x is not alive yet; x has to go above them, for z to fit."""
    sizes = {
        "x": (2, 9, 2),
        "k": (0, 4, 2),
        "v": (0, 4, 2),
        "z": (1, 2, 9),
        "k1": (4, 9, 2),
        "v1": (4, 9, 2),
        "y": (7, 9, 8),
    }
    buffers = [Buffer(name, "arena", size * 512, start, end) for name, (start, end, size) in sizes.items()]
    for name in ("live-total", "size"):
        assert make_plan(buffers, schedule(), algorithm=name).height > 14 * 512
    plan = make_plan(buffers, schedule())
    assert plan.height == plan.lower_bound == 14 * 512
    assert plan.algorithm.endswith("searched")


@pytest.mark.parametrize("name", "ABCDE")
def test_adversarial_instances_are_placed_without_overlap(name):
    path = Path(__file__).parent.parent.parent / "shared" / "dsa" / f"{name}.1048576.csv"
    if not path.exists():
        pytest.skip("planning instances are not on this machine")
    rows = list(csv.DictReader(path.open()))
    times = sorted({int(r[key]) for r in rows for key in ("lower", "upper")})
    at = {time: index for index, time in enumerate(times)}
    buffers = [Buffer(r["id"], "arena", int(r["size"]), at[int(r["lower"])], at[int(r["upper"])]) for r in rows]
    plan = make_plan(buffers, [str(t) for t in times])
    assert plan.height <= 1.45 * 1048576  # verified against overlap on construction
