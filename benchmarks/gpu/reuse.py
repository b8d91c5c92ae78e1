"""Steps of 32 rows against keys and values that are kept, and what keeping them costs a full step.

State of long sequences is filled with random numbers, because computing it takes a minute.  ``stream`` is the time per
step of steps that are called one behind the other, ``alone`` that of one whose result is waited for, ``device`` that of
its kernels, replayed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.gpu.benchmark import Benchmark, Row, quotient
from benchmarks.gpu.models import MODELS, Session, clean, device, synchronize
from mosaic_compiler import Session as Kept
from mosaic_compiler.runtime.state import Block

ROWS, BANDWIDTH = 32, 3.0e12


class Propose(nn.Module):
    """The likeliest token of some rows, and its probability: what a sampler needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[1, N] ids, [M] rows -> [M] tokens and probabilities."""
        logits = self.model(ids).logits.flatten(0, 1).index_select(0, rows)
        token = logits.argmax(-1)
        return token, torch.softmax(logits, -1).gather(-1, token.unsqueeze(-1)).squeeze(-1)


def measure(session: Session, lengths: list[int], full_lengths: list[int]) -> list[Row]:
    """One row per length."""
    propose = Propose(session.step.model)
    rows: list[Row] = []
    with Kept(propose) as kept:
        _call(kept, session.name, 2048)
        for tokens in full_lengths:
            rows.append({"model": session.name, "tokens": tokens, **_full(kept, session.name, tokens)})
            print(rows[-1], flush=True)
        with _filled_with_noise():
            for tokens in lengths:
                rows.append({"model": session.name, "tokens": tokens, **_reuse(kept, session, tokens)})
                print(rows[-1], flush=True)
    clean()
    return rows


def _arguments(name: str, tokens: int) -> tuple[Tensor, Tensor, range]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(101, MODELS[name].vocabulary, (1, tokens), generator=generator).to(device())
    computed = range(tokens - 2 * ROWS, tokens - ROWS)
    return ids, torch.tensor(list(computed), device=device()), computed


def _call(kept: Kept, name: str, tokens: int) -> None:
    ids, rows, computed = _arguments(name, tokens)
    kept.full(ids, rows)
    for _ in range(3):  # bound, recorded, replayed
        kept.reuse(ids, computed, rows)


def _full(kept: Kept, name: str, tokens: int) -> Row:
    """A full step that keeps state, against one that does not, in turns."""
    ids, rows, _ = _arguments(name, tokens)
    plain = kept._function
    took: dict[str, list[float]] = {"plain": [], "keeping": []}
    with torch.no_grad():
        for _ in range(9):
            for kind, call in (("plain", lambda: plain(ids, rows)), ("keeping", lambda: kept.full(ids, rows))):
                took[kind].append(_clocked(call))
    return {f"full_{kind}_ms": 1e3 * statistics.mean(times[2:]) for kind, times in took.items()}


def _reuse(kept: Kept, session: Session, tokens: int) -> Row:
    ids, rows, computed = _arguments(session.name, tokens)
    _call(kept, session.name, tokens)
    alone = [_clocked(lambda: kept.reuse(ids, computed, rows)) for _ in range(30)]
    stream = _clocked(lambda: [kept.reuse(ids, computed, rows) for _ in range(30)]) / 30
    weights = sum(p.numel() * p.element_size() for p in session.step.parameters())
    return {
        "alone_ms": 1e3 * statistics.median(alone),
        "stream_ms": 1e3 * stream,
        "device_ms": _on_device(kept),
        "floor_ms": 1e3 * (weights + kept.nbytes) / BANDWIDTH,
        "state": kept.nbytes,
    }


def _on_device(kept: Kept) -> float | None:
    """The last program's kernels, replayed."""
    assert kept._store is not None
    reuse: Any = kept._store.ran[0].reuse
    recorder = [*reuse._programs.values()][-1].program.recorder
    if recorder is None or recorder._graph is None:
        return None
    return 1e3 * _clocked(lambda: [recorder._graph.replay() for _ in range(30)]) / 30


def _clocked(call: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


@contextmanager
def _filled_with_noise() -> Any:
    """Full steps map state, and fill it without computing it."""

    def keep(self: Block, inputs: Any) -> list[Any]:
        self._map(inputs)
        for tensor in self.tensors:
            tensor.normal_()
        self._weights, self.is_valid = self._weights_in(inputs), True
        return [torch.zeros(ROWS, device=self.device, dtype=torch.int64), torch.zeros(ROWS, device=self.device)]

    with mock.patch.object(Block, "keep", keep):
        yield


def _lengths(name: str, given: argparse.Namespace) -> list[int]:
    known = {"Dream-7B": [16_384, 61_440, 262_144], "LLaDA-8B": [4_096, 16_384, 61_440]}
    return given.kept or known.get(name, [4_096])


def _add_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--kept", nargs="*", type=int, default=[], help="tokens that are kept")


BENCHMARK = Benchmark(
    "reuse",
    lambda session, given: measure(session, _lengths(session.name, given), sorted({4096, 16_384, *given.lengths})[:2]),
    "milliseconds of steps of 32 rows, and of full steps",
    ["model", "tokens", "stream", "alone", "device", "floor", "full, keeping / plain"],
    lambda r: [
        r["model"], r["tokens"], *(r.get(f"{name}_ms") for name in ("stream", "alone", "device", "floor")),
        quotient(r, "full_keeping_ms", "full_plain_ms"),
    ],
    add_arguments=_add_arguments,
)  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
