"""What cuDNN prepares for a new length is prepared while the step is planned and bound.  (The CPU's attention stands
in for cuDNN's; ``tests/test_gpu.py`` runs the real one.)"""

from __future__ import annotations

import threading

import pytest
import torch
from attentions import Attentions

import mosaic_compiler
from mosaic_compiler.backend import observing
from mosaic_compiler.book import scratch
from mosaic_compiler.errors import BudgetError
from mosaic_compiler.kernels import attention
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.planner import Planner
from mosaic_compiler.runtime import rehearsal
from mosaic_compiler.runtime.arena import PlainArena
from mosaic_compiler.runtime.pools import pool_for
from mosaic_compiler.runtime.program import _StepBinder
from mosaic_compiler.sampling import DenoisingStep, block_window

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
LAYERS = 3


class Bidirectional(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(32, 16)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(16, 48) for _ in range(LAYERS))
        self.head = torch.nn.Linear(16, 32)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.qkv:
            q, k, v = layer(x).view(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape_as(x)
        return self.head(x)


def arguments(tokens):
    ids = torch.arange(tokens).remainder(31).unsqueeze(0).masked_fill(torch.arange(tokens) % 2 == 0, 31)
    return ids, block_window(tokens, 0, tokens), torch.tensor([2])


@pytest.fixture
def compiled(monkeypatch):
    """Makes functions that run a step of so many tokens, and say how many attentions were called for it."""
    monkeypatch.setattr(scratch, "CUDNN", ATTENTION)
    mosaic_compiler.release_memory()
    eager = DenoisingStep(Bidirectional().eval().requires_grad_(False), 31)
    attentions = Attentions(ATTENTION, monkeypatch)

    def make(**options):
        torch._dynamo.reset()
        options = {"disable": ["fuse", "row-demand"], **options}
        fast = torch.compile(eager, backend="mosaic", dynamic=True, options=options)

        def call(tokens):
            given = arguments(tokens)
            attentions.seen.clear()
            result = fast(*given)
            assert torch.equal(result, eager(*given))
            assert all(one == attentions.seen[0] for one in attentions.seen)
            return len(attentions.seen)

        return call

    with torch.no_grad():
        yield make


def test_a_new_length_is_rehearsed_once(compiled):
    call = compiled()
    assert call(200) == LAYERS  # nothing is in the arena yet
    assert [call(tokens) for tokens in (40, 40, 44, 40, 200, 44)] == [LAYERS + extra for extra in (1, 0, 1, 0, 0, 0)]


def test_with_poison_and_under_inference_mode(compiled):
    call = compiled(poison=True)
    with torch.inference_mode():
        assert [call(tokens) for tokens in (200, 40)] == [LAYERS, LAYERS + 1]
    assert [call(tokens) for tokens in (44, 44, 200)] == [LAYERS + 1, LAYERS, LAYERS]


def test_planning_and_binding_happen_meanwhile(compiled, monkeypatch):
    call, threads = compiled(), []
    call(200)
    main = threading.get_ident()

    def watched(method):
        def run(*args):
            threads.append((method.__name__, threading.get_ident() == main))
            return method(*args)

        return run

    monkeypatch.setattr(Planner, "plan", watched(Planner.plan))
    monkeypatch.setattr(_StepBinder, "bind_node", watched(_StepBinder.bind_node))
    call(40)
    assert {name for name, _ in threads} == {"plan", "bind_node"}
    assert not any(is_main for _, is_main in threads)
    threads.clear()
    call(40)
    assert not threads  # a known length is bound already
    call(1000)  # more than what is in the arena: nothing is rehearsed
    assert threads
    assert all(is_main for _, is_main in threads)


def test_cudnn_keeps_plans_per_thread(compiled):
    call, found = compiled(), []
    call(200)
    assert call(40) == LAYERS + 1
    assert call(44) == LAYERS + 1

    def work():
        with torch.no_grad():
            found.append(call(44))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [LAYERS]  # its program is known


def test_only_where_it_pays(compiled, monkeypatch):
    call = compiled()
    call(200)
    monkeypatch.setattr(rehearsal, "_MOST_WORK", 4 * 2 * 8 * 40 * 40)  # of 40 tokens
    assert [call(tokens) for tokens in (40, 41)] == [LAYERS + 1, LAYERS]


def test_within_the_budget(compiled):
    with observing((steps := []).append):
        compiled()(200)
    (symbol, _), *_ = steps[0]._readers
    result = 40 * 16 * 4
    with steps[0]._pool.lease() as arena:
        for budget, is_enough in ((arena.reserved + result - 1, False), (arena.reserved + result, True)):
            rehearsed = rehearsal.Rehearsal(next(iter(steps[0].variants.values())).linked.graph, [symbol])
            assert (rehearsed.of(Sizes({symbol: 40}), arena, budget) is not None) == is_enough
            assert rehearsed.of(Sizes({symbol: 40}), arena, None) is None  # seen


def test_an_arena_that_moves_is_not_bound_before_it_has_its_place(compiled, monkeypatch):
    arena = PlainArena(torch.device("cpu"))
    monkeypatch.setattr(pool_for(torch.device("cpu")), "_arenas", [arena])
    call = compiled()
    assert [call(tokens) for tokens in (100, 40, 300, 200)] == [LAYERS] * 4


def test_errors_of_either_side_reach_the_caller_and_the_next_call_works(compiled, monkeypatch):
    call = compiled()
    call(200)
    with monkeypatch.context() as patch:

        def fails(self, node):
            raise RuntimeError("no more")

        patch.setattr(_StepBinder, "bind_node", fails)
        with pytest.raises(RuntimeError, match="no more"):
            call(40)
    assert call(40) == LAYERS
    with monkeypatch.context() as patch:

        def refuses(self, operands, arena):
            raise RuntimeError("no attention")

        patch.setattr(rehearsal.Rehearsal, "_run", refuses)
        with pytest.raises(RuntimeError, match="no attention"):
            call(44)
    assert call(44) == LAYERS
    with monkeypatch.context() as patch:

        def is_full(*args):
            raise torch.OutOfMemoryError

        patch.setattr("mosaic_compiler.runtime.arena.HostArena.tensor", is_full)
        with pytest.raises(torch.OutOfMemoryError):  # binding asks for tensors, too
            call(48)
    assert call(48) == LAYERS


def test_a_budget_that_does_not_suffice(compiled):
    call = compiled(memory_budget=650_000)
    call(60)
    for _ in range(2):
        with pytest.raises(BudgetError, match="budget is 650000"):
            call(2000)
    assert call(40) == LAYERS + 1


def test_operands_that_only_the_data_knows_are_not_rehearsed(monkeypatch):
    """Of the last layer the needed rows are attended; the first attention has all of them."""
    monkeypatch.setattr(scratch, "CUDNN", ATTENTION)
    monkeypatch.setattr(attention, "_WORTH_A_PLAN", 0)  # the CPU's has other arguments than FlashAttention
    with torch.no_grad(), observing((steps := []).append):
        step = DenoisingStep(Bidirectional().eval().requires_grad_(False), 31)
        torch.compile(step, backend="mosaic", dynamic=True, options={"disable": ["fuse"]})(*arguments(40))
    graph, known = steps[0].variants["flat"].linked.graph, [symbol for symbol, _ in steps[0]._readers]
    attentions = [linked for linked in graph.ops if linked.function is ATTENTION]
    assert [attention.makes_plan(linked.op.attention, known) for linked in attentions] == [True] * (LAYERS - 1) + [
        False
    ]
    assert not any(attention.makes_plan(linked.op.attention, []) for linked in attentions)
    assert rehearsal.Rehearsal(graph, known).node is attentions[0]
    assert rehearsal.Rehearsal(graph, []).node is None
