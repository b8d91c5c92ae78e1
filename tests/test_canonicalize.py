"""canonicalize and in-place on toy graphs: what is rewritten, and what must not be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mosaic_compiler.passes import CanonicalizePass, InPlacePass, run_passes, trace
from mosaic_compiler.passes.constants import constant_of

aten = torch.ops.aten


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def rewritten(f, *args, **options):
    module = CanonicalizePass()(trace(f, *args, **options))
    for got, expected in zip(_flat(module(*args)), _flat(f(*args)), strict=True):
        assert torch.equal(got, expected)
    return targets(module)


def _flat(value):
    return value if isinstance(value, (tuple, list)) else (value,)


X = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: x[:].view(x.shape).detach() + 1, [aten.add.Tensor]),
        (lambda x: (x.exp(), x.neg())[1], [aten.neg.default]),
        (lambda x: (x + 1) * (x + 1), [aten.add.Tensor, aten.mul.Tensor]),
        (lambda x: x.float() * 2, [aten.mul.Tensor]),
        (lambda x: x.clone() * 2, [aten.mul.Tensor]),
        (lambda x: x.clone(), [aten.clone.default]),
        (lambda x: (x + 1, x + 1), [aten.add.Tensor, aten.add.Tensor]),
        (lambda x: torch.rand_like(x) + torch.rand_like(x), [aten.rand_like.default] * 2 + [aten.add.Tensor]),
        (lambda x: x + 0, [aten.add.Tensor]),
    ],
    ids=["noop-views", "dead", "common", "cast", "noop-clone", "clone-out", "both-out", "random", "float-add-0"],
)  # fmt: skip
def test_rewrites(f, expected):
    if aten.rand_like.default in expected:
        assert targets(CanonicalizePass()(trace(f, X))) == expected
    else:
        assert rewritten(f, X) == expected


def test_cat_with_nothing_goes():
    assert rewritten(lambda x: torch.cat([torch.empty(0), x]) * 2, X) == [aten.mul.Tensor]
    assert rewritten(lambda x: torch.cat([x[:0], x.t().contiguous().t(), x[:0]]) * 2, X).count(aten.cat.default) == 0
    assert aten.cat.default in rewritten(lambda x: torch.cat([x, x]) * 2, X)
    assert rewritten(lambda x: torch.cat([torch.empty(0), x]), X) == [aten.clone.default]  # the caller's own copy


def test_memory_that_is_written_slice_by_slice_is_a_cat():
    def turned(memory, dim, first):
        def f(x):
            made, rest = memory(x), x.shape[dim] - first
            made.narrow(dim, first, rest).copy_(x.narrow(dim, 0, rest))
            made.narrow(dim, 0, first).copy_(x.narrow(dim, rest, first))
            return made * 2

        return f

    for dim, first in ((-1, 4), (0, 1)):
        for memory in (torch.empty_like, torch.zeros_like):
            got = rewritten(torch.func.functionalize(turned(memory, dim, first)), X, dynamic=[()])
            assert aten.cat.default in got
            assert aten.slice_scatter.default not in got

    def overlap(x):
        made = torch.zeros_like(x)
        made[:, :5] = x[:, :5]
        made[:, 4:] = x[:, 4:] + 1
        return made

    def hole(x):
        made = torch.zeros_like(x)
        made[:, :3] = x[:, :3]
        made[:, 4:] = x[:, 4:] + 1
        return made

    for function in (overlap, hole):
        assert aten.cat.default not in rewritten(torch.func.functionalize(function), X, dynamic=[()])


def test_keys_and_values_are_not_copied_for_their_layout():
    q = torch.randn(1, 5, 2, 8)  # [B, N, H, d]

    def attention(q):
        q = q.transpose(1, 2)
        return F.scaled_dot_product_attention(q, (q * 2).contiguous(), (q + 1).contiguous())

    assert aten.clone.default not in rewritten(attention, q)


def test_integer_plus_zero_goes():
    assert rewritten(lambda i: (i + 0) * 2, torch.arange(5)) == [aten.mul.Tensor]


def test_constants_of_different_type_are_not_merged():
    assert rewritten(lambda x: (x + 1) * (x + 1.0), X).count(aten.add.Tensor) == 2
    assert rewritten(lambda x: (x * 0.0) + (x * -0.0), X).count(aten.mul.Tensor) == 2


def test_embedding_becomes_index_select():
    found = rewritten(lambda ids, w: F.embedding(ids, w) * 2, torch.randint(0, 9, (2, 5)), torch.randn(9, 4))
    assert aten.index_select.default in found
    assert aten.embedding.default not in found


def attention(q, k, v, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


def attention_node(module):
    return next(n for n in module.graph.nodes if "attention" in str(n.target))


@pytest.mark.parametrize(
    ("mask", "dropped"),
    [
        (lambda q: torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool), True),
        (lambda q: torch.zeros(q.shape[-2], q.shape[-2]), True),
        (lambda q: torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).logical_not().logical_not(), True),
        (lambda q: torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(), False),
        (lambda q: torch.ones(q.shape[-2], q.shape[-2]), False),
    ],
)
def test_attention_masks(mask, dropped):
    def f(q, k, v):
        return attention(q, k, v, attn_mask=mask(q))

    arguments = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    module = CanonicalizePass()(trace(f, *arguments))
    assert (attention_node(module).kwargs.get("attn_mask") is None) == dropped
    assert torch.allclose(module(*arguments), f(*arguments), atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_repeated_key_value_heads_are_folded(heads):
    def repeat(x):
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 4 // heads, n, d).reshape(b, 4, n, d)

    def f(q, k, v):
        return attention(q, repeat(k), repeat(v))

    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, heads, 9, 8), torch.randn(2, heads, 9, 8)
    module = CanonicalizePass()(trace(f, q, k, v))
    node = attention_node(module)
    if heads in (2,):
        assert [n.op for n in node.args[:3]] == ["placeholder"] * 3
    q, k, v = torch.randn(3, 4, 7, 8), torch.randn(3, heads, 7, 8), torch.randn(3, heads, 7, 8)
    assert torch.equal(module(q, k, v), f(q, k, v))


def test_heads_repeated_in_tile_order_are_not_folded():
    """tile gives heads 0 1 0 1, grouped attention means 0 0 1 1."""

    def f(q, k, v):
        b, h, n, d = k.shape
        wide = [x[:, None].expand(b, 2, h, n, d).reshape(b, 4, n, d) for x in (k, v)]
        return attention(q, *wide)

    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    module = CanonicalizePass()(trace(f, q, k, v))
    assert torch.allclose(module(q, k, v), f(q, k, v), atol=1e-6)


# ---------------------------------------------------------------------------------------- in-place
def in_place(f, *args):
    module, _ = run_passes(trace(f, *args), disable=("chunk-loops", "fuse"))
    fresh = [a.clone() for a in args]
    for got, expected in zip(_flat(module(*fresh)), _flat(f(*args)), strict=True):
        assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(fresh, args, strict=True))
    return [t for t in targets(module) if "out" in t._overloadname or t._schema.name.endswith("_")]


W = torch.randn(6, 6)


@pytest.mark.parametrize(
    ("f", "writes"),
    [
        (lambda x, w: (x @ w) * 2, 1),
        (lambda x, w: (x @ w).relu().neg().exp(), 3),
        (lambda x, w: x * 2, 0),  # x is an input
        (lambda x, w: (lambda a: (a * 2, a))(x @ w), 0),  # a is returned
        (lambda x, w: (lambda a: a * 2 + a)(x @ w), 1),  # only the addition may overwrite
        (lambda x, w: (lambda a: a + a.flip(0))(x @ w), 1),
        (lambda x, w: (lambda a: a + a.t())(w @ w), 0),  # reads a through another view
        (lambda x, w: (x @ w) > 0, 0),  # another dtype
        (lambda x, w: (x @ w)[:, :3] * 2, 0),  # part of a larger buffer
        (lambda x, w: (x @ w)[:, :1].expand(4, 6) * 2, 0),  # overlapping elements
        (lambda x, w: torch.softmax(x @ w, -1), 0),  # not pointwise
        (lambda x, w: (x @ w).masked_fill(x > 0, 1.0), 1),  # through the in-place twin
        (lambda x, w: (x @ w) + (x @ w.t()), 1),
    ],
)
def test_in_place(f, writes):
    assert len(in_place(f, X, W)) == writes


def test_in_place_alone_on_a_toy_graph():
    module = InPlacePass()(trace(lambda x: (x * 2 + 1).sin(), X))
    assert targets(module) == [aten.mul.Tensor, aten.add.out, aten.sin.out]
    assert torch.equal(module(X), (X * 2 + 1).sin())


def ranked(x):
    """Positions among 8, as a mixture of experts ranks them."""
    return x.topk(2, -1).indices


RANGES = {
    "topk": (lambda x: ranked(x) >= 8, False),
    "sorted": (lambda x: ranked(x).flatten().sort().values.unsqueeze(-1) >= 8, False),
    "below": (lambda x: ranked(x).int() < 8, True),
    "not below 0": (lambda x: x.argmax(-1, keepdim=True) >= 0, True),
    "equal to none": (lambda x: x.argsort(-1)[:, :1] == 8, False),
    "another one": (lambda x: x.max(-1, keepdim=True).indices != -1, True),
    "one of them": (lambda x: ranked(x) == 3, None),
    "too large": (lambda x: ranked(x) >= 7, None),
    "along rows": (lambda x: x.topk(2, 0).indices >= 8, None),
    "of values": (lambda x: x.topk(2, -1).values.long() >= 8, None),
    "wraps around": (lambda x: (ranked(x) * 100).to(torch.int8) >= 0, None),
}


@pytest.mark.parametrize("name", RANGES)
def test_comparisons_that_the_range_of_positions_decides(name):
    function, known = RANGES[name]
    module = trace(function, torch.randn(6, 8), dynamic=[(0,)])
    (result,) = module.graph.output_node().all_input_nodes
    assert constant_of(result) is known
    if known is not None:
        assert bool((function(torch.randn(50, 8)) == known).all())


def test_a_fill_under_a_mask_that_is_false_everywhere_goes():
    def f(x, y):
        mask = (ranked(x).sort(-1).values >= 8).any(-1, keepdim=True)
        narrow = ranked(x)[:, :1] >= 8
        return (y * 2).masked_fill(narrow, 0.0) + 1, (y * 3).masked_fill(mask, 0.0)

    x, y = torch.randn(6, 8), torch.randn(6, 4)
    module = CanonicalizePass()(trace(f, x, y, dynamic=[(0,), (0,)]))
    assert [n.target for n in module.graph.nodes].count(torch.ops.aten.masked_fill.Scalar) == 1
    torch.testing.assert_close(module(x, y), f(x, y))
