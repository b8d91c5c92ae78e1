"""Ops that look at storages, rows that are there by chance, tensors that are returned twice.  Found by random
programs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

VARIANTS = [{}, {"poison": True, "chunk_rows": 2}, {"disable": ["canonicalize"]}]


def check(function, *inputs, lengths=(6, 9), **options):
    compiled = torch.compile(function, backend="mosaic", dynamic=True, options=options)
    for n in lengths:
        mine, theirs = ([given(n) for given in inputs] for _ in range(2))
        with torch.no_grad():
            got, expected = compiled(*mine), function(*theirs)
        torch.testing.assert_close((got, mine), (expected, theirs), rtol=1e-5, atol=1e-6, equal_nan=True)


def numbers(n):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(n))


def whole(n):
    return torch.arange(n) * 7


def diagonal(x):
    scores = x @ x.t()
    scores.diagonal().fill_(float("-inf"))
    return scores.softmax(-1) @ x


def strided(x):
    return torch.as_strided(torch.roll(x, 1, 0) @ x.t() + 1, (3, 2), (2, 1), 0).sum() + x.sum()


def strided_views_of_views(x):
    part = torch.as_strided(x.clone(), (2, 2), (2, 1), 0)
    return part.as_strided(size=(4,), stride=(2,), storage_offset=0), part + 1


def strided_copies(x):
    return torch.as_strided(x[2:].clone(), (2, 2), (2, 1), 0), torch.as_strided(x[2:].contiguous(), (2, 2), (2, 1), 4)


def strided_writes(x):
    y = x * 2
    torch.as_strided(y, (2, 2), (2, 1), 1).mul_(3)
    return y, y.sum()


def features_gathered(x, i):
    """A gather of one column is no gather of rows."""
    y = x @ x.t()
    picked = y.gather(0, (i % y.shape[0]).unsqueeze(-1))
    return picked, picked.index_select(0, i % y.shape[0])


def squeezed(x):
    """The last chunk of 9 rows by 2 has one row."""
    return (x.squeeze(0) @ x.flip(0).t()).squeeze(), x.squeeze(0).relu() @ x.t()


def attended(x):
    q = x[None, None]
    return F.scaled_dot_product_attention(q, q, q).squeeze(0).squeeze(), (x * 2).unsqueeze(0).squeeze()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "function",
    [diagonal, strided, strided_views_of_views, strided_copies, strided_writes, squeezed, attended],
    ids=lambda f: f.__name__,
)
def test_storages(function, options):
    check(function, numbers, **options)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_features_are_no_rows(options):
    check(features_gathered, numbers, whole, **options)


@pytest.mark.parametrize("disable", [[], ["canonicalize"]])
def test_two_results_are_two_tensors(disable):
    def f(x):
        y = x * 2
        return y, y.view(y.shape), x.view(x.shape), y[1:], y[1:]

    x = numbers(6)
    results = torch.compile(f, backend="mosaic", dynamic=True, options={"disable": disable})(x)
    assert len({id(result) for result in (x, *results)}) == 6
    assert results[0].data_ptr() == results[1].data_ptr()
    assert results[2].data_ptr() == x.data_ptr()


LAZY = {
    "imag of conj": lambda z: z.conj().imag + 1,
    "neg view": lambda z: torch._neg_view(z.real) * 2 + 1,
    "neg view of a computed value": lambda z: torch._neg_view(z.real * 2 + 1).relu() + 1,
    "resolved": lambda z: torch.view_as_real(z.conj().resolve_conj()) * 2,
    "resolve_neg": lambda z: torch._neg_view(z.real).resolve_neg() + z.real,
    "product": lambda z: torch._neg_view(z.real) @ z.real.t(),
    "returned": lambda z: (z.conj(), torch._neg_view(z.real * 2)),
    "clone": lambda z: torch._neg_view(z.real * 2).clone() + 1,
    "in place": lambda z: torch._neg_view(z.real * 2).add(1).mul(3).sum(-1),
}


@pytest.mark.fuse
@pytest.mark.parametrize("disable", [[], ["fuse"]])
@pytest.mark.parametrize("name", LAZY)
def test_lazy_bits(name, disable):
    z = torch.randn(6, 8, dtype=torch.complex64)
    compiled = torch.compile(LAZY[name], backend="mosaic", dynamic=True, options={"disable": disable, "poison": True})
    with torch.no_grad():
        torch.testing.assert_close(compiled(z), LAZY[name](z), rtol=1e-5, atol=1e-5)


@pytest.mark.fuse
def test_an_input_gets_lazy_bits_after_it_was_compiled():
    compiled = torch.compile(lambda x: x * 2 + 1, backend="mosaic", dynamic=True)
    x = numbers(6)
    for given in (x, torch._neg_view(x), x):
        torch.testing.assert_close(compiled(given), given * 2 + 1)


SCALARS = {
    "index_select": lambda x: torch.index_select(x.sum(), 0, torch.tensor([0])) * 2,
    "gather": lambda x: torch.gather(x.sum(), 0, torch.tensor(0)) * 2,
    "gather by a number": lambda x: torch.gather(x.sum(-1), 0, torch.tensor(1)) * 2,
    "take_along_dim": lambda x: torch.take_along_dim(x.sum(), torch.tensor([0])) * 2,
    "index": lambda x: x.sum()[None][torch.tensor([0])] * 2,
    "index_add": lambda x: x.sum().index_add(0, torch.tensor([0]), x[0, 0]) * 2,
    "index_copy": lambda x: x.sum().index_copy(0, torch.tensor([0]), x[0, 0]) * 2,
    "index_fill": lambda x: x.sum().index_fill(0, torch.tensor([0]), 3.0) * 2,
    "scatter": lambda x: x.sum().scatter(0, torch.tensor(0), 1.0) * 2,
    "softmax": lambda x: torch.softmax(x.sum(), 0) * 2,
    "sort": lambda x: x.sum().sort().values * 2,
    "max": lambda x: x.sum().max(0).values * 2,
    "cumsum": lambda x: x.sum().cumsum(0) * 2,
    "flip": lambda x: x.sum().flip(()) * 2,
    "squeeze": lambda x: x.sum().squeeze() * 2,
    "squeeze dim": lambda x: x.sum().squeeze(0) * 2,
    "select of one": lambda x: x.sum().unsqueeze(0)[0] * 2,
}


@pytest.mark.parametrize("name", SCALARS)
def test_numbers_have_no_rows(name):
    for options in ({}, {"poison": True, "chunk_rows": 2}):
        check(SCALARS[name], numbers, **options)
        torch._dynamo.reset()


@pytest.mark.parametrize("backed", [True, False])
def test_sizes_without_a_hint(backed):
    def f(z):
        return (z @ z.t()).softmax(-1) @ z, z * 2 + 1, z.shape[0] * 2

    import mosaic_compiler
    from mosaic_compiler.backend import observing

    z, steps = torch.randn(6, 16), []
    if not backed:
        torch._dynamo.decorators.mark_unbacked(z, 0)
    fast = torch.compile(f, backend="mosaic", dynamic=True if backed else None, options={"poison": True})
    with torch.no_grad(), observing(steps.append):
        torch.testing.assert_close(fast(z), f(z), rtol=1e-4, atol=1e-5)
        for n in (9, 40):
            other = torch.randn(n, 16)
            if not backed:
                torch._dynamo.decorators.mark_unbacked(other, 0)
            torch.testing.assert_close(fast(other), f(other), rtol=1e-4, atol=1e-5)
    assert len(steps) == 1
    assert not [fallback for fallback in steps[0].fallbacks if fallback.name == "data-dependent-size"]
    assert steps[0].plan.of_kind("arena")
    assert mosaic_compiler.release_memory() >= 0
