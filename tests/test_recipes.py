"""A step is a family of graphs, each made by a recipe: a list of passes."""

from __future__ import annotations

import pytest
import torch

from mosaic_compiler import recipes
from mosaic_compiler.backend import compile_aten
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import trace
from mosaic_compiler.passes.base import Machine
from mosaic_compiler.passes.pipeline import make_family, passes_of
from mosaic_compiler.recipes import FLAT, LOOPS, RECIPES, Recipe

OPTIONS = MosaicOptions(disable=("fuse",))


def step(x, w):
    return torch.softmax(torch.relu(x @ w) @ w.t(), -1)


def traced(f=step):
    return trace(f, torch.randn(9, 6), torch.randn(6, 8), dynamic=[(0,)])


def test_the_first_two():
    family = make_family(traced(), OPTIONS, Machine())
    assert list(family.graphs) == ["flat", "loops"]
    assert [record.name for record in family.records] == [name for name in LOOPS.passes if name != "fuse"]


def test_a_graph_that_would_be_the_last_one_again_is_not_made():
    """Nothing is multiplied, so nothing is chunked."""
    assert list(make_family(traced(lambda x, w: x.exp()), OPTIONS, Machine()).graphs) == ["loops"]


def test_a_third_one_is_one_more_recipe(monkeypatch):
    """It is made, planned, preferred where it fits, and run."""
    plain = FLAT.without("in-place", name="plain")
    monkeypatch.setattr(recipes, "RECIPES", (plain, *RECIPES))
    run = compile_aten(traced(), OPTIONS)
    assert list(run.variants) == ["plain", "flat", "loops"]
    needs = {name: run.outline.planners[name].plan(run.outline.sizes_for(500)).plan.workspace for name in run.variants}
    assert needs["plain"] > needs["flat"]
    w = torch.randn(6, 8)
    seen = []
    for budget in (None, needs["flat"], needs["flat"] // 3):
        run = compile_aten(traced(), MosaicOptions(disable=("fuse",), memory_budget=budget))
        name, _ = run.outline.choose(run.outline.sizes_for(500), budget)
        seen.append(name)
        x = torch.randn(500, 6)
        (got,) = run([x, w])
        torch.testing.assert_close(got, step(x, w), rtol=1e-4, atol=1e-5)
    assert seen == ["plain", "flat", "loops"]


def test_a_preferred_graph_may_have_loops(monkeypatch):
    """It runs where it fits without chunks."""
    apart = LOOPS.without("in-place", name="apart")
    monkeypatch.setattr(recipes, "RECIPES", (apart, *RECIPES))
    plans = compile_aten(traced(), OPTIONS).outline
    needs = {name: planner.plan(plans.sizes_for(500)).plan.workspace for name, planner in plans.planners.items()}
    assert plans.choose(plans.sizes_for(500), needs["apart"])[0] == "apart"
    assert plans.choose(plans.sizes_for(500), needs["apart"] // 3)[0] == "loops"


def test_recipes_name_passes_that_there_are():
    for recipe in RECIPES:
        assert [made.name for made in passes_of(recipe)] == list(recipe.passes)
    with pytest.raises(KeyError):
        passes_of(Recipe("other", ("no-such-pass",)))
