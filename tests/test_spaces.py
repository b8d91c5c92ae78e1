"""A buffer has a space and a term: several spaces in one plan, fixed places, and what the caller gives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mosaic_compiler
from mosaic_compiler.backend import compile_aten
from mosaic_compiler.errors import PlanError
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import trace
from mosaic_compiler.planning import Buffer, MemoryPlan, make_plan
from mosaic_compiler.planning.buffers import PLACED, SPACES, TERMS, check_overlaps
from mosaic_compiler.planning.lives import StepLives
from mosaic_compiler.planning.placement import place, place_blocks
from mosaic_compiler.planning.planner import Planner
from mosaic_compiler.report.diff import diff
from mosaic_compiler.report.scene import COLOURS, rectangles
from mosaic_compiler.report.tables import plan_lines

STEPS = 12
lives = st.lists(st.tuples(st.integers(0, STEPS - 1), st.integers(1, STEPS), st.integers(0, 4096)), max_size=14)


def buffers_of(found, space="arena", prefix="b"):
    return [
        Buffer(f"{prefix}{i}", space, size, start, min(start + length, STEPS))
        for i, (start, length, size) in enumerate(found)
    ]


@given(lives, lives)
def test_each_space_is_placed_by_itself(first, second):
    own, other = buffers_of(first), buffers_of(second, "host", "h")
    plan = make_plan([*own, *other], [f"n{i}" for i in range(STEPS)])
    alone = make_plan(own, plan.schedule)
    assert plan.height == alone.height
    assert plan.heights.get("host", 0) == make_plan(buffers_of(second, "arena", "h"), plan.schedule).height
    assert plan.peak == alone.peak  # the host's memory is another one
    assert MemoryPlan.from_json(plan.to_json()) == plan


@given(lives, st.data())
def test_lives_that_have_a_place_keep_it(found, data):
    own = buffers_of(found)
    _, offsets = place(own)
    chosen = [b for b in own if data.draw(st.booleans())]
    shift = 512 * data.draw(st.integers(0, 9))
    fixed = {b.name: offsets[b.name] + shift for b in chosen}
    for algorithm in ("auto", "size", "naive"):
        _, again = place_blocks(own, {b.name: "loop" for b in own[::2]}, algorithm, fixed=fixed)
        assert {name: again[name] for name in fixed} == fixed
        check_overlaps([Buffer(b.name, "arena", b.nbytes, b.start, b.end, offset=again[b.name]) for b in own])
    plan = make_plan(
        [Buffer(b.name, "arena", b.nbytes, b.start, b.end, offset=fixed.get(b.name)) for b in own],
        [f"n{i}" for i in range(STEPS)],
    )
    assert all(b.offset == fixed[b.name] for b in plan.buffers if b.name in fixed)


def test_spaces_do_not_overlap_with_each_other():
    at_zero = [Buffer(space, space, 512, 0, 2, offset=0) for space in PLACED]
    assert MemoryPlan(tuple(at_zero), ("a", "b")).heights == dict.fromkeys(PLACED, 512)
    twice = Buffer("again", "host", 512, 1, 2, offset=0)
    with pytest.raises(PlanError, match="overlap: host"):
        MemoryPlan((*at_zero, twice), ("a", "b"))


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (Buffer("a", "attic", 8, 0, 1), f"unknown kind of space, 'attic' .one of {', '.join(SPACES)}"),
        (Buffer("a", "heap", 8, 0, 1, term="week"), f"unknown term 'week' .one of {', '.join(TERMS)}"),
        (Buffer("a", "host", 8, 0, 1), "have an offset"),
        (Buffer("a", "caller", 8, 0, 1, offset=0, term="model"), "have an offset"),
    ],
)
def test_what_is_no_buffer(buffer, message):
    with pytest.raises(PlanError, match=message):
        MemoryPlan((buffer,), ("n",))


def test_files_of_older_versions_say_how_to_write_them_again():
    old = json.loads(MemoryPlan((), ()).to_json()) | {"version": 3}
    with pytest.raises(PlanError, match=r"version 3, and what reads it has 4: write it again, with options={'dump'"):
        MemoryPlan.from_json(json.dumps(old))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_weights_inputs_and_outputs_are_buffers():
    model = Model().requires_grad_(False)
    report = mosaic_compiler.explain(model, torch.randn(40, 8), disable=("fuse",))
    plan = report.plan
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert plan.given == {"model": weights, "call": 40 * 8 * 4}
    assert all((b.start, b.end) == (0, len(plan.schedule)) for b in plan.in_space("caller"))
    assert [b.nbytes for b in plan.of_kind("output")] == [40 * 8 * 4]
    assert sorted(b.shape for b in plan.of_kind("weight")) == [(8,), (8, 32), (32,), (32, 8)]
    assert max(plan.timeline) <= plan.peak < weights + plan.peak
    assert not [b for b in plan.own if b.is_given]
    text = str(report)
    assert "weights 2.2 KiB, inputs 1.2 KiB" in text
    assert " space " in text
    assert " term " in text


def two_plans():
    """One without and one with memory of the host."""
    schedule = ("a", "b")
    before = make_plan([Buffer("x", "arena", 512, 0, 2), Buffer("w", "caller", 2048, 0, 2, term="model")], schedule)
    return before, make_plan([*before.buffers, Buffer("k", "host", 4096, 0, 2)], schedule)


def test_reports_show_every_space():
    from rich.console import Console

    def shown(lines):
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            for line in lines:
                console.print(line)
        return capture.get()

    before, after = two_plans()
    assert "height of host" in shown(plan_lines(after))
    assert "height of host" not in shown(plan_lines(before))
    changes = shown(diff(before, after))
    assert "height of host" in changes
    assert "weights" in changes


@given(lives, lives, lives)
def test_in_pictures_each_space_has_addresses_of_its_own(first, second, third):
    heap = [replace(buffer, space="heap") for buffer in buffers_of(third, prefix="t")]
    plan = make_plan([*buffers_of(first), *buffers_of(second, "host", "h"), *heap], [f"n{i}" for i in range(STEPS)])
    shapes = rectangles(plan)
    assert [shape.buffer for shape in shapes] == list(plan.buffers)
    assert all(shape.group in COLOURS for shape in shapes)
    placed = [replace(shape.buffer, space="arena", offset=shape.offset) for shape in shapes]
    check_overlaps(placed)
    assert COLOURS.keys() >= set(PLACED) - {"arena"}


def test_budgets_and_peaks_count_the_devices_memory_only():
    """Of a step with a large buffer in the host's memory."""
    step = compile_aten(
        trace(lambda x, w: torch.relu(x @ w) @ w, torch.randn(9, 6), torch.randn(6, 6), dynamic=[(0,)]), MosaicOptions()
    )
    given, sizes = step.outline.planner.lives, step.outline.sizes_for(9)
    symbol = next(iter(given.symbols))
    host = [replace(given.buffers[0], name=f"kept{i}", space="host", nbytes=symbol * (1 << 40)) for i in range(3)]
    with_host = Planner(
        StepLives((*given.buffers, *host), given.given, given.schedule, given.device_type, given.regions)
    )
    alone = step.outline.planner.plan(sizes).plan
    plan = with_host.plan(sizes, budget=alone.workspace).plan
    assert (plan.peak, plan.workspace, plan.height) == (alone.peak, alone.workspace, alone.height)
    assert plan.heights["host"] == 3 * 9 << 40
    assert MemoryPlan.from_json(plan.to_json()) == plan


def test_the_page_shows_every_space():
    pytest.importorskip("bokeh", reason="needs pip install 'mosaic-compiler[report]'")
    from mosaic_compiler.report.page import html

    assert "<th>space<th>term" in html(two_plans()[1])
