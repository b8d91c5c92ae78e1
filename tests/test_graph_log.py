"""What users are told: one log line per compiled function, methods that run uncompiled, all graphs of a function."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import mosaic_compiler
from mosaic_compiler.errors import OptionsError


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "mosaic_compiler")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "mosaic_compiler"]


def broken(x, *, mask=None, k=2):
    y = x @ x.t() * k
    torch._dynamo.graph_break()
    z = torch.relu(y) @ x
    torch._dynamo.graph_break()
    return z + 1 if mask is None else z + mask


def test_a_function_of_several_graphs_is_one_line(lines):
    fast = torch.compile(broken, backend="mosaic", dynamic=True)
    for n in (6, 9):
        x = torch.randn(n, 4)
        torch.testing.assert_close(fast(x), broken(x))
    ((level, text),) = lines()
    assert level == "WARNING"
    assert text.startswith("mosaic: broken (tests/test_graph_log.py): 3 graphs, because a graph break at tests/")
    assert text.count("a graph break at") == 2


def test_a_function_of_one_graph_is_no_warning(lines):
    torch.compile(lambda x: x * 2, backend="mosaic", dynamic=True)(torch.randn(6))
    ((level, text),) = lines()
    assert level == "INFO"
    assert text.endswith(": 1 graph")


def test_functions_behind_a_broken_one_have_lines_of_their_own(lines):
    torch.compile(broken, backend="mosaic", dynamic=True)(torch.randn(6, 4))
    torch.compile(lambda x: x * 2, backend="mosaic", dynamic=True)(torch.randn(6))
    assert [level for level, _ in lines()] == ["WARNING", "INFO"]


def test_a_function_with_nothing_behind_its_last_break_takes_no_other_along(lines):
    def f(x):
        y = x * 2
        torch._dynamo.graph_break()
        return y

    torch.compile(f, backend="mosaic", dynamic=True)(torch.randn(6))
    torch.compile(lambda x: x * 2, backend="mosaic", dynamic=True)(torch.randn(6))
    ((level, text),) = lines()
    assert (level, text.endswith(": 1 graph")) == ("INFO", True)


def test_breaks_are_fallbacks_and_strict_mode_refuses_them():
    report = mosaic_compiler.explain(broken, torch.randn(6, 4))
    assert [fallback.name for fallback in report.fallbacks] == ["graph-break"] * 2
    with pytest.raises(Exception, match="strict mode: graph-break"):
        mosaic_compiler.explain(broken, torch.randn(6, 4), strict=True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.embed(x))

    def diffusion_generate(self, x):
        return self(x).argmax(-1)

    def get_input_embeddings(self):
        return self.embed


OPTIONS = {"needed_rows": "before_masked", "mask_token_id": 3}


def test_a_method_that_runs_the_uncompiled_model_says_so(lines):
    compiled = torch.compile(Model().eval(), backend="mosaic", dynamic=True, options=OPTIONS)
    ids = torch.full((1, 8), 3)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"model.compile\(backend='mosaic'"):
        compiled.diffusion_generate(ids)
    assert [text for _, text in lines() if "eager: diffusion_generate() of a compiled model" in text]


def test_other_methods_and_other_backends_say_nothing():
    ids = torch.full((1, 8), 3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(Model().eval(), backend="mosaic", dynamic=True, options=OPTIONS)
        assert compiled.get_input_embeddings() is compiled._orig_mod.embed
        torch.compile(Model().eval(), backend="eager").diffusion_generate(ids)
        model = Model().eval()
        model.compile(backend="mosaic", dynamic=True, options=OPTIONS)
        assert model.diffusion_generate(ids).shape == (1, 8)


def test_explain_takes_the_functions_own_keyword_arguments():
    x, mask = torch.randn(6, 4), torch.ones(6, 4)
    report = mosaic_compiler.explain(broken, x, mask=mask, k=3, poison=True)
    torch.testing.assert_close(report.result, broken(x, mask=mask, k=3))
    assert torch.equal(mosaic_compiler.explain(broken, x, kwargs={"mask": mask, "k": 3}).result, report.result)
    with pytest.raises(OptionsError, match="did you mean 'poison'"):
        mosaic_compiler.explain(broken, x, posion=True)
    ahead = mosaic_compiler.explain(lambda x, y: x @ x.t() + y, torch.randn(6, 4), y=torch.randn(6, 6), tokens=64)
    assert ahead.plan.peak >= 64 * 64 * 4


def test_explain_has_one_peak_of_all_graphs():
    report = mosaic_compiler.explain(broken, torch.randn(64, 4))
    assert len(report.graphs) == 3
    outputs = [sum(b.nbytes for b in graph.plan.of_kind("output")) for graph in report.graphs]
    peaks = [graph.plan.peak for graph in report.graphs]
    assert report.peak == max(peaks[0], outputs[0] + peaks[1], outputs[0] + outputs[1] + peaks[2])
    assert str(report).startswith("3 graphs; peak of all together: at most ")


def test_what_dynamo_wraps_has_its_own_name(lines):
    """Modules of PyTorch's and builtin functions have no frame that Dynamo looks at."""
    with torch.no_grad():
        torch.compile(torch.nn.Linear(4, 4), backend="mosaic")(torch.ones(6, 4))
        torch.compile(torch.sin, backend="mosaic")(torch.ones(6, 4))
    assert lines() == [("INFO", "mosaic: forward (modules/linear.py): 1 graph"), ("INFO", "mosaic: sin: 1 graph")]


def test_breaks_of_other_backends_are_not_ours(lines):
    torch.compile(broken, backend="eager")(torch.ones(6, 4))
    scope = {"torch": torch}
    exec(compile("def f(x):\n    return x * 2", "elsewhere.py", "exec"), scope)
    torch.compile(scope["f"], backend="mosaic", dynamic=True)(torch.ones(6))
    assert lines() == [("INFO", "mosaic: f (elsewhere.py): 1 graph")]
