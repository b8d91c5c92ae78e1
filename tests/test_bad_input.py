"""Bad or unusual input: the right result or a clear error, never stale memory."""

from __future__ import annotations

import gc
import threading
import types
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import mosaic_compiler
from mosaic_compiler.backend import compile_aten, observing
from mosaic_compiler.errors import FallbackError, GradientError, OptionsError, StaleGraphError
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import trace
from mosaic_compiler.runtime.pools import ArenaPool, pool_for
from mosaic_compiler.sampling import DenoisingStep, block_window


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(x)))
        return x @ self.embed.weight.t()


def compiled(module, **options):
    return torch.compile(module, backend="mosaic", dynamic=True, options=options or None)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_short_sequences(net, length):
    fast = compiled(net)
    with torch.no_grad():
        for ids in (torch.randint(0, 50, (1, 7)), torch.randint(0, 50, (1, length)), torch.randint(0, 50, (2, length))):
            assert torch.equal(fast(ids), net(ids))


def test_one_token_and_no_token_of_a_real_step():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, is_causal=False, use_cache=False)
    step = DenoisingStep(LlamaForCausalLM(config).eval(), 3)
    arguments = torch.full((1, 1), 3), block_window(1, 0, 1), torch.tensor([1])
    nothing = torch.full((1, 0), 3), block_window(0, 0, 0), torch.tensor([0])
    fast = compiled(step)
    with torch.no_grad():
        assert torch.equal(fast(*arguments), step(*arguments))
        for call in (step, fast):  # transformers itself refuses an empty sequence; so does the compiled step
            with pytest.raises(Exception, match="cannot reshape tensor of 0 elements"):
                call(*nothing)
        assert torch.equal(fast(*arguments), step(*arguments))


def test_non_contiguous_and_offset_ids(net):
    fast = compiled(net)
    base = torch.randint(0, 50, (40, 6))
    with torch.no_grad():
        for ids in (base.t(), base[::3], base[5:], base[:, 1:3], base.t()[2:4, 7:], base[:, 0].expand(3, 40)):
            assert torch.equal(fast(ids), net(ids))


def test_wrong_dtype_and_index_are_errors_and_nothing_breaks(net):
    fast = compiled(net)
    good = torch.randint(0, 50, (1, 9))
    with torch.no_grad():
        fast(good)
        with pytest.raises(Exception, match=r"(?i)(long|int|indices)"):
            fast(good.float())
        with pytest.raises(IndexError):
            fast(torch.full((1, 9), 99))
        assert torch.equal(fast(good), net(good))
        assert torch.equal(fast(good.int()), net(good.int()))


def test_wrong_device_is_an_error(net):
    fast = compiled(net)
    with torch.no_grad():
        fast(torch.randint(0, 50, (1, 9)))
        with pytest.raises(Exception, match=r"(?i)(device|meta)"):
            fast(torch.randint(0, 50, (1, 9), device="meta")).sum().item()


@pytest.mark.parametrize("how", ["data", "assign", "in-place", "roundtrip", "new_parameter"])
def test_weights_that_change_between_calls(net, how):
    fast = compiled(net)
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fast(ids), net(ids))
            if how == "data":
                net.up.weight.data = torch.randn_like(net.up.weight)
            elif how == "assign":
                net.load_state_dict({k: torch.randn_like(v) for k, v in net.state_dict().items()}, assign=True)
            elif how == "in-place":
                net.up.weight.mul_(1.5)
            elif how == "roundtrip":
                net.half().float()
            else:
                net.up.weight = nn.Parameter(torch.randn_like(net.up.weight))
        assert torch.equal(fast(ids), net(ids))


def test_weights_of_another_dtype_are_compiled_anew_or_refused(net):
    """Where Dynamo takes parameters for immutable, it runs the old graph: that must say what to do."""
    fast = compiled(net)
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        for convert in (net.double, net.half, net.float):
            fast(ids)
            convert()
            try:
                result = fast(ids)
            except StaleGraphError:
                torch._dynamo.reset()
                result = fast(ids)
            assert torch.equal(result, net(ids))


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.t, lambda w: w[:4], lambda w: w.to("meta")])
def test_a_graph_refuses_weights_that_it_was_not_compiled_for(change):
    x, weight = torch.randn(3, 8), torch.randn(8, 8)
    module = trace(lambda x, w: x @ w, x, weight)
    step = compile_aten(module, MosaicOptions(disable=("fuse",)), static_inputs=[1])
    assert torch.equal(step([x, weight])[0], x @ weight)
    with pytest.raises(StaleGraphError, match=r"w_1 was compiled as .*: call torch\._dynamo\.reset"):
        step([x, change(weight.clone())])
    assert torch.equal(step([x, weight])[0], x @ weight)


def test_replaced_weights_are_not_kept_in_memory(net):
    fast = compiled(net)
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        fast(ids)
        fast(torch.randint(0, 50, (2, 30)))
        old = weakref.ref(net.up.weight.untyped_storage())
        net.up.weight.data = torch.randn_like(net.up.weight)
        fast(ids)
    gc.collect()
    assert old() is None


def test_one_graph_for_many_layers_keeps_a_program_for_each():
    """Regional compilation: one graph, many sets of weights, no rebinding from call to call."""
    layers = [nn.Linear(8, 8).eval() for _ in range(4)]
    steps = []
    fast = torch.compile(lambda layer, x: torch.relu(layer(x)), backend="mosaic", dynamic=True)
    x = torch.randn(5, 8)
    with torch.no_grad(), observing(steps.append):
        for _ in range(3):
            for layer in layers:
                assert torch.equal(fast(layer, x), torch.relu(layer(x)))
    assert sum(len(step._programs) for step in steps) == 4


def test_returned_tensors_stay_valid_and_unchanged(net):
    fast = compiled(net)
    kept, copies = [], []
    with torch.no_grad():
        for length in (9, 30, 9, 4, 9):
            out = fast(torch.randint(0, 50, (2, length)))
            kept.append(out)
            copies.append(out.clone())
    mosaic_compiler.release_memory()
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_outputs_that_alias_each_other_and_inputs():
    def f(x):
        y = x * 2
        return y, y.t(), x[1:], y[0], x

    fast = compiled(f)
    x = torch.randn(4, 3)
    with torch.no_grad():
        y, transposed, tail, row, same = fast(x)
        assert same is x or same.data_ptr() == x.data_ptr()
        x.zero_()
        assert tail.abs().sum() == 0
        y.zero_()
        assert transposed.abs().sum() == 0
        assert row.abs().sum() == 0


def test_gradients_are_refused_with_advice(net):
    with pytest.raises(BackendCompilerFailed, match=r"torch\.no_grad\(\)") as error:
        compiled(net)(torch.randint(0, 50, (1, 9)))
    assert isinstance(error.value.inner_exception, GradientError)


def test_inference_mode_and_no_grad_and_frozen_weights(net):
    ids = torch.randint(0, 50, (1, 9))
    expected = net(ids).detach()
    fast = compiled(net)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(fast(ids), expected)
        with torch.no_grad():
            assert torch.equal(fast(ids), expected)
    net.requires_grad_(False)
    assert torch.equal(fast(ids), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posion": True}, "did you mean 'poison'"),
        ({"poison": 1}, "must be True or False"),
        ({"placement": "sise"}, "did you mean 'size'"),
        ({"disable": ["inplace"]}, "did you mean 'in-place'"),
        ({"program_cache": 0}, "whole number"),
        ({"dump": 7}, "folder"),
    ],
)
def test_bad_options_name_the_nearest_valid_one(options, message):
    with pytest.raises(OptionsError, match=message):
        mosaic_compiler.explain(lambda x: x + 1, torch.zeros(3), **options)
    with pytest.raises(BackendCompilerFailed, match=message) as error:
        compiled(lambda x: x + 1, **options)(torch.zeros(3))
    assert isinstance(error.value.inner_exception, OptionsError)


def test_modes_are_refused():
    with pytest.raises(BackendCompilerFailed, match="no modes"):
        torch.compile(lambda x: x + 1, backend="mosaic", mode="max-autotune")(torch.zeros(3))


def test_strict_mode_refuses_a_fallback_that_explain_names():
    def f(x):
        return torch.roll(x * 2, 1, 0) + 1

    x = torch.randn(8, 3)
    report = mosaic_compiler.explain(f, x)
    assert [(fallback.name, fallback.op) for fallback in report.fallbacks] == [("opaque-op", "aten.roll.default")]
    assert "opaque-op" in str(report)
    assert torch.equal(report.result, f(x))
    with pytest.raises(BackendCompilerFailed, match="opaque-op") as error:
        compiled(f, strict=True)(torch.randn(8))
    assert isinstance(error.value.inner_exception, FallbackError)


def test_data_dependent_sizes_run_and_are_named():
    def f(x):
        picked = x[x > 0]
        return picked * 2, picked.sum()

    x = torch.randn(20)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = mosaic_compiler.explain(f, x)
        assert torch.equal(report.result[0], f(x)[0])
        assert torch.equal(report.result[1], f(x)[1])
    assert len(report.graphs) == 1
    assert "data-dependent-size" in {fallback.name for fallback in report.fallbacks}


def test_two_threads_take_turns(net):
    fast = compiled(net)
    inputs = [torch.randint(0, 50, (1, 5 + i % 7)) for i in range(40)]
    results: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        expected = [net(ids) for ids in inputs]
        fast(inputs[0])

    def work(start: int) -> None:
        with torch.no_grad():
            for i in range(start, 40, 4):
                results[i] = fast(inputs[i])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert all(torch.equal(results[i], expected[i]) for i in range(40))


def test_re_entrant_use_gets_an_arena_of_its_own():
    """An operator of the outer step calls another compiled function while its buffers are live."""
    inner = compiled(lambda x: (x * 3).relu() + 1)

    @torch.library.custom_op("mosaic_test::reenter", mutates_args=())
    def reenter(x: torch.Tensor) -> torch.Tensor:
        return inner(x)

    @reenter.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    def outer(x):
        a, b = x * 2, x + 5
        return reenter(a + b) * a - b

    def plain(x):
        a, b = x * 2, x + 5
        return (((a + b) * 3).relu() + 1) * a - b

    x = torch.randn(100)
    with torch.no_grad():
        inner(x)
        assert torch.equal(compiled(outer)(x), plain(x))
    assert len(pool_for(torch.device("cpu"))._arenas) >= 2


def test_an_error_in_the_middle_of_a_step_leaves_everything_usable():
    calls = []

    @torch.library.custom_op("mosaic_test::maybe_fail", mutates_args=())
    def maybe_fail(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return x + 1

    @maybe_fail.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    fast = compiled(lambda x: maybe_fail(x * 2).relu() * 3)
    x = torch.rand(10)
    with torch.no_grad():
        assert torch.equal(fast(x), (x * 2 + 1) * 3)
        with pytest.raises(RuntimeError, match="out of luck"):
            fast(x)
        assert torch.equal(fast(x), (x * 2 + 1) * 3)
    assert pool_for(torch.device("cpu"))._depth == 0


def test_memory_goes_back_when_the_last_compiled_function_dies(net):
    class User:
        pass

    pool = ArenaPool()
    first, second = User(), User()
    pool.register(first)
    pool.register(second)
    with pool.lease() as arena:
        arena.ensure(4096)
    del first
    gc.collect()
    assert pool.reserved() == 4096
    del second
    gc.collect()
    assert pool.reserved() == 0


def test_a_compiled_step_dies_with_its_function(net):
    steps = []
    with torch.no_grad(), observing(lambda step: steps.append(weakref.ref(step))):
        fast = compiled(net)
        fast(torch.randint(0, 50, (4, 40)))
    assert steps[0]() is not None
    del fast
    torch._dynamo.reset()
    gc.collect()
    assert steps[0]() is None


@pytest.mark.parametrize(
    "budget", [0, -1, "8GB please", "8GB ", "lots", "-4GiB", "0MiB", 1.5, True, "8 gigs", b"8GiB"], ids=repr
)
def test_malformed_budgets(budget):
    with pytest.raises(OptionsError, match="memory_budget"):
        MosaicOptions(memory_budget=budget)


@pytest.mark.parametrize("chunk", [0, -3, 1.5, "all", True], ids=repr)
def test_malformed_chunk_rows(chunk):
    with pytest.raises(OptionsError, match="chunk_rows"):
        MosaicOptions(chunk_rows=chunk, disable=("fuse",))


def test_a_budget_above_the_machine_is_refused():
    compiled = torch.compile(lambda x: x @ x.t(), backend="mosaic", options={"memory_budget": "900TiB"})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"more than the .* bytes that cpu has") as error:
        compiled(torch.randn(4, 3))
    assert isinstance(error.value.inner_exception, OptionsError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens must be"),
        ({"tokens": 2.5}, "tokens must be"),
        ({"tokens": 100, "row_share": 1.5}, "share between 0 and 1"),
    ],
)
def test_malformed_forecasts(arguments, message):
    import mosaic_compiler

    with pytest.raises(OptionsError, match=message):
        mosaic_compiler.explain(lambda x: x @ x.t(), torch.randn(4, 3), **arguments)


def test_a_forecast_needs_one_graph():
    import mosaic_compiler
    from mosaic_compiler.errors import CaptureError

    def broken(x):
        torch._dynamo.graph_break()
        return x @ x.t()

    with pytest.raises(CaptureError, match=r"one graph.*graph_break.*test_bad_input.py:\d+ in broken"):
        mosaic_compiler.max_tokens(broken, (torch.randn(4, 3),), "1MiB")


def test_a_forecast_of_a_function_that_fails_says_what_and_where(caplog):
    """The innermost error and its line, not what Dynamo was doing; and no log of PyTorch's own."""
    from mosaic_compiler.errors import CaptureError

    class Failing(nn.Module):
        def forward(self, x):
            return x.topk(None).values

    class Raising(nn.Module):
        def forward(self, x):
            raise ValueError("no such thing")

    class OwnError(Exception):
        pass

    class RaisingItsOwn(nn.Module):
        def forward(self, x):
            raise OwnError("no such thing")

    for fn, message in (
        (
            Failing(),
            r"TypeError: topk\(\): argument 'k' .*must be int, not NoneType \(.*test_bad_input.py:\d+ in forward\)",
        ),
        (Raising(), r"ValueError\('no such thing'\) \(.*test_bad_input.py:\d+ in forward\)"),
        (RaisingItsOwn(), r"traced: OwnError.* \(.*test_bad_input.py:\d+ in forward\)"),
        (
            lambda x: x @ torch.ones(7, 7),
            r"RuntimeError: .* same reduction dim, .* \(.*test_bad_input.py:\d+ in <lambda>",
        ),
    ):
        with pytest.raises(CaptureError, match=message):
            mosaic_compiler.max_tokens(fn, (torch.randn(4, 3),), "1MiB")
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_more_tokens_than_the_model_has_positions_are_said(net):
    example = (torch.randint(0, 50, (1, 9)),)
    found = mosaic_compiler.max_tokens(net, example, "1MiB")
    net.config = types.SimpleNamespace(max_position_embeddings=16)
    with pytest.warns(UserWarning, match="config gives it 16 positions"):
        assert mosaic_compiler.max_tokens(net, example, "1MiB") == found > 16
