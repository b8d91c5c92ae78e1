"""Compiled graphs that another process has left: run without tracing, with the same results, and never by mistake."""

from __future__ import annotations

import collections
import dataclasses
import functools
import shutil
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import mosaic_compiler
from mosaic_compiler import backend
from mosaic_compiler.compat.inductor import chosen_launch, moved
from mosaic_compiler.disk import folder as folders
from mosaic_compiler.disk.codec import pack, unpack
from mosaic_compiler.disk.folder import Folder, the_folder
from mosaic_compiler.errors import CacheError
from mosaic_compiler.kernels import artifacts
from mosaic_compiler.owned import function as owned
from mosaic_compiler.owned.fingerprint import Fingerprint
from mosaic_compiler.owned.function import forget_made
from mosaic_compiler.planning.check import check_lowered
from mosaic_compiler.runtime.step import CompiledStep

EPSILON = 1e-5
TABLE = {"scale": 1.0}
HIDDEN = 16


def normed(x, weight):
    return F.layer_norm(x, (HIDDEN,), weight, None, EPSILON) * TABLE["scale"]


@dataclasses.dataclass
class Config:
    width: int = HIDDEN
    heads: int = 2
    eps: float = 1e-6
    gated: bool = True
    name: str = "toy"


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.config, self.index, self.scaling = config, index, 0.5
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.norm = nn.Parameter(torch.ones(HIDDEN))

    def heads(self, x):
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

    def forward(self, x):
        q, k, v = map(self.heads, self.qkv(normed(x, self.norm)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Toy(nn.Module):
    def __init__(self, config=None, layers=2, vocabulary=31):
        super().__init__()
        self.config = config or Config()
        self.embed = nn.Embedding(vocabulary, HIDDEN)
        self.layers = nn.ModuleList(Attention(self.config, index) for index in range(layers))
        self.head = nn.Linear(HIDDEN, vocabulary, bias=False)
        self.activation = F.silu
        self.register_buffer("offset", torch.zeros(HIDDEN))

    def forward(self, ids):
        x = self.embed(ids) + self.offset
        for layer in self.layers:
            x = layer(x)
        if self.config.gated:
            x = x * self.activation(x)
        return self.head(x + self.config.eps)


def toy(seed=0, **more):
    torch.manual_seed(seed)
    return Toy(**more).eval().requires_grad_(False)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A cache folder of its own."""
    monkeypatch.setenv("MOSAIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def as_elsewhere():
    """What this process has compiled is forgotten, as if it were another one."""
    torch._dynamo.reset()
    forget_made()


@contextmanager
def nothing_is_compiled():
    """Inside of the block, compiling a graph is an error."""
    forget_made()

    def refuse(*args, **kwargs):
        raise AssertionError("a graph was compiled")

    before = backend.compile_aten
    backend.compile_aten = refuse
    try:
        yield
    finally:
        backend.compile_aten = before


@contextmanager
def counting():
    """The graphs that are compiled inside of the block."""
    steps = []
    with backend.observing(steps.append):
        yield steps


IDS = torch.arange(20).reshape(1, 20) % 31


# ------------------------------------------------------------------------------------------------ hits
def test_another_process_runs_what_one_has_compiled(kept):
    want = toy()(IDS)
    got = mosaic_compiler.compile(toy())(IDS)
    torch.testing.assert_close(got, want)
    as_elsewhere()
    with nothing_is_compiled():
        again = mosaic_compiler.compile(toy())(IDS)
        torch.testing.assert_close(again, got, rtol=0, atol=0)
        other = mosaic_compiler.compile(toy(seed=1), memory_budget="1MiB")(IDS[:, :7])
        torch.testing.assert_close(other, toy(seed=1)(IDS[:, :7]))


def test_dynamo_is_not_asked(kept, monkeypatch):
    mosaic_compiler.compile(toy())(IDS)
    monkeypatch.setattr(torch, "compile", None)  # (a function in its place is somebody's own, and would count)
    torch.testing.assert_close(mosaic_compiler.compile(toy())(IDS), toy()(IDS))


def test_sizes_that_were_not_compiled_for_are_compiled(kept):
    mosaic_compiler.compile(toy())(IDS)
    batch, single = IDS.reshape(4, 5), IDS[:, :1]
    with counting() as steps:
        for ids in (batch, single):
            torch.testing.assert_close(mosaic_compiler.compile(toy())(ids), toy()(ids))
    assert len(steps) == 2, "batches of one are another graph than batches, and so is one token"
    with nothing_is_compiled():
        for ids in (batch, single, IDS, IDS.reshape(2, 10)):
            torch.testing.assert_close(mosaic_compiler.compile(toy())(ids), toy()(ids))


class Plain(nn.Module):
    """Without floats of its own, which Dynamo passes as inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(31, HIDDEN)
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("make", [Plain, toy])
def test_torch_compile_skips_what_is_behind_dynamo(kept, make):
    with torch.no_grad(), counting() as steps:
        first = torch.compile(make(), backend="mosaic", dynamic=True)(IDS)
        as_elsewhere()
        again = torch.compile(make(), backend="mosaic", dynamic=True)
        torch.testing.assert_close(again(IDS), first, rtol=0, atol=0)
        torch.testing.assert_close(again(torch.arange(9)[None]), make()(torch.arange(9)[None]))
    is_compiled = [isinstance(step, CompiledStep) for step in steps]
    assert is_compiled[0]
    assert not any(is_compiled[1:])


def test_torch_compile_compiles_late_what_a_session_needs(kept):
    """No session was there when the graph was kept: its kinds of steps are not."""
    with torch.no_grad():
        torch.compile(Plain(), backend="mosaic", dynamic=True)(IDS)
        as_elsewhere()
        compiled = torch.compile(Plain(), backend="mosaic", dynamic=True)
        with nothing_is_compiled():
            want = compiled(IDS)
    with mosaic_compiler.Session(compiled) as session:
        torch.testing.assert_close(session.full(IDS), want)
        torch.testing.assert_close(session.reuse(IDS, range(4, 9))[:, 4:9], want[:, 4:9])
    as_elsewhere()
    with nothing_is_compiled(), mosaic_compiler.Session(compiled) as session:
        torch.testing.assert_close(session.full(IDS), want)


def test_sessions(kept):
    with mosaic_compiler.Session(toy()) as session:
        want, some = session.full(IDS), session.reuse(IDS, range(4, 9))
    with nothing_is_compiled(), mosaic_compiler.Session(toy()) as session:
        torch.testing.assert_close(session.full(IDS), want, rtol=0, atol=0)
        torch.testing.assert_close(session.reuse(IDS, range(4, 9)), some, rtol=0, atol=0)
        assert session.nbytes > 0


def test_plans_ahead_and_reports(kept):
    ids = IDS.clone()
    most = mosaic_compiler.max_tokens(toy(), (ids,), "1MiB")
    report = mosaic_compiler.explain(toy(), ids, memory_budget="1MiB")
    as_elsewhere()
    with nothing_is_compiled():
        assert mosaic_compiler.max_tokens(toy(), (ids,), "1MiB") == most
        again = mosaic_compiler.explain(toy(), ids, memory_budget="1MiB")
    assert again.plan == report.plan
    assert str(again) == str(report)
    torch.testing.assert_close(again.result, report.result)


def test_options_that_are_for_running_do_not_compile_again(kept):
    mosaic_compiler.compile(toy())(IDS)
    want = toy()(IDS)
    with nothing_is_compiled():
        for options in ({"chunk_rows": 3}, {"poison": True}, {"placement": "size"}, {"memory_budget": 700_000}):
            torch.testing.assert_close(mosaic_compiler.compile(toy(), **options)(IDS), want)


def test_generate(kept, tiny_llada):
    from mosaic_compiler.sampling import compiled

    compiled._known.clear()  # another test may have compiled this model, with another folder
    as_elsewhere()
    prompt = torch.arange(5, 15)[None]
    given = {"gen_length": 6, "steps": 2}
    want = mosaic_compiler.generate(tiny_llada, prompt, **given).sequences
    dual = mosaic_compiler.generate(tiny_llada, prompt, cache="dual", **given).sequences
    as_elsewhere()
    compiled._known.clear()
    with nothing_is_compiled():
        again = mosaic_compiler.generate(tiny_llada, prompt, **given)
        assert torch.equal(again.sequences, want)
        assert again.plan is not None
        assert torch.equal(mosaic_compiler.generate(tiny_llada, prompt, cache="dual", **given).sequences, dual)
        longer = mosaic_compiler.generate(tiny_llada, prompt, gen_length=11, steps=3, memory_budget="30MiB")
        assert longer.sequences.shape[1] == 21


@pytest.mark.fuse
def test_kernels(kept):
    from mosaic_compiler.kernels import fused

    fused.kernel_for.cache_clear()
    fused._kernels.clear()
    want = mosaic_compiler.compile(toy())(IDS)
    assert [entry for entry in the_folder().entries() if entry.kind == "kernel"]
    fused.kernel_for.cache_clear()
    fused._kernels.clear()
    generated, fused.FusedKernel._generated = fused.FusedKernel._generated, None
    try:
        with nothing_is_compiled():
            torch.testing.assert_close(mosaic_compiler.compile(toy())(IDS), want, rtol=0, atol=0)
    finally:
        fused.FusedKernel._generated = generated
    for entry in the_folder().entries():  # without their kernels, clusters are compiled from what is known of them
        if entry.kind == "kernel":
            entry.path.unlink()
    fused.kernel_for.cache_clear()
    fused._kernels.clear()
    with nothing_is_compiled():
        torch.testing.assert_close(mosaic_compiler.compile(toy())(IDS), want, rtol=0, atol=0)


PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import mosaic_compiler
from mosaic_compiler import backend
from tests import test_kept
if sys.argv[2] == "hit":
    backend.compile_aten = None
    torch.compile = None
out = mosaic_compiler.compile(test_kept.toy())(test_kept.IDS)
torch.testing.assert_close(out, test_kept.toy()(test_kept.IDS))
print(out.double().sum().item())
"""


@pytest.mark.slow
def test_a_folder_can_be_copied(tmp_path):
    """Another process, with other hashes of strings, and the folder in another place."""
    said = []
    for number, (what, seed) in enumerate((("miss", "1"), ("hit", "2"))):
        environment = {"MOSAIC_CACHE": str(tmp_path / what), "PYTHONHASHSEED": seed, "MOSAIC_DISABLE": "fuse"}
        if number:
            shutil.copytree(tmp_path / "miss", tmp_path / "hit")
        ran = subprocess.run(
            [sys.executable, "-c", PROCESS, str(Path(__file__).parent.parent), what],
            env={**__import__("os").environ, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout)
    assert said[0] == said[1]


# --------------------------------------------------------------------------------------------- not kept
def test_graph_breaks_are_not_kept(kept, caplog):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = toy()

        def forward(self, ids):
            x = self.inner(ids)
            return x.relu() if x.sum().item() > 0 else x * 2

    with caplog.at_level("INFO", "mosaic_compiler"):
        torch.testing.assert_close(mosaic_compiler.compile(Broken())(IDS), Broken()(IDS))
    assert any("compiled again in every process" in record.message for record in caplog.records)
    with counting() as steps:
        as_elsewhere()
        torch.testing.assert_close(mosaic_compiler.compile(Broken())(IDS), Broken()(IDS))
    assert steps


def test_what_counts_its_calls_is_not_kept(kept):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = toy(), 0

        def forward(self, ids):
            self.calls += 1
            return self.inner(ids)

    model = Counting()
    compiled = mosaic_compiler.compile(model)
    for _ in range(3):
        compiled(IDS)
    assert model.calls == 3
    model = Counting()
    mosaic_compiler.compile(model)(IDS)
    assert model.calls == 1


def test_results_that_depend_on_sizes_are_not_kept(kept):
    def sized(ids):
        return toy_model(ids), ids.shape[1]

    toy_model = toy()
    for length in (20, 11):
        logits, found = mosaic_compiler.compile(sized)(IDS[:, :length])
        assert found == length
        torch.testing.assert_close(logits, toy_model(IDS[:, :length]))


def test_without_a_folder_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mosaic_compiler.compile(toy())(IDS)
    assert not list(tmp_path.iterdir())


def test_damaged_entries_are_made_again(kept):
    want = mosaic_compiler.compile(toy())(IDS)
    for entry in the_folder().entries():
        raw = entry.path.read_bytes()
        entry.path.write_bytes(raw[: len(raw) // 2] + b"?" + raw[len(raw) // 2 + 1 :])
    with counting() as steps:
        as_elsewhere()
        torch.testing.assert_close(mosaic_compiler.compile(toy())(IDS), want)
    assert len(steps) == 1
    with nothing_is_compiled():
        mosaic_compiler.compile(toy())(IDS)


def changes(lowered):
    """Steps as data with one thing wrong."""
    graph = lowered.graph
    ops = list(graph.ops)
    used = next(i for i, op in enumerate(ops) if op.dies)
    yield "an op is missing", dataclasses.replace(lowered, graph=dataclasses.replace(graph, ops=tuple(ops[1:])))
    yield (
        "two ops have changed places",
        dataclasses.replace(lowered, graph=dataclasses.replace(graph, ops=(*reversed(ops),))),
    )
    early = [dataclasses.replace(op, dies=(*op.dies, *(root for root in op.roots if root))) for op in ops]
    yield "everything dies at once", dataclasses.replace(lowered, graph=dataclasses.replace(graph, ops=tuple(early)))
    other = dataclasses.replace(ops[used], buffers=("nowhere",))
    yield (
        "a buffer has no place",
        dataclasses.replace(lowered, graph=dataclasses.replace(graph, ops=(*ops[:used], other, *ops[used + 1 :]))),
    )
    twice = dataclasses.replace(ops[-1], name=ops[0].name)
    yield (
        "two values have one name",
        dataclasses.replace(lowered, graph=dataclasses.replace(graph, ops=(*ops[:-1], twice))),
    )


def test_what_does_not_hold_together_is_not_run(kept, caplog):
    """Checksums do not say that a file makes sense: its steps are checked as well."""
    with counting() as steps:
        mosaic_compiler.compile(toy())(IDS)
    step = steps[0].kept.data()
    check_lowered(step)
    name = [*step.variants][-1]
    seen = 0
    for what, lowered in changes(step.variants[name]):
        wrong = dataclasses.replace(step, variants={**step.variants, name: lowered})
        with pytest.raises(CacheError):
            check_lowered(wrong)
        assert what
        seen += 1
    assert seen == 5
    folder = the_folder()
    (entry,) = [entry for entry in folder.entries() if entry.kind == "step"]
    facts, bindings = unpack(folder.read("step", entry.path.name))
    folder.write("step", entry.path.name, pack((dataclasses.replace(facts, kept=wrong), bindings)))
    with counting() as steps:
        as_elsewhere()
        torch.testing.assert_close(mosaic_compiler.compile(toy())(IDS), toy()(IDS))
    assert len(steps) == 1, "it was compiled again"
    assert any("thrown away" in record.message for record in caplog.records)


# ---------------------------------------------------------------------------------------- perturbations
class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args) * 2


def _twice(module, args, output):
    return output * 2


def _scaled_forward(self, x):
    return Attention.forward(self, x) * 0.5


def edit_attribute(model, monkeypatch, n):
    model.layers[n % 2].scaling = [0.25, 0.5, 0.75, 1.0][n % 4]


def edit_config(model, monkeypatch, n):
    model.config.eps = [1e-6, 0.1, 0.2][n % 3]


def edit_branch(model, monkeypatch, n):
    model.config.gated = bool(n % 2)


def edit_irrelevant(model, monkeypatch, n):
    model.config.name = f"toy {n % 3}"


def edit_heads(model, monkeypatch, n):
    model.config.heads = [1, 2, 4][n % 3]


def edit_constant(model, monkeypatch, n):
    monkeypatch.setattr(sys.modules[__name__], "EPSILON", [1e-5, 0.3, 0.7][n % 3])


def edit_table(model, monkeypatch, n):
    monkeypatch.setitem(TABLE, "scale", [1.0, 1.5, 2.0][n % 3])


def edit_helper(model, monkeypatch, n):
    bodies = [
        lambda x, weight: F.layer_norm(x, (HIDDEN,), weight, None, EPSILON),
        lambda x, weight: F.layer_norm(x, (HIDDEN,), None, None, EPSILON),
        lambda x, weight: x * weight,
    ]
    monkeypatch.setattr(sys.modules[__name__], "normed", bodies[n % 3])


def edit_class(model, monkeypatch, n):
    factor = [1.0, 3.0][n % 2]
    monkeypatch.setattr(
        Attention, "heads", lambda self, x: factor * x.unflatten(-1, (self.config.heads, -1)).mT.mT.transpose(1, 2)
    )


def edit_instance(model, monkeypatch, n):
    model.layers[n % 2].forward = types.MethodType(_scaled_forward, model.layers[n % 2])


def edit_hook(model, monkeypatch, n):
    model.layers[n % 2].register_forward_hook(_twice)


def edit_activation(model, monkeypatch, n):
    model.activation = [F.silu, F.gelu, torch.tanh, functools.partial(F.leaky_relu, negative_slope=0.1 * (n % 4))][
        n % 4
    ]


def edit_weights(model, monkeypatch, n):
    model.head.weight = nn.Parameter(torch.randn(31, HIDDEN), requires_grad=False)


def edit_tied(model, monkeypatch, n):
    model.head.weight = model.embed.weight


def edit_layout(model, monkeypatch, n):
    model.head.weight = nn.Parameter(torch.randn(HIDDEN, 31).t(), requires_grad=False)


def edit_dtype(model, monkeypatch, n):
    model.to([torch.float64, torch.float32][n % 2])


def edit_layers(model, monkeypatch, n):
    del model.layers[1:]


def edit_order(model, monkeypatch, n):
    model.layers = nn.ModuleList(reversed(model.layers))


def edit_bias(model, monkeypatch, n):
    model.head.bias = nn.Parameter(torch.ones(31), requires_grad=False)


def edit_buffer(model, monkeypatch, n):
    model.offset = [torch.ones(HIDDEN), torch.ones(1), torch.ones(())][n % 3].to(model.offset.dtype)


def edit_wrapping(model, monkeypatch, n):
    model.layers[1] = Wrapped(model.layers[1])


def edit_default(model, monkeypatch, n):
    def shifted(x, by=float(n % 3)):
        return F.silu(x) + by

    model.activation = shifted


def edit_sharing(model, monkeypatch, n):
    model.layers[1] = model.layers[0]


def edit_kernels_of_attention(model, monkeypatch, n):
    monkeypatch.setattr(torch.backends.cuda, "math_sdp_enabled", lambda: bool(n % 2))


def edit_version(model, monkeypatch, n):
    monkeypatch.setattr(artifacts, "machine_of", lambda device: ("another machine", n % 3))
    monkeypatch.setattr(owned, "machine_of", lambda device: ("another machine", n % 3))


def edit_sources(model, monkeypatch, n):
    monkeypatch.setattr(owned, "sources_digest", lambda: f"sources {n % 2}")


EDITS = [value for name, value in sorted(globals().items()) if name.startswith("edit_")]
OPTIONS = [{}, {}, {"disable": ["row-demand"]}, {"disable": ["chunk-loops"]}, {"vocabulary_tile": 8}, {"chunk_rows": 4}]
BATCHES = [(1, 20), (1, 7), (2, 10), (1, 1), (4, 5)]


def perturbed(edits, options, batch, folder):
    """Whether an entry was used, with a model that was changed in these ways; results are eager PyTorch's."""
    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        monkeypatch.setenv("MOSAIC_CACHE", str(folder))
        model = toy(seed=3)
        for edit, n in edits:
            edit(model, monkeypatch, n)
        ids = IDS.reshape(-1)[: batch[0] * batch[1]].reshape(batch)
        want = model(ids)
        as_elsewhere()
        with counting() as steps:
            got = mosaic_compiler.compile(model, **options)(ids)
            again = mosaic_compiler.compile(model, **options)(ids)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-5)
        return not steps


def edits():
    return st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, 11)), max_size=3)


def possible(edits):
    """What eager PyTorch can run: not two that are about the same layer's class."""
    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        model = toy(seed=3)
        try:
            for edit, n in edits:
                edit(model, monkeypatch, n)
            model(IDS)
        except (RuntimeError, AttributeError, IndexError, TypeError):
            return False
    return True


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("perturbations")


@pytest.mark.parametrize("count", [pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]), 12])
def test_no_entry_is_used_that_should_not_be(shared, count):
    """Random edits of a model, options and sizes, all on one folder: whatever is served is what eager PyTorch says."""
    used = []

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(edits().filter(possible), st.sampled_from(OPTIONS), st.sampled_from(BATCHES))
    def check(edits, options, batch):
        used.append(perturbed(edits, options, batch, shared))

    check()
    if count > 100:
        assert any(used), "entries are used at all"
        assert not all(used)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_each_edit_is_seen_or_does_not_matter(edit):
    """Equal hashes only where results are equal, too; two numbers of one edit tell which."""
    found = {}
    for n in range(12):
        with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
            model = toy(seed=3)
            torch.manual_seed(n)
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            edit(model, monkeypatch, n)
            digest = Fingerprint(model).digest
            is_about_values = any(
                not torch.equal(t, weights.get(k, t.new_zeros(0))) for k, t in model.state_dict().items()
            )
            if not is_about_values:
                found.setdefault(digest, []).append(model(IDS))
    for results in found.values():
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_hashes_are_the_same_in_each_process(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.test_kept import toy\n"
        "from mosaic_compiler.owned.fingerprint import Fingerprint\n"
        "print(Fingerprint(toy()).digest)"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent.parent)],
            env={**__import__("os").environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1


def test_a_module_that_changes_between_calls_is_looked_at_again(kept):
    model = toy()
    mosaic_compiler.compile(model)(IDS)
    compiled = mosaic_compiler.compile(toy())
    compiled(IDS)
    compiled.function.layers[0].scaling = 2.0
    torch.testing.assert_close(compiled(IDS), compiled.function(IDS))
    compiled.function.layers[1].register_forward_hook(_twice)
    torch.testing.assert_close(compiled(IDS), compiled.function(IDS))
    compiled.function.head.weight = nn.Parameter(torch.randn(31, HIDDEN), requires_grad=False)
    torch.testing.assert_close(compiled(IDS), compiled.function(IDS))


def test_two_folders_do_not_know_of_each_other(tmp_path, monkeypatch):
    for name in ("one", "two"):
        monkeypatch.setenv("MOSAIC_CACHE", str(tmp_path / name))
        as_elsewhere()
        with counting() as steps:
            mosaic_compiler.compile(toy())(IDS)
        assert len(steps) == 1
    assert Folder(tmp_path / "one").entries()
    assert folders.the_folder().root == tmp_path / "two"


def test_what_triton_has_compiled_is_found_in_another_folder(tmp_path, monkeypatch):
    """Its lists of files have whole paths in them."""
    cache = pytest.importorskip("triton.runtime.cache")
    before, after = tmp_path / "made", tmp_path / "read"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(before / "triton"))
    manager = cache.FileCacheManager("KEY")
    manager.put_group("kernel.json", {"kernel.cubin": manager.put(b"\0code", "kernel.cubin")})
    files = artifacts._files_below(before)
    shutil.rmtree(before)
    for name, content in files.items():
        (after / name).parent.mkdir(parents=True, exist_ok=True)
        (after / name).write_bytes(moved(name, content, artifacts._HERE, after))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(after / "triton"))
    found = cache.FileCacheManager("KEY").get_group("kernel.json")
    assert found == {"kernel.cubin": str(after / "triton" / "KEY" / "kernel.cubin")}
    assert Path(found["kernel.cubin"]).read_bytes() == b"\0code"


def test_kernels_are_found_behind_wrappers():
    module: dict[str, object] = {"kernel_0": object()}
    exec("class Runner:\n    def call(self, arguments):\n        return kernel_0", module)
    call = module["Runner"]().call

    def aligned(arguments):
        return call(arguments)

    for wrapped in (call, aligned, functools.partial(aligned)):
        assert artifacts._scope_of(wrapped, ["kernel_0"])["kernel_0"] is module["kernel_0"]
    assert artifacts._scope_of(aligned, ["kernel_1"]) == {}


def test_a_kernel_that_has_measured_has_chosen():
    def launcher(block, warps):
        return types.SimpleNamespace(
            config=types.SimpleNamespace(kwargs={"XBLOCK": block}, num_warps=warps, num_stages=1)
        )

    assert chosen_launch(types.SimpleNamespace(launchers=[launcher(64, 4), launcher(128, 4)])) is None
    chosen = chosen_launch(types.SimpleNamespace(launchers=[launcher(64, 4)]))
    assert chosen == unpack(pack(chosen)) != chosen_launch(types.SimpleNamespace(launchers=[launcher(64, 8)]))


class Holding(torch.nn.Module):
    """Reads what it holds in all kinds of things."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.factor, self.numbers = 1.5, {"a": 2.5}
        self.order = collections.OrderedDict(first=1.0, second=2.0)
        self.last = collections.deque([3.0])

    def forward(self, x):
        result = self.linear(x) * self.factor + self.numbers.get("a", 0.0)
        for number, each in enumerate(self.order.values()):
            result = result + number * each
        return result + self.last[-1] * getattr(self, "other", 1.0)


def rename(model):
    model.__dict__["other"] = model.__dict__.pop("factor")
    model.factor = 1.0


@pytest.mark.parametrize(
    "changes",
    [
        # an equal number is another object, whose address the next one may get
        [lambda m: setattr(m, "factor", float("1.5")), lambda m: setattr(m, "factor", float("7.25"))],
        [lambda m: m.numbers.update(a=float("2.5")), lambda m: m.numbers.update(a=float("9.5"))],
        [lambda m: m.order.move_to_end("first")],
        [lambda m: m.last.append(8.0)],
        [rename],
        [lambda m: m.linear.register_forward_hook(lambda module, given, result: result + 1)],
    ],
)
def test_what_a_model_holds_is_looked_at_in_every_call(changes):
    model, x = Holding(), torch.randn(2, 4)
    step = mosaic_compiler.compile(model)
    with torch.no_grad():
        for change in [lambda m: None, *changes, *changes[-1:]]:
            change(model)
            torch.testing.assert_close(step(x), model(x))
