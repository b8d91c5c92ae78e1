"""What opaque ops return is held against their schemas and fake kernels."""

from __future__ import annotations

import pytest
import torch
from undeclared import define

import mosaic_compiler
from mosaic_compiler.errors import CaptureError

library = torch.library.Library("watched", "FRAGMENT")
saved: list[torch.Tensor] = []


def _saves(x):
    saved.append(x)
    return x.clone()


define(library, "same(Tensor x) -> Tensor", lambda x: x, torch.empty_like)
define(library, "view(Tensor x) -> Tensor", lambda x: x[1:], lambda x: torch.empty_like(x[1:]))
define(
    library,
    "twice(Tensor x) -> (Tensor, Tensor)",
    lambda x: (y := x + 1, y.view_as(y)),
    lambda x: (torch.empty_like(x), torch.empty_like(x)),
)
define(
    library, "in_two(Tensor[] x) -> Tensor[]", lambda x: [x[0], x[1] * 2], lambda x: [torch.empty_like(t) for t in x]
)
define(library, "if_positive(Tensor x) -> Tensor", lambda x: x if float(x.sum()) > 0 else x.clone(), torch.empty_like)
define(library, "dense(Tensor x) -> Tensor", lambda x: (x * 2).contiguous(), torch.empty_like)
define(library, "saves(Tensor x) -> Tensor", _saves, torch.empty_like)

define(library, "flat(Tensor x) -> Tensor", lambda x: (x * 2).flatten(), torch.empty_like)

define(library, "negated(Tensor x) -> Tensor", lambda x: torch._neg_view(x * 2), torch.empty_like)
define(
    library,
    "nested(Tensor x) -> (Tensor, Tensor[])",
    lambda x: (x * 2, [x + 1, x + 2]),
    lambda x: (torch.empty_like(x), [torch.empty_like(x), torch.empty_like(x)]),
)

ops = torch.ops.watched


def returns_its_argument(x):
    y = ops.same(x @ x)
    return y @ ((x.exp() @ x) @ x)


def returns_a_view(x):
    y = ops.view(x @ x)
    return y @ ((x.exp() @ x) @ x)


def returns_an_input(x):
    return (ops.same(x) - 0.5).relu() * 2, ops.same(x), x * 1


def returns_one_result_twice(x):
    one, two = ops.twice(x @ x)
    one = one.relu() * 2
    return one @ x, two


def returns_one_of_a_list(x):
    one, two = ops.in_two([x @ x, x + 1])
    other = (x.exp() @ x) @ x
    return one @ other, two


def returns_another_layout(x):
    return (ops.dense((x @ x)[:, :5].t()) + 1).sum(0), torch.relu(ops.dense((x @ x)[:, :5].t()))


CASES = {
    returns_its_argument: "undeclared-alias",
    returns_a_view: "undeclared-alias",
    returns_an_input: "undeclared-alias",
    returns_one_result_twice: "undeclared-alias",
    returns_one_of_a_list: "undeclared-alias",
    returns_another_layout: "undeclared-layout",
}


def check(function, **options):
    x = torch.rand(8, 8)
    report = mosaic_compiler.explain(function, x.clone(), **options)
    torch.testing.assert_close(report.result, function(x.clone()), rtol=1e-4, atol=1e-4)
    return report


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_it_is_copied_and_named(function, poison):
    report = check(function, poison=poison)
    assert CASES[function] in [fallback.name for fallback in report.fallbacks]


@pytest.mark.fuse
def test_results_that_are_to_be_negated_when_they_are_read():
    report = check(lambda x: ops.negated(x * 2).exp() + 1)
    assert "undeclared-layout" in [fallback.name for fallback in report.fallbacks]


def test_a_list_among_other_results_is_an_error():
    def f(x):
        one, (two, three) = ops.nested(x @ x)
        return one + two + three

    with pytest.raises(Exception, match="returns a list among other results"):
        check(f)


@pytest.mark.fuse
def test_kernels_read_the_layout_that_they_were_compiled_for():
    check(returns_another_layout)


def test_a_fake_kernel_that_is_wrong_about_dims_is_an_error():
    with pytest.raises(CaptureError, match=r"watched.flat.*fake kernel says 2 dims"):
        check(lambda x: ops.flat(x @ x) + 1)


def test_it_is_an_error_in_strict_mode():
    with pytest.raises(Exception, match=r"strict mode: .*same"):
        check(returns_its_argument, strict=True)


def test_ops_that_decide_by_their_data_are_looked_at_in_every_call():
    def f(x):
        return ops.if_positive(x @ x) @ ((x.exp() @ x) @ x)

    fast = torch.compile(f, backend="mosaic", dynamic=True)
    for sign in (-1, 1, -1, 1):
        x = torch.rand(8, 8)
        x[0] *= sign * 100
        torch.testing.assert_close(fast(x), f(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [torch.unsafe_chunk, torch.unsafe_split, torch.unsafe_split_with_sizes])
@pytest.mark.parametrize("disable", [[], ["canonicalize"]])
def test_unsafe_splits_are_views(split, disable):
    sizes = {torch.unsafe_chunk: 2, torch.unsafe_split: 4, torch.unsafe_split_with_sizes: [4, 4]}[split]

    def f(x):
        one, two = split(x @ x, sizes, 0)
        other = (x.exp() @ x) @ x
        return one @ other, two @ other

    assert not [b for b in check(f, disable=disable).fallbacks if b.name == "undeclared-alias"]


def test_an_op_that_keeps_its_argument_keeps_its_bytes_only():
    saved.clear()
    check(lambda x: ops.saves(x @ x) @ x)
    assert all(tensor.untyped_storage().nbytes() == 256 for tensor in saved)


@pytest.mark.parametrize("op", [ops.view, ops.same])
def test_a_part_is_copied_with_the_memory_around_it(op):
    """``as_strided`` of it counts from where that begins."""

    def f(x):
        return torch.as_strided(op(x + 1), (3, 2), (1, 2), 1) * 2

    fast = torch.compile(f, backend="mosaic", dynamic=True, options={"poison": True, "disable": ("fuse",)})
    for rows in (5, 4):
        x = torch.randn(rows, 3)
        for _ in range(2):
            assert torch.equal(fast(x), f(x))
