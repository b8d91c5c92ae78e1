"""row-demand: which rows are computed, that the analysis is sound, and that the rewrite equals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from effort import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mosaic_compiler
from mosaic_compiler import ir
from mosaic_compiler.backend import compile_aten, observing
from mosaic_compiler.book import STANDARD
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import CanonicalizePass, run_passes, trace
from mosaic_compiler.passes.row_demand import RowDemandPass
from mosaic_compiler.passes.row_demand.demand import analyse
from mosaic_compiler.planning.room import capacity
from mosaic_compiler.sampling import DenoisingStep, block_window

MASK = 3
VOCABULARY = 9
aten = torch.ops.aten

MATMULS = {op for op, known in STANDARD if known.family == "matmul"}


# ----------------------------------------------------------------------------- random toy heads
ROWWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "softcap": lambda x: torch.tanh(x / 5) * 5,
    "residual": lambda x: x + torch.relu(x * 0.5),
    "flat": lambda x: x.reshape(-1, x.shape[-1]).reshape(x.shape),
    "heads": lambda x: x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "sort": lambda x: torch.sort(x, -1)[0],
    "per_token": lambda x: x * torch.arange(x.shape[1]).unsqueeze(-1),
    "per_sample": lambda x: x + torch.arange(x.shape[0])[:, None, None],
    "rotate": lambda x: torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1),
    "mix_rows": lambda x: x - x.mean(1, keepdim=True),  # demands all rows
}
SELECTORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "masked": lambda ids: ids == MASK,
    "unmasked": lambda ids: ~(ids == MASK),
    "window": lambda ids: (ids == MASK) & (torch.arange(ids.shape[1]) > 2),
    "row_only": lambda ids: (torch.arange(ids.shape[1]) < 3).unsqueeze(0).expand_as(ids) & (ids > 0),
    "either": lambda ids: (ids == MASK) | (ids == 4),
}
READOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "argmax": lambda x: x.argmax(-1),
    "confidence": lambda x: torch.softmax(x, -1).amax(-1),
    "highest": lambda x: torch.softmax(x, -1).max(-1)[1],
    "entropy": lambda x: -(torch.softmax(x, -1) * torch.log_softmax(x, -1)).sum(-1),
    "margin": lambda x: (lambda t: t[..., 0] - t[..., 1])(torch.topk(x, 2, -1)[0]),
    "shifted": lambda x: torch.cat((x[:, :1], x[:, :-1]), 1).argmax(-1),
    "whole": lambda x: x,
}
MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "last": lambda x: x[:, -1],
    "tail": lambda x: x[:, -3:],
    "step": lambda x: x[:, ::2],
    "sample": lambda x: x[0],
    "picked": lambda x: x.index_select(1, torch.tensor([2, 0, 2])),
    "pairs": lambda x: x[torch.tensor([0, -1]), torch.tensor([1, 2])],
    "gathered": lambda x: x.gather(
        1, torch.tensor([[1], [0], [3]]).expand(x.shape[0], 3, 1).expand(-1, -1, x.shape[-1])
    ),
}


@dataclass(frozen=True)
class Head:
    """hidden [B, N, D] -> row-wise ops -> matmul -> row-wise ops -> readouts through selectors or moves."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    reads: tuple[tuple[str, str], ...]
    filled: bool = False  # masked_fill in the place of where

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for name in self.before:
            hidden = ROWWISE[name](hidden)
        logits = hidden @ weight
        for name in self.after:
            logits = ROWWISE[name](logits)
        return logits

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = self.logits(hidden, weight)
        results = []
        for selector, readout in self.reads:
            if selector in MOVES:
                results.append(MOVES[selector](logits).relu())
                continue
            mask, value = SELECTORS[selector](ids), READOUTS[readout](logits)
            mask = mask if value.dim() == 2 else mask.unsqueeze(-1)
            other = ids if value.dtype == torch.int64 else torch.tensor(-1.0)
            if self.filled and value.dtype != torch.int64:
                results.append(value.masked_fill(~mask, -1.0))
                continue
            results.append(torch.where(mask, value, other))
        return tuple(results)


def names(table: dict[str, object]) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(table))


heads = st.builds(
    Head,
    st.lists(names(ROWWISE), max_size=3).map(tuple),
    st.lists(st.sampled_from(["relu", "norm", "softcap", "residual", "flat", "mix_rows"]), max_size=2).map(tuple),
    st.lists(st.tuples(names(SELECTORS | MOVES), names(READOUTS)), min_size=1, max_size=3).map(tuple),
    st.booleans(),
)


def inputs(batch: int, length: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 8, (batch, length), generator=generator)
    ids[torch.rand(batch, length, generator=generator) < share] = MASK
    hidden = torch.randn(batch, length, 8, generator=generator)
    return hidden, torch.randn(8, VOCABULARY - 1, generator=generator), ids


shapes = st.tuples(st.sampled_from([1, 3]), st.integers(4, 9), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))


@settings(max_examples=examples(12, 70))
@given(heads, st.lists(shapes, min_size=1, max_size=3), st.booleans())
def test_rewritten_equals_original(head, cases, poison):
    """M in {0, some, all}, batch 1 and more, several lengths with one compilation."""
    batch = cases[0][0]
    step = compile_aten(trace(head, *inputs(batch, 6, 0.5, 0)), MosaicOptions(poison=poison, disable=("fuse",)))
    for _, length, share, seed in cases:
        arguments = inputs(batch if batch == 1 else batch + seed % 2, length, share, seed)
        for got, expected in zip(step(list(arguments)), head(*arguments), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=examples(14, 70))
@given(heads, shapes)
def test_rows_that_nobody_demands_may_hold_anything(head, case):
    """Soundness, checked on the original graph: overwrite with NaN, in every value that the analysis gives a
    demand, the rows outside of the demand; no output changes."""
    batch, length, share, seed = case
    arguments = inputs(batch, length, share, seed)
    module = CanonicalizePass()(trace(head, *inputs(batch, 6, 0.5, 0)))
    demands = analyse(module.graph)
    rewritten = RowDemandPass()(module)
    assert sum(n.target in MATMULS for n in rewritten.graph.nodes) == 1
    clean: dict[torch.fx.Node, object] = {}
    run_nodes(module, arguments, clean, lambda node, value: value)
    got = run_nodes(module, arguments, {}, lambda node, value: poisoned(clean, value, node, demands))
    for a, b in zip(got, head(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def run_nodes(module, arguments, values, change):
    """Interpret the graph; ``change(node, value)`` may replace each result."""
    feed = iter(arguments)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feed)
        elif node.op == "get_attr":
            values[node] = getattr(module, node.target)
        elif node.op == "output":
            return torch.fx.node.map_arg(node.args[0], values.__getitem__)
        else:
            args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = change(node, node.target(*args, **kwargs))
    raise AssertionError("no output")


def poisoned(values, value, node, demands):
    """The node's value with NaN (or -77) in rows that its conditions do not cover; moves are left alone."""
    if node not in demands.compact or not isinstance(value, torch.Tensor):
        return value
    demand = demands.of[node]
    if demand.moves or not demand.conditions:
        return value
    space = tuple(int(s.xreplace(_numbers(values))) for s in demand.space)
    needed = torch.zeros(space, dtype=torch.bool)
    for condition in demand.conditions:
        holds = torch.ones(space, dtype=torch.bool)
        for literal in condition:
            mask = values[literal.mask]
            gone = [d for d in range(mask.dim()) if d not in literal.kept]
            mask = mask.squeeze(gone) if gone else mask
            holds &= mask if literal.positive else ~mask
        needed |= holds
    labels = [label for label in demand.layout if label is not None]
    flat = needed.reshape(-1) if labels == [-1] else needed
    shape = [1] * value.dim()
    for dim, label in enumerate(demand.layout):
        if label is not None:
            shape[dim] = value.shape[dim]
    if sorted(labels) != labels or (labels != [-1] and len(labels) != len(space)):
        return value
    poison = float("nan") if value.dtype.is_floating_point else -77
    return torch.where(flat.reshape(shape), value, torch.tensor(poison, dtype=value.dtype))


def _numbers(values):
    found = {}
    for node, value in values.items():
        fake = ir.tensor_of(node)
        for size, number in zip(fake.shape if fake is not None else (), getattr(value, "shape", ()), strict=False):
            expr = ir.expr_of(size)
            if expr.is_Symbol:
                found[expr] = number
    return found


# --------------------------------------------------------------------------- rows computed, exactly
def rows_of_head(step) -> int:
    """Rows of the last matmul that ran (the LM head), from the sizes of the last call."""
    program = next(reversed(step._programs.values())).program
    sizes = program._binder.sizes
    for node in reversed(step.module.graph.nodes):
        if node in step.lives.loops and any(n.target in MATMULS for n in step.lives.loops[node].scope.nodes):
            return sizes(step.lives.loops[node].rows)
        if node.target in MATMULS:
            return sizes(ir.tensor_of(node).shape[0])
    raise AssertionError("no matmul")


class TinyLM(torch.nn.Module):
    """Two layers of attention and MLP over an embedding: enough of a dLLM to have a last layer."""

    def __init__(self, shift: bool) -> None:
        super().__init__()
        self.shift = shift
        self.embed = torch.nn.Embedding(20, 16)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(16, 16) for name in ("q", "k", "v", "o", "up", "down")})
            for _ in range(2)
        )
        self.head = torch.nn.Linear(16, 20, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            q, k, v = (layer[name](x).view(*x.shape[:2], 2, 8).transpose(1, 2) for name in "qkv")
            a = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + layer["o"](a.transpose(1, 2).reshape(x.shape))
            x = x + layer["down"](torch.relu(layer["up"](x)))
        logits = self.head(x)
        return torch.cat((logits[:, :1], logits[:, :-1]), 1) if self.shift else logits


@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
@pytest.mark.parametrize("batch", [1, 3])
def test_head_rows_equal_masked_rows_in_the_window(shift, batch):
    torch.manual_seed(0)
    step, steps = DenoisingStep(TinyLM(shift).eval(), MASK), []
    with torch.no_grad(), observing(steps.append):
        compiled = torch.compile(step, backend="mosaic", dynamic=True, fullgraph=True)
        for length, start, end, share in ((30, 5, 20, 0.5), (40, 0, 40, 1.0), (30, 4, 9, 0.0), (50, 10, 11, 1.0)):
            ids = torch.randint(4, 20, (batch, length))
            ids[torch.rand(batch, length) < share] = MASK
            window = block_window(length, start, end)
            arguments = ids, window, torch.full((batch,), 2)
            assert torch.equal(compiled(*arguments), step(*arguments))
            assert rows_of_head(steps[0]) == int(((ids == MASK) & window).sum())
    assert len(steps) == 1


@settings(max_examples=examples(2, 16), deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=12), st.booleans())
@example([228, 249, 112, 135, 94], False)  # a program is bound for fewer rows, and then for more again
def test_any_succession_of_numbers_of_rows(counts, poison):
    """One program serves fewer rows than it has room for, down to half as many."""
    torch._dynamo.reset()
    step, steps = DenoisingStep(TinyLM(False).eval(), MASK), []
    window, clean = block_window(300, 0, 300), torch.randint(4, 20, (1, 300))
    everything = torch.tensor([300])  # masked rows are all alike here: which two are the surest is a matter of rounding
    computed = []
    with torch.no_grad(), observing(steps.append):
        compiled = torch.compile(step, backend="mosaic", dynamic=True, options={"poison": poison})
        for rows in counts:
            ids = clean.clone()
            ids[0, torch.randperm(300)[:rows]] = MASK
            assert torch.equal(compiled(ids, window, everything), step(ids, window, everything))
            sizes = dict(steps[-1].plan.symbols)
            room = next(value for name, value in sizes.items() if value != 300)
            assert rows <= room <= 2 * capacity(rows)
            computed.append(rows_of_head(steps[-1]))
            # as many as in an earlier step, if those were no more than twice as many (or few), else just those
            assert computed[-1] == rows or (computed[-1] in computed[:-1] and rows < computed[-1] <= max(2 * rows, 32))


@pytest.mark.parametrize("chunk", [None, 50])
def test_falling_numbers_of_rows_share_programs(chunk):
    """As in generation: 300 needed rows, then fewer in each of 20 steps.  What runs in chunks is planned again, because
    fewer rows may do with larger ones."""
    step, steps, programs = DenoisingStep(TinyLM(False).eval(), MASK), [], []
    window, ids, everything = block_window(300, 0, 300), torch.full((1, 300), MASK), torch.tensor([300])
    with torch.no_grad(), observing(steps.append):
        compiled = torch.compile(step, backend="mosaic", dynamic=True, options={"chunk_rows": chunk})
        for rows in range(300, 0, -15):
            ids[0, rows:] = 7
            assert torch.equal(compiled(ids, window, everything), step(ids, window, everything))
            programs.append(len(steps[-1]._programs))
    assert programs[-1] <= 5 if chunk is None else programs[-1] > 5


def test_the_last_layer_runs_on_needed_rows_only():
    step = DenoisingStep(TinyLM(False).eval(), MASK)
    ids = torch.randint(4, 20, (1, 33))
    ids[:, ::3] = MASK
    report = mosaic_compiler.explain(step, ids, block_window(33, 0, 33), torch.tensor([2]))
    shrunk = {decision.module.removeprefix("model.") for decision in report.rows}
    attention = {"model", ""}  # the attention itself runs in no submodule
    assert shrunk - attention == {"layers.1.q", "layers.1.o", "layers.1.up", "layers.1.down", "head"}
    assert any("attention" in decision.node for decision in report.rows)
    assert "M" in str(report)
    assert "where" in report.rows[-1].consumer


def test_classifier_free_guidance():
    """The batch is doubled, and the halves of the logits are combined: twice the masked rows."""
    model = TinyLM(False).eval()

    def step(ids, prompt):
        masked = ids == MASK
        both = torch.cat((ids, torch.where(prompt, MASK, ids)))
        logits, without = model(both).chunk(2)
        token = (without + 2.5 * (logits - without)).argmax(-1)
        return torch.where(masked, token, ids)

    for batch in (1, 2):
        steps = []
        with torch.no_grad(), observing(steps.append):
            compiled = torch.compile(step, backend="mosaic", dynamic=True)
            ids = torch.randint(4, 20, (batch, 25))
            ids[:, 9:] = MASK
            prompt = (torch.arange(25) < 9).expand_as(ids)
            assert torch.equal(compiled(ids, prompt), step(ids, prompt))
            assert rows_of_head(steps[0]) == 2 * batch * 16
        torch._dynamo.reset()


def test_boolean_indexing_captured_with_dynamic_shapes():
    """Dream's own style: ``logits[mask]``, sampler on the picked rows, results written back."""
    model = TinyLM(True).eval()

    def step(ids):
        masked = ids == MASK
        picked = model(ids)[masked]
        return torch.softmax(picked, -1).max(-1)

    steps = []
    with (
        torch.no_grad(),
        observing(steps.append),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
    ):
        compiled = torch.compile(step, backend="mosaic", dynamic=True, fullgraph=True)
        for length in (20, 31):
            ids = torch.randint(4, 20, (2, length))
            ids[:, ::2] = MASK
            for got, expected in zip(compiled(ids), step(ids), strict=True):
                torch.testing.assert_close(got, expected)
            assert rows_of_head(steps[0]) == int((ids == MASK).sum())


def test_masked_select_is_an_index():
    model = TinyLM(False).eval()

    def step(ids):
        masked = ids == MASK
        logits = model(ids)
        return torch.masked_select(logits.argmax(-1), masked)

    steps = []
    dynamic = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with torch.no_grad(), observing(steps.append), dynamic:
        compiled = torch.compile(step, backend="mosaic", dynamic=True, fullgraph=True)
        ids = torch.randint(4, 20, (2, 21))
        ids[:, ::2] = MASK
        assert torch.equal(compiled(ids), step(ids))
        assert rows_of_head(steps[0]) == int((ids == MASK).sum())


def test_two_masks_compute_their_union():
    def f(h, w, ids):
        logits = h @ w
        return torch.where(ids == 3, logits.argmax(-1), ids), torch.where(ids == 4, logits.amax(-1), 0.0)

    arguments = inputs(2, 9, 0.5, 1)
    step = compile_aten(trace(f, *arguments), MosaicOptions(disable=("fuse",)))
    for got, expected in zip(step(list(arguments)), f(*arguments), strict=True):
        torch.testing.assert_close(got, expected)
    assert rows_of_head(step) == int(((arguments[2] == 3) | (arguments[2] == 4)).sum())


# ------------------------------------------------------------------------------- what must not be
def untouched(f, *arguments) -> tuple:
    module, _ = run_passes(trace(f, *arguments), disable=("fuse",))
    assert not any(ir.BINDS in node.meta for node in module.graph.nodes)
    got, expected = module(*[a.clone() for a in arguments]), f(*arguments)
    torch.testing.assert_close(got, expected)
    return module.meta["row_decisions"]


def test_returned_logits_stay_whole_and_the_consumer_is_named():
    def f(h, w, ids):
        logits = h @ w
        return torch.where(ids == 3, logits.argmax(-1), ids), logits

    (decision,) = untouched(f, *inputs(1, 9, 0.5, 1))
    assert decision.rows == decision.total
    assert decision.consumer.startswith("output")


def toy_logits(ids, table, head):
    return torch.nn.functional.embedding(ids, table) @ head


CAUSES = {
    "output": lambda ids, *w: toy_logits(ids, *w).float() * 2,
    "where": lambda ids, *w: (lambda p: torch.where(p > 0.9, p, 0.0))(toy_logits(ids, *w).amax(-1)),
    "mean": lambda ids, *w: toy_logits(ids, *w).amax(-1).mean(),
    "topk": lambda ids, *w: toy_logits(ids, *w).amax(-1).topk(2, -1)[1],
    "max.dim": lambda ids, *w: torch.where(ids == MASK, toy_logits(ids, *w).max(1)[0][:, :1].expand_as(ids), 0.0),
    "cumsum": lambda ids, *w: torch.where((ids == MASK)[..., None], toy_logits(ids, *w).relu().cumsum(1), 0.0),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_op_to_blame_is_named_however_far_behind_the_product(cause):
    weights = torch.randn(9, 4), torch.randn(4, 9)
    graph = trace(CAUSES[cause], torch.randint(0, 9, (2, 7)), *weights, dynamic=[(0, 1)])
    (decision,) = RowDemandPass()(CanonicalizePass()(graph)).meta["row_decisions"]
    assert decision.rows == decision.total
    assert cause in decision.consumer


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("move", ["last", "tail", "step", "sample"])
def test_a_returned_slice_has_the_strides_of_eager(move, batch):
    def f(h, w):
        return MOVES[move](h @ w)

    h, w, _ = inputs(batch, 9, 0.5, 1)
    step = compile_aten(trace(f, h, w), MosaicOptions(disable=("fuse",)))
    (got,), expected = step([h, w]), f(h, w)
    torch.testing.assert_close(got, expected)
    long = [dim for dim, size in enumerate(expected.shape) if size > 1]
    assert [got.stride(dim) for dim in long] == [expected.stride(dim) for dim in long]


def test_a_mask_that_depends_on_the_logits_is_a_sound_fallback():
    def f(h, w, ids):
        logits = h @ w
        confident = torch.softmax(logits, -1).amax(-1) > 0.3
        return torch.where(confident, logits.argmax(-1), ids)

    assert untouched(f, *inputs(1, 9, 0.5, 1))


def test_mask_over_features_demands_everything():
    def f(h, w, ids):
        logits = h @ w
        return torch.where(torch.arange(logits.shape[-1]) > 3, logits, 0.0)

    untouched(f, *inputs(1, 9, 0.5, 1))


def test_random_noise_keeps_its_stream():
    """Gumbel noise over all logits must be drawn as eager draws it, so the logits are computed in full."""

    def f(h, w, ids):
        logits = h @ w
        return torch.where(ids == 3, (logits + torch.rand_like(logits)).argmax(-1), ids)

    arguments = inputs(1, 9, 0.5, 1)
    step = compile_aten(trace(f, *arguments), MosaicOptions(disable=("fuse",)))
    torch.manual_seed(5)
    (got,) = step(list(arguments))
    torch.manual_seed(5)
    assert torch.equal(got, f(*arguments))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_noise_on_selected_rows_is_drawn_for_them_only():
    def step(x, w, ids):
        logits = (x @ w)[ids == MASK]
        return (logits - torch.log(-torch.log(torch.rand_like(logits)))).argmax(-1)

    inputs = torch.randn(64, 8), torch.randn(8, 50), torch.randint(0, 6, (64,))
    torch.manual_seed(0)
    report = mosaic_compiler.explain(step, *inputs)
    torch.manual_seed(0)
    assert torch.equal(report.result, step(*inputs))
    assert report.rows[0].rows == "M"


def test_a_maximum_over_rows_is_no_pointwise_op():
    def f(x):
        return ((x @ x.t()).max(0)[0].unsqueeze(1) * x) @ x.t()

    compiled = torch.compile(f, backend="mosaic", dynamic=True)
    for n in (5, 9):
        x = torch.randn(n, 4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), f(x))


def test_bad_masks_and_indices_are_the_errors_of_eager():
    compiled = torch.compile(lambda h, w, i: (h @ w).index_select(1, i).relu(), backend="mosaic", dynamic=True)
    h, w, _ = inputs(1, 9, 0.5, 1)
    with torch.no_grad():
        good = compiled(h, w, torch.tensor([8, 0]))
        assert torch.equal(good, (h @ w).index_select(1, torch.tensor([8, 0])).relu())
        with pytest.raises((IndexError, RuntimeError), match=r"(?i)(index|out of)"):
            compiled(h, w, torch.tensor([9, 0]))
        with pytest.raises(Exception, match=r"(?i)(size|shape|broadcast)"):
            torch.compile(lambda h, w, m: torch.where(m, (h @ w).argmax(-1), 0), backend="mosaic", dynamic=True)(
                h, w, torch.ones(1, 8, dtype=torch.bool)
            )
        assert torch.equal(compiled(h, w, torch.tensor([8, 0])), good)


# ----------------------------------------------------------------------------------- a real model
@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 8192])
def test_planned_peak_falls_fivefold_on_tiny_llada(tiny_llada, genesis, monkeypatch, length):
    """5 % masked."""
    ids = torch.cat((genesis, genesis), 1)[:, :length].clone()
    generator = torch.Generator().manual_seed(0)
    ids[torch.rand(ids.shape, generator=generator) < 0.05] = MASK
    arguments = ids, block_window(length, 0, length), torch.tensor([50])
    step, plans = DenoisingStep(tiny_llada, MASK), {}
    torch.set_num_threads(2)
    for name in ("with", "without"):
        monkeypatch.setenv("MOSAIC_DISABLE", "row-demand" if name == "without" else "")
        report = mosaic_compiler.explain(step, *arguments)
        plans[name] = report.plan.peak
        if name == "with":
            with torch.no_grad():
                assert torch.equal(report.result, step(*arguments))
    assert plans["without"] >= 5 * plans["with"]
    monkeypatch.delenv("MOSAIC_DISABLE")
    tiled = mosaic_compiler.explain(step, *arguments, vocabulary_tile=1024)
    assert torch.equal(tiled.result, report.result)
    rows = int((ids == MASK).sum())
    assert not [b for b in tiled.plan.buffers if b.nbytes >= rows * 8192 * 4 and b.shape[-1:] == (8192,)]
    assert tiled.plan.peak <= plans["with"]


@pytest.mark.parametrize("cut", ["mask", "slice"])
def test_causal_attention_runs_on_all_rows(cut):
    """A causal query's keys depend on where it stands among all of them."""

    def f(x, w, mask):
        heads = x.view(1, -1, 2, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).reshape(-1, 16)
        logits = y @ w
        return torch.where(mask, logits.argmax(-1), -1) if cut == "mask" else logits[-3:].argmax(-1)

    x, w = torch.randn(11, 16), torch.randn(16, 40)
    mask = torch.arange(11) % 3 == 1
    step = compile_aten(trace(f, x, w, mask, dynamic=[(0,), (), (0,)]), MosaicOptions(disable=("fuse",)))
    assert torch.equal(step([x, w, mask])[0], f(x, w, mask))
    assert any(decision.rows != decision.total for decision in step.module.meta["row_decisions"])


@pytest.mark.parametrize("reader", ["where", "slice"])
def test_rows_whose_width_no_input_has_are_computed_whole(reader):
    """A scattered or picked row needs to be told its width; 0.7 of a size is arithmetic of floats."""

    def f(x, w, mask):
        y = F.silu(x @ w[:, : int(w.shape[1] * 0.7)])
        return torch.where(mask[:, None], y, 0.0) if reader == "where" else y[-5:].clone()

    step = torch.compile(f, backend="mosaic", dynamic=True, options={"disable": ("fuse",)})
    for n, width in ((50, 20), (9, 31)):
        x, w, mask = torch.randn(n, 20), torch.randn(20, width), torch.arange(n) % 3 == 1
        torch.testing.assert_close(step(x, w, mask), f(x, w, mask))
    (decision,) = mosaic_compiler.explain(step, x, w, mask).rows
    assert decision.rows == decision.total


@pytest.mark.parametrize("shape", [(17,), (2, 9)])
def test_picked_rows_of_transposed_features_have_the_strides_of_eager(shape):
    def f(x, w, mask):
        return torch.relu(x @ w).unflatten(-1, (2, 4)).transpose(-1, -2)[mask]

    mask = torch.arange(shape[-1]).expand(shape) % 3 == 1
    x, w = torch.randn(*shape, 8), torch.randn(8, 8)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        step = torch.compile(f, backend="mosaic", dynamic=True, options={"disable": ("fuse",)})
        got, expected = step(x, w, mask), f(x, w, mask)
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride()


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[None][0],
        lambda x: x[None, None][0, 0],
        lambda x: x.view(x.shape[0], 2, -1)[:, 1],
        lambda x: torch.stack((x, x * 2))[1],
        lambda x: x[None][:, torch.arange(x.shape[0], device=x.device)[:, None].flip(0)][0, :, 0],
        lambda x: x[torch.arange(4)[:, None] + torch.arange(x.shape[0] // 4)].flatten(0, 1),
    ],
)
@pytest.mark.parametrize("options", [{}, {"poison": True, "chunk_rows": 2}])
def test_rows_of_a_part_have_the_part_s_dims(part, options):
    """``x[0]`` of [1, N, D] has one dim less, and so have the rows of it that somebody reads."""

    def f(x, w, head, mask):
        h = part(torch.relu(x @ w))
        return torch.where(mask, (torch.relu(h @ head[: h.shape[1]]) @ head[:7].t()).amax(-1), 0.0)

    x, w, head, mask = torch.randn(12, 8), torch.randn(8, 8), torch.randn(8, 8), torch.arange(12) % 3 == 0
    compiled = torch.compile(f, backend="mosaic", dynamic=True, options={**options, "strict": False})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, w, head, mask), f(x, w, head, mask), rtol=1e-4, atol=1e-4)
