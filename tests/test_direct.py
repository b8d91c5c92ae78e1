"""Functions traced by running them: the graph that Dynamo finds, no traces of the trace, and what is left to Dynamo."""

from __future__ import annotations

import io
import random
import sys
import time
from datetime import datetime
from random import random as roll
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mosaic_compiler
from mosaic_compiler import waiting
from mosaic_compiler.ahead import forecast
from mosaic_compiler.backend import compile_aten
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.owned.direct import trace_directly
from mosaic_compiler.owned.fingerprint import Fingerprint
from mosaic_compiler.owned.put_back import NotDirectError
from mosaic_compiler.sampling import DenoisingStep, block_window
from tests.test_kept import IDS, counting, toy
from tests.toy_models import toys


def traced(function, *args, **kwargs):
    return trace_directly(function, args, kwargs, Fingerprint(function))


@settings(max_examples=examples(2, 30), deadline=None)
@given(toys, st.integers(0, 99), st.sampled_from([(1, 7), (2, 5)]))
def test_results_are_those_of_eager(model, seed, shape):
    weights = model.weights(seed)

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)

        def forward(self, ids):
            return model(ids, *self.weights)

    module = Module()
    ids = torch.randint(0, 23, shape)
    compiled = mosaic_compiler.compile(module)
    for given_ids in (ids, ids[:, :3], ids.repeat(1, 2)):
        for got, want in zip(compiled(given_ids), module(given_ids), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_the_plan_is_that_of_dynamos_graph(tiny_llada):
    step = DenoisingStep(tiny_llada, 3)
    example = torch.full((1, 64), 3), block_window(64, 0, 64), torch.tensor([4])
    ours = forecast.capture_step(step, example, {}, is_direct=True)
    dynamos = forecast.capture_step(step, example, {})
    for tokens in (100, 3000):
        plans = [found.outline.plan_for(tokens, 0.5).plan for found in (ours, dynamos)]
        assert plans[0].peak == plans[1].peak
        assert plans[0].height == plans[1].height
    modules = [{b.module for b in found.outline.plan_for(99).plan.own} for found in (ours, dynamos)]
    assert {"model.model.layers.0.mlp.gate_proj", "model.lm_head"} <= modules[1]
    assert modules[0] == modules[1]
    sources = [{b.source for b in found.outline.plan_for(99).plan.own} for found in (ours, dynamos)]
    assert sources[0] & sources[1]


class Remembering(nn.Module):
    """Tables in a dict and in a list, as remote code has them."""

    def __init__(self):
        super().__init__()
        self.tables, self.seen = {}, []
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        if "table" not in self.tables:
            self.tables["table"] = torch.arange(4.0) * self.weight
            self.seen.append(x.shape)
        return x * self.tables["table"]


def test_what_a_model_remembers_is_put_back():
    model = Remembering()
    with pytest.raises(NotDirectError, match="remembers"):
        traced(model, torch.randn(3, 4))
    assert not model.tables
    assert not model.seen
    x = torch.randn(3, 4)
    torch.testing.assert_close(mosaic_compiler.compile(model)(x), Remembering()(x))
    assert type(model.weight) is nn.Parameter


class Setting(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("table", torch.zeros(4))
        self.inner = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        if self.how == "buffer":
            self.table = self.table + 1
        elif self.how == "attribute":
            self.last = x.shape[0]
        elif self.how == "error":
            self.last = x
            raise RuntimeError("as it should")
        return self.inner(x) + self.table


@pytest.mark.parametrize("how", ["buffer", "attribute", "error"])
def test_modules_have_what_they_had(how):
    model = Setting(how)
    before = {name: dict(part.__dict__) for name, part in model.named_modules()}
    weight, table = model.inner.weight, model.table
    with pytest.raises(NotDirectError):
        traced(model, torch.randn(3, 4))
    assert model.inner.weight is weight
    assert model.table is table
    for name, part in model.named_modules():
        assert part.__dict__.keys() == before[name].keys()


def clock(x):
    return x + time.time()


def dice(x):
    return x + random.random()


def branch(x):
    return x + 1 if x.sum() > 0 else x - 1


def written(x):
    y = x * 2
    y[0] = 0
    return y


def view_of_it(x):
    return x[1:]


def masked(x):
    q = x[None, None]
    return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(x.shape[0], x.shape[0], dtype=torch.bool))


def counted(x):
    return x + 1, x.shape[0]


TABLE = torch.arange(4.0)


def reads_a_global_tensor(x):
    return x * TABLE


def draws_from_numpy(x):
    import numpy

    return x + float(numpy.random.rand())


def clock_by_name(x):
    return x + perf_counter()


def day_of_the_year(x):
    return x + datetime.now().microsecond


def dice_by_name(x):
    return x + roll()


@pytest.mark.parametrize(
    "function",
    [
        clock, clock_by_name, day_of_the_year, dice, dice_by_name, draws_from_numpy, branch, written, view_of_it,
        masked, counted, reads_a_global_tensor,
    ],
)  # fmt: skip
def test_what_is_left_to_dynamo(function):
    with pytest.raises(NotDirectError):
        traced(function, torch.randn(5, 4))


@pytest.mark.parametrize("function", [branch, written, view_of_it, masked, counted, reads_a_global_tensor])
def test_and_dynamo_gets_it_right(function):
    compiled = mosaic_compiler.compile(function)
    for rows in (5, 3):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(compiled(x), function(x))


def test_weights_are_read_in_each_call():
    model = toy()
    compiled = mosaic_compiler.compile(model)
    compiled(IDS)
    model.head.weight.mul_(2)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    model.head.weight.data = torch.randn_like(model.head.weight)
    torch.testing.assert_close(compiled(IDS), model(IDS))


def test_one_graph_for_all_lengths_and_one_for_batches_of_one():
    compiled = mosaic_compiler.compile(toy())
    with counting() as steps:
        for shape in ((1, 20), (1, 7), (2, 10), (4, 5), (1, 13)):
            ids = torch.arange(shape[0] * shape[1]).reshape(shape) % 31
            torch.testing.assert_close(compiled(ids), toy()(ids))
    assert len(steps) == 2


def test_sizes_that_python_asks_for_are_conditions():
    """A branch on a length: each side is a graph of its own, and neither serves the other."""

    def f(x):
        return x * 2 if x.shape[0] > 8 else x * 3

    compiled = mosaic_compiler.compile(f)
    with counting() as steps:
        for rows in (5, 12, 6, 30, 9, 8):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(compiled(x), f(x))
    assert len(steps) == 2


def test_the_graph_runs_by_itself():
    model = toy()
    found = traced(model, IDS)
    step = compile_aten(found.module, MosaicOptions(), found.static)
    tensors = Fingerprint(model).tensors
    values = [IDS if kind == "argument" else tensors[what] for kind, what in found.inputs]
    torch.testing.assert_close(found.module(*values)[0], model(IDS))
    torch.testing.assert_close(step(values)[0], model(IDS))


def test_hooks_run_where_they_are():
    model = toy()
    model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(mosaic_compiler.compile(model)(IDS), model(IDS))


# ---------------------------------------------------------------------------------------------- waiting
class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_waiting_is_said_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(waiting, "AFTER", 0.0)
    monkeypatch.setattr(waiting, "_PERIOD", 0.01)
    with waiting.doing("compiling a model"):
        waiting.now("pass fuse", 2, 7)
        time.sleep(0.1)
        with waiting.doing("compiling kernels"):
            time.sleep(0.1)
    said = terminal.getvalue()
    assert "compiling a model: pass fuse, 3 of 7" in said
    assert "compiling kernels" in said
    assert said.endswith("\r\033[K"), "the line is gone"


def test_nothing_is_said_where_it_is_quick_or_in_a_pipe(monkeypatch):
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with waiting.doing("something quick"):
        pass
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setattr(waiting, "AFTER", 0.0)
    monkeypatch.setattr(waiting, "_PERIOD", 0.01)
    with waiting.doing("something slow"):
        time.sleep(0.05)
    assert terminal.getvalue() == ""
    assert pipe.getvalue() == ""


def test_an_error_ends_the_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyError), waiting.doing("something"):
        raise KeyError
    assert waiting._line is None


def test_the_reason_is_in_the_log(caplog):
    with caplog.at_level("DEBUG", "mosaic_compiler"):
        mosaic_compiler.compile(written)(torch.randn(3, 4))
    assert any("traced by Dynamo" in record.message for record in caplog.records)
