"""What a hash of a function could pass over: each pair of functions differs in one thing, and neither gets the other's
results, by what is kept on disk or in the process."""

from __future__ import annotations

import contextvars
import dataclasses
import decimal
import enum
import itertools
import operator
import os
import threading
import types

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
from remote_models import TidyLike
from torch import nn

import mosaic_compiler
from mosaic_compiler import Session
from mosaic_compiler.owned.function import forget_made

OPTIONS = {"disable": ("fuse",)}


@pytest.fixture(autouse=True)
def _kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_CACHE", str(tmp_path / "cache"))


def of_value(held, read=lambda held: held):
    return lambda x: x * read(held)


def of_namespace(v):
    return of_value(types.SimpleNamespace(scale=v), lambda held: held.scale)


def of_slice(v):
    return of_value(slice(0, int(v)), lambda held: float(held.stop))


def of_bytes(v):
    return of_value(bytearray([int(v)]), lambda held: float(held[0]))


def of_thread(v):
    held = threading.local()
    held.scale = v
    return of_value(held, lambda held: held.scale)


def of_context(v):
    held = contextvars.ContextVar("held")
    held.set(v)
    return of_value(held, lambda held: held.get())


def of_decimal(v):
    return of_value(decimal.Decimal(v), float)


def of_getter(v):
    return of_value(operator.itemgetter(int(v)), lambda held: float(held([0, 1, 2, 3])))


def of_repeat(v):
    return of_value(itertools.repeat(v), next)


def of_number(v):
    class Level(int):
        pass

    return of_value(Level(v), lambda held: float(int(held)))


def of_enum(v):
    return of_value(enum.Enum("Mode", {"SCALE": v}).SCALE, lambda held: held.value)


def of_dict(v):
    class Config(dict):
        pass

    held = Config()
    held.scale = v
    return of_value(held, lambda held: held.scale)


def of_meta(v):
    class Meta(type):
        scale = property((lambda cls: 2.0) if v == 2 else (lambda cls: 3.0))

    class Held(metaclass=Meta):
        pass

    return of_value(Held, lambda held: held.scale)


def of_item(v):
    return of_value(torch.tensor(v), lambda held: held.item())


def of_float(v):
    return of_value([torch.tensor(v)], lambda held: float(held[0]))


def of_attribute_of_a_weight(v):
    model = nn.Linear(3, 3, bias=False).requires_grad_(False)
    model.weight.fill_(1.0)
    model.weight.scale = v
    return lambda x: model(x) * model.weight.scale


def of_environment(v):
    os.environ["SCALE_OF_TEST"] = str(v)
    return lambda x: x * (2.0 if os.environ["SCALE_OF_TEST"] == "2.0" else 3.0)


def of_computed_name(v):
    class Model(nn.Module):
        mode = "fast"

        def forward(self, x):
            return getattr(self, f"run_{self.mode}")(x)

    if v == 2:
        Model.run_fast = lambda self, x: x * 2
    else:
        Model.run_fast = lambda self, x: x * 3
    return Model()


def of_text(v):
    space = {}
    exec(f"def g(x): return x * {v}", space)
    return space["g"]


def of_parametrized(v):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3), requires_grad=False)

        if v == 2:

            def forward(self, x):
                return x * self.w * 2
        else:

            def forward(self, x):
                return x * self.w * 3

    class Square(nn.Module):
        def forward(self, w):
            return w * w

    model = Own()
    torch.nn.utils.parametrize.register_parametrization(model, "w", Square())
    return model.requires_grad_(False)


def of_operator(v):
    class Held:
        if v == 2:

            def __mul__(self, other):
                return other * 2
        else:

            def __mul__(self, other):
                return other * 3

    held = Held()
    return lambda x: held * x


def of_ufunc(v):
    import math

    import numpy as np

    return of_value(np.cosh if v == 2 else np.sinh, lambda held: math.ceil(float(held(1.0)) * 4) / 2)


def of_import(v):
    import sys

    module = types.ModuleType("helper_of_test")
    module.scale = v
    sys.modules["helper_of_test"] = module

    def f(x):
        from helper_of_test import scale

        return x * scale

    return f


MAKERS = [
    of_namespace, of_slice, of_bytes, of_thread, of_context, of_decimal, of_getter, of_repeat, of_number, of_enum,
    of_dict, of_meta, of_item, of_float, of_attribute_of_a_weight, of_environment, of_computed_name, of_text,
    of_parametrized, of_operator, of_import, of_ufunc,
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_functions_that_differ_in_one_thing(make):
    x, results = torch.ones(2, 3), []
    for v in (2.0, 3.0):
        forget_made()
        torch._dynamo.reset()
        function = make(v)
        results.append(mosaic_compiler.compile(function, **OPTIONS)(x)[0, 0].item())
        assert results[-1] == function(x)[0, 0].item()
    assert results[0] != results[1]


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("patched", ["method", "function", "hook"])
def test_patches_of_pytorch(patched, monkeypatch):
    x, results = -torch.ones(2, 3), []
    model = nn.Sequential(nn.ReLU())

    class Calls(nn.Module):
        def forward(self, x):
            return F.silu(x)

    for v in (2.0, 3.0):
        forget_made()
        torch._dynamo.reset()
        hook = None
        if patched == "method":
            monkeypatch.setattr(nn.ReLU, "forward", lambda self, x, v=v: x * v)
        elif patched == "function":
            monkeypatch.setattr(F, "silu", lambda x, v=v: x * v)
        else:
            hook = nn.modules.module.register_module_forward_hook(
                lambda module, given, result, v=v: result + v if isinstance(result, torch.Tensor) else result
            )
        function = Calls() if patched == "function" else model
        try:
            results.append(mosaic_compiler.compile(function, **OPTIONS)(x)[0, 0].item())
            plain = torch.compile(function, backend="eager") if patched == "hook" else function
            assert results[-1] == plain(x)[0, 0].item()
        finally:
            if hook is not None:
                hook.remove()
    assert results[0] != results[1]


@dataclasses.dataclass
class Batch:
    scale: torch.Tensor


@pytest.mark.parametrize(
    ("first", "second", "read"),
    [
        (Batch(torch.full((3,), 2.0)), Batch(torch.full((3,), 3.0)), lambda held: held.scale),
        (slice(0, 2), slice(0, 3), lambda held: float(held.stop)),
        (types.SimpleNamespace(s=2.0), types.SimpleNamespace(s=3.0), lambda held: held.s),
    ],
)
def test_arguments_of_other_kinds(first, second, read):
    compiled = mosaic_compiler.compile(lambda x, held: x * read(held), **OPTIONS)
    x = torch.ones(2, 3)
    assert torch.equal(compiled(x, first), x * read(first))
    assert torch.equal(compiled(x, second), x * read(second))


def test_arguments_that_share_memory():
    def f(x, y):
        x.add_(1.0)
        return x * y

    for shared in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(f, backend="mosaic", dynamic=True, options=OPTIONS)
        a = torch.arange(12.0).reshape(3, 4)
        got = compiled(a, a.view(3, 4) if shared else a.clone())
        assert got[0, 1] == (4.0 if shared else 2.0)


def test_operators_of_ones_own(tmp_path):
    for v in (2.0, 3.0):
        torch._dynamo.reset()
        library = torch.library.Library("overlooked", "FRAGMENT")
        library.define("scale(Tensor x) -> Tensor")
        library.impl("scale", lambda x, v=v: x * v, "CompositeImplicitAutograd")

        def f(x):
            return torch.ops.overlooked.scale(x) + 1

        for compiled in (torch.compile(f, backend="mosaic", dynamic=True), mosaic_compiler.compile(f)):
            assert compiled(torch.ones(2, 3))[0, 0] == v + 1
        library._destroy()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.config, self.scales = types.SimpleNamespace(scale=2.0), [2.0]
        self.factor = float("2.0")

    def forward(self, x):
        return x * self.config.scale * self.scales[0] * self.factor


def test_what_is_changed_between_calls():
    model, x = Scaled(), torch.ones(2, 3)
    compiled = mosaic_compiler.compile(model, **OPTIONS)
    assert compiled(x)[0, 0] == 8
    model.config.scale = 5.0
    assert compiled(x)[0, 0] == 20
    model.scales[0] = 3.0
    assert compiled(x)[0, 0] == 30
    del model.factor
    model.factor = float("7.0")
    assert compiled(x)[0, 0] == 105


def test_hooks_and_methods_between_generations(monkeypatch):
    model, prompt = TidyLike(0), torch.randint(10, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    options = {"gen_length": 4, "steps": 2, "mask_token_id": 5}

    def both():
        found = [mosaic_compiler.generate(model, prompt, compile=given, **options).sequences for given in (True, False)]
        assert torch.equal(*found)
        return found[0]

    seen = [both()]
    for k in (1.0, -1.0):
        hook = model.head.register_forward_hook(lambda module, given, out, k=k: out + k * torch.arange(out.shape[-1]))
        seen.append(both())
        hook.remove()
    assert not torch.equal(seen[1], seen[2])
    monkeypatch.setattr(type(model.layers[0]), "forward", lambda self, x, sin, cos, bias: x)
    assert not torch.equal(both(), seen[0])


def test_weights_of_another_type():
    model = nn.Sequential(nn.Embedding(61, 32), nn.Linear(32, 61)).requires_grad_(False)
    ids = torch.randint(0, 61, (1, 9))
    compiled = mosaic_compiler.compile(model, **OPTIONS)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        torch.testing.assert_close(compiled(ids), model(ids))
    tidy = TidyLike(1)
    for dtype in (torch.float32, torch.float64):
        tidy.to(dtype)
        with Session(tidy, options=OPTIONS) as session:
            torch.testing.assert_close(session.full(ids).logits, tidy(ids).logits)
