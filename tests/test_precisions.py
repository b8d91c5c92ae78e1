"""State in fewer bits: what is written down and read back, against an independent implementation."""

from __future__ import annotations

import published_samplers as published
import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Kept, closeness
from remote_models import TidyLike
from test_caches import MASK, Cached, prompt_of
from test_state import at_rows, rows_in, traced
from toy_models import Toy, ids, toys

import mosaic_compiler
from mosaic_compiler import Session
from mosaic_compiler.backend import _kinds_of, kept_of
from mosaic_compiler.errors import BudgetError
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning import ladder
from mosaic_compiler.planning.precisions import PRECISIONS, precision_at, precision_of
from mosaic_compiler.planning.selection import kept_keys
from mosaic_compiler.runtime.state import Block

pytestmark = pytest.mark.usefixtures("warm")


_SOME, _OTHERS = ("int4",), ("fp8", "bf16", "int8")


@settings(max_examples=examples(2, 20))
@given(
    toy=toys,
    precision=st.sampled_from([*sorted(PRECISIONS), "exact+int4", "2*int8+fp8", "bf16+exact"]),
    batch=st.integers(1, 3),
    length=st.integers(2, 24),
    chunk=st.sampled_from([None, 1, 3, 8]),
    steps=st.lists(st.tuples(st.booleans(), st.lists(rows_in, min_size=3, max_size=3)), max_size=3),
    seed=st.integers(0, 9),
)
def test_any_schedule_of_steps_equals_an_independent_one(toy, precision, batch, length, chunk, steps, seed):
    weights = toy.weights(seed)
    kinds = _kinds_of(
        traced(toy, batch, weights), MosaicOptions(chunk_rows=chunk, cache_dtype=precision, disable=("fuse",))
    )
    assert not kinds.problem
    layers = [precision_at(precision, layer) for layer in range(toy.layers)]
    block, oracle = Block(kinds), Kept(lambda tokens: toy(tokens, *weights), layers)
    tokens = ids(batch, length, seed)
    for expected, got in zip(oracle.full(tokens), block.keep([tokens, *weights]), strict=True):
        torch.testing.assert_close(got, expected)
    for is_full, shares in steps:
        tokens = tokens.clone()
        tokens[:, seed % length] = seed
        if is_full:
            expected, got = oracle.full(tokens), block.keep([tokens, *weights])
        else:
            most = max(map(len, shares[:batch]))
            rows = torch.tensor([[int(share * length) for share in (each * most)[:most]] for each in shares[:batch]])
            expected = [at_rows(part, rows) for part in oracle.reuse(rows, tokens)]
            got = [at_rows(part, rows) for part in block.run_rows([tokens, *weights], rows)]
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, **closeness(precision))
    block.release()


@pytest.mark.parametrize(
    "precision",
    [
        *_SOME,
        pytest.param(None, marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.slow) for name in _OTHERS),
    ],
)
def test_generation_keeps_values_in_a_precision(precision):
    """Id for id as the published sampler does with rounded keys and values; state takes as many bytes as it says."""
    model, prompt, new, block = TidyLike(0).double(), prompt_of(1, 21, 3), 12, 6
    got = mosaic_compiler.generate(
        model, prompt, gen_length=new, block_length=block, steps=6, mask_token_id=MASK, cache="dual",
        cache_dtype=precision, cache_refresh="never",
    )  # fmt: skip
    blocks = [slice(begin, begin + block) for begin in range(21, 21 + new, block)]
    cached = Cached(lambda ids: model(ids).logits, "dual", "never", blocks, 3)
    cached.kept.precision = precision
    expected = published.llada(cached, prompt, steps=6, gen_length=new, block_length=block, mask_id=MASK)
    assert torch.equal(got.sequences, expected)
    assert got.is_approximate
    heads, depth = 4, 8
    head_bytes = {None: 8 * depth, "bf16": 2 * depth, "int4": depth // 2 + 4}.get(precision, depth + 4)
    assert 0 <= got.state_bytes - 2 * 2 * (21 + new) * heads * head_bytes < 2 * 2 * 2 * 512


def test_bf16_is_exact_for_a_model_that_computes_in_it():
    toy = Toy(layers=1, rotary=False)
    weights = [weight.bfloat16() for weight in toy.weights(0)]
    assert not _kinds_of(traced(toy, 1, weights), MosaicOptions(cache_dtype="bf16")).is_rounded
    assert _kinds_of(traced(toy, 1, weights), MosaicOptions(cache_dtype="int8")).is_rounded
    assert _kinds_of(traced(toy, 1, toy.weights(0)), MosaicOptions(cache_dtype="bf16")).is_rounded


def test_a_session_says_that_it_is_approximate():
    model, ids = TidyLike(3), prompt_of(1, 20, 2)
    with Session(model, options={"cache_dtype": "int8"}) as session:
        full = session.full(ids).logits
        assert torch.equal(full, model(ids).logits) or torch.allclose(full, model(ids).logits, atol=1e-4)
        assert not session.is_approximate
        got = session.reuse(ids, [3, 7]).logits
        assert session.is_approximate
        torch.testing.assert_close(got[:, [3, 7]], full[:, [3, 7]], atol=0.2, rtol=0.2)
        assert not torch.equal(got[:, [3, 7]], full[:, [3, 7]])
        session.full(ids)
        assert not session.is_approximate
        session.reuse(ids, [4] * 20)  # as many rows as there are, and one all the same
        assert session.is_approximate


@pytest.mark.fuse
@pytest.mark.parametrize("precision", [*_SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in _OTHERS)])
def test_kernels_write_and_read_the_same_codes(precision):
    """As the ops of PyTorch, up to what rounds to the neighbour; NaN stays in its row's results."""
    toy = Toy(layers=1, result="logits")
    weights = toy.weights(1)
    module, tokens, rows = traced(toy, 1, weights), ids(1, 33, 4), torch.tensor([[4, 9, 30]])
    kept, results = [], []
    for disable in ((), ("fuse",)):
        block = Block(_kinds_of(module, MosaicOptions(cache_dtype=precision, disable=disable)))
        block.keep([tokens, *weights])
        results.append(at_rows(block.run_rows([tokens, *weights], rows)[0], rows))
        kept.append([tensor.clone() for tensor in block.tensors])
        block.release()
    for one, other in zip(*kept, strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        else:
            assert (one != other).float().mean() < 0.01
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_what_is_no_number_is_none_when_it_is_read(precision):
    toy = Toy(layers=1, result="logits", rotary=False)
    weights = toy.weights(1)
    weights[0][3] = torch.nan
    tokens = ids(1, 12, 4).clamp_min(4)
    tokens[0, 5] = 3
    block = Block(_kinds_of(traced(toy, 1, weights), MosaicOptions(cache_dtype=precision, disable=("fuse",))))
    expected = block.keep([tokens, *weights])[0][:, [1, 2]]
    assert expected.isnan().all()
    assert block.run_rows([tokens, *weights], torch.tensor([[1, 2]]))[0][:, [1, 2]].isnan().all()
    block.release()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "dual", "cache_dtype": ["int8"]}, "is not one of bf16"),
        ({"cache": "dual", "options": {"cache_dtype": "int4"}}, "an argument of generate by itself"),
        ({"cache": "dual", "cache_dtype": "int3"}, "cache_dtype='int3' is not one of bf16, fp8, int8, int4"),
        ({"cache": "none", "cache_dtype": "int8"}, "nothing is: choose a cache"),
        ({"cache": "exact", "cache_dtype": "int8", "compile": False}, "a compiled model"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        mosaic_compiler.generate(TidyLike(0), prompt_of(1, 4, 0), gen_length=4, steps=2, mask_token_id=MASK, **options)


def test_heads_of_odd_size_do_not_go_into_four_bits():
    class Odd(Toy):
        def attention(self, h, q, k, v, o):
            queries, keys, values = (torch.nn.functional.linear(h, w)[:, None, :, :3] for w in (q, k, v))
            a = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
            return torch.nn.functional.pad(a[:, 0], (0, 13)) @ o.t()

    toy = Odd(layers=1)
    module = traced(toy, 1, toy.weights(0))
    for precision, problem in (
        ("int4", "its heads have 3 numbers, and int4 puts two in a byte: take int8"),
        ("int8", ""),
    ):
        assert _kinds_of(module, MosaicOptions(cache_dtype=precision)).problem == problem


@pytest.mark.slow
def test_auto_goes_down_until_it_fits(tiny_llada, caplog, monkeypatch):
    """As computed, or in 8 bits: the first whose state and steps fit; if none does, the last one says so."""
    monkeypatch.setattr(ladder, "LADDER", (None, "int8"))
    model, prompt = tiny_llada, prompt_of(1, 1200, 1)
    options = {"gen_length": 8, "block_length": 8, "steps": 2, "mask_token_id": 3, "cache": "dual"}
    needed = {}
    for precision in (None, "int8"):
        with pytest.raises(BudgetError) as refused:
            mosaic_compiler.generate(model, prompt, **options, cache_dtype=precision, memory_budget=64 << 10)
        needed[precision] = refused.value.needed
    assert needed["int8"] < needed[None]
    budget = needed["int8"] + (4 << 10)
    with caplog.at_level("WARNING", "mosaic_compiler"):
        got = mosaic_compiler.generate(model, prompt, **options, cache_dtype="auto", memory_budget=budget)
    alone = mosaic_compiler.generate(model, prompt, **options, cache_dtype="int8")
    assert "all keys in int8, and not all keys in the precision that they are computed in" in caplog.text
    assert (got.cache_dtype, got.state_bytes, got.is_approximate) == ("int8", alone.state_bytes, True)
    assert got.plan.workspace <= budget
    assert torch.equal(got.sequences, alone.sequences)
    assert got.steps_by_kind == alone.steps_by_kind
    assert mosaic_compiler.generate(model, prompt, **options, cache_dtype="auto").cache_dtype is None
    with pytest.raises(BudgetError):
        mosaic_compiler.generate(model, prompt, **options, cache_dtype="auto", memory_budget=64 << 10)


@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_explain_says_how_many_bytes_are_kept(precision):
    kept = kept_of(traced(Toy(layers=2), 1, Toy(layers=2).weights(0)), MosaicOptions(cache_dtype=precision))
    (length,) = kept.nbytes.free_symbols
    heads, depth = 4, 4
    head_bytes = {None: 8 * depth, "bf16": 2 * depth, "int4": depth // 2 + 4}.get(precision, depth + 4)
    assert kept.nbytes.xreplace({length: 1000}) == 2 * 2 * 1000 * heads * head_bytes


def test_the_ladder_says_how_many_bytes_each_rung_takes():
    """As many as state then has, and explain() says them."""
    toy = Toy(layers=1, heads=4, kv_heads=2, result="logits")
    weights, tokens = toy.weights(0), ids(1, 60, 1)
    module = traced(toy, 1, weights)
    found = kept_of(module, MosaicOptions()).rungs()
    assert [rung.short for rung, _ in found] == ["all", "all, int8", "all, int4", "5%", "5%, int4"]
    for rung, expr in found if examples(0, 1) else (found[2], found[3]):
        options = MosaicOptions(cache_dtype=rung.precision, cache_keep=rung.keep, disable=("fuse",))
        block = Block(_kinds_of(module, options))
        rows = torch.arange(20, 28)[None]
        block.keep([tokens, *weights], rows if rung.keep is not None else None)
        sizes = dict.fromkeys(expr.free_symbols, 60)
        keys = 1 if rung.keep is None else kept_keys(rung.keep, 60, 8)
        expected = int(expr.xreplace(sizes)) * keys
        assert 0 <= block.nbytes - expected < 512 * len(block.tensors)
        block.release()
    report = " ".join(str(mosaic_compiler.explain(TidyLike(0), prompt_of(1, 200, 1))).split())
    assert "what cache='auto' tries, for blocks of 32 rows: all " in report
    assert "5%, int4" in report


def test_precisions_by_layers():
    assert [precision_at("2*exact+int8+int4", layer) for layer in range(5)] == [None, None, "int8", "int4", "int4"]
    assert [precision_at("int4", layer) for layer in range(2)] == ["int4", "int4"]
    for bad in ("int4+", "0*int4", "x*int4", "int3", "2*int4+int5", "-1*fp8", ""):
        with pytest.raises(ValueError, match="choice by layers"):
            precision_of(bad)


@pytest.mark.slow
def test_bytes_of_precisions_by_layers():
    model, prompt = TidyLike(0).double(), prompt_of(1, 21, 3)
    given = {"gen_length": 12, "block_length": 6, "steps": 6, "mask_token_id": MASK, "cache": "dual"}
    found = {
        name: mosaic_compiler.generate(model, prompt, **given, cache_dtype=name)
        for name in (None, "exact", "exact+int4", "int4")
    }
    assert torch.equal(found[None].sequences, found["exact"].sequences)
    assert found[None].state_bytes == found["exact"].state_bytes
    one, both = found["exact+int4"].state_bytes, found["int4"].state_bytes
    assert abs(2 * one - found[None].state_bytes - both) < 2 * 8 * 512
    assert found["exact+int4"].cache_dtype == "exact+int4"


class Shared(torch.nn.Module):
    """Two attentions of the same keys and values; of which one may have a bias."""

    def __init__(self, biased=None):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50)
        self.queries = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))
        self.key, self.value, self.biased = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32), biased
        self.register_buffer("bias", torch.randn(1, 2, 64, 64))

    def forward(self, ids):
        x = self.embed(ids)
        length = ids.shape[1]

        def heads(given):
            return given.view(*ids.shape, 2, 16).transpose(1, 2)

        key, value = heads(self.key(x)), heads(self.value(x))
        for number, layer in enumerate(self.queries):
            bias = self.bias[:, :, :length, :length] if number == self.biased else None
            out = torch.nn.functional.scaled_dot_product_attention(heads(layer(x)), key, value, attn_mask=bias)
            x = x + out.transpose(1, 2).reshape(*ids.shape, 32)
        return self.head(x)


@pytest.mark.parametrize("biased", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (None, 0))])
@pytest.mark.parametrize(
    "precision",
    ["fp8+int4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "int4+exact", "exact+int8"))],
)
def test_keys_that_two_layers_share_are_written_once(biased, precision):
    """As the first of them says; who cannot read codes gets numbers."""
    torch.manual_seed(1)
    model, tokens, rows = Shared(biased).eval(), ids(1, 24, 2), torch.tensor([3, 7, 11])
    oracle = Kept(model, precision_at(precision, 0))
    with Session(model, options={"cache_dtype": precision}) as session:
        session.full(tokens)
        oracle.full(tokens)
        tokens = tokens.clone()
        tokens[0, rows] = torch.tensor([1, 2, 3])
        got, expected = session.reuse(tokens, rows), oracle.reuse(rows[None], tokens)
    torch.testing.assert_close(got[:, rows], expected[:, rows], atol=1e-5, rtol=1e-5)
