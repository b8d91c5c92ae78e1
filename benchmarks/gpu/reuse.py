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
from mosaic_compiler.planning.selection import kept_keys
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


def measure(session: Session, lengths: list[int], full_lengths: list[int], kept_as: list[dict[str, Any]]) -> list[Row]:
    """One row per length and way to keep state: as it is computed, and with other options of the backend."""
    propose = Propose(session.step.model)
    rows: list[Row] = []
    for options in kept_as:
        rows += _measured(session, propose, options, lengths, full_lengths)
        clean()
    return rows


def _measured(
    session: Session, propose: nn.Module, options: dict[str, Any], lengths: list[int], full_lengths: list[int]
) -> list[Row]:
    rows: list[Row] = []
    said = {"model": session.name, **options}
    with Kept(propose, options=options) as kept:
        _call(kept, session.name, 2048)
        for tokens in full_lengths:
            rows.append({**said, "tokens": tokens, **_full(kept, session.name, tokens)})
            print(rows[-1], flush=True)
        with _filled_with_noise():
            for tokens in lengths:
                rows.append({**said, "tokens": tokens, **_reuse(kept, session, tokens)})
                print(rows[-1], flush=True)
    return rows


def _arguments(name: str, tokens: int) -> tuple[Tensor, Tensor, range]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(101, MODELS[name].vocabulary, (1, tokens), generator=generator).to(device())
    computed = range(tokens - 2 * ROWS, tokens - ROWS)
    return ids, torch.tensor(list(computed), device=device()), computed


def _call(kept: Kept, name: str, tokens: int) -> None:
    ids, rows, computed = _arguments(name, tokens)
    kept.full(ids, rows, **_for(kept, computed))
    for _ in range(3):  # bound, recorded, replayed
        kept.reuse(ids, computed, rows)


def _for(kept: Kept, computed: range) -> dict[str, Any]:
    """The rows that keys are chosen for, if they are."""
    assert kept._store is not None
    return {} if kept._store.keep is None else {"rows": computed}


def _full(kept: Kept, name: str, tokens: int) -> Row:
    """A full step that keeps state, against one that does not, in turns."""
    ids, rows, computed = _arguments(name, tokens)
    more = _for(kept, computed)
    plain = kept._function
    took: dict[str, list[float]] = {"plain": [], "keeping": []}
    with torch.no_grad():
        for _ in range(9):
            for kind, call in (("plain", lambda: plain(ids, rows)), ("keeping", lambda: kept.full(ids, rows, **more))):
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


def _fill(tensor: Tensor, rows: Tensor | None, length: int) -> None:
    """Numbers, codes of any value, or positions: those of the computed rows, and every so many of the others."""
    if tensor.dtype == torch.int64:
        assert rows is not None
        others = torch.linspace(0, int(rows.min()) - 1, tensor.shape[2] - rows.shape[1], device=tensor.device)
        tensor.copy_(torch.cat([others.long(), rows.sort(1).values[0]]))
    elif tensor.dtype in (torch.uint8, torch.int8):
        tensor.random_(1, 120)  # no NaN of fp8
    else:
        tensor.normal_()


@contextmanager
def _filled_with_noise() -> Any:
    """Full steps map state, and fill it without computing it."""

    def keep(self: Block, inputs: Any, rows: Tensor | None = None, keep: float | int | None = None) -> list[Any]:
        if self.selects:
            assert rows is not None
            keep = self.full.options.cache_keep if keep is None else keep
            assert keep is not None
            self._for_rows, length = rows.sort(1).values, inputs[0].shape[1]
            self._keys = kept_keys(keep, length, rows.shape[1])
        self._map(inputs)
        for tensor in self.tensors:
            _fill(tensor, rows, inputs[0].shape[1])
        self._weights, self.is_valid = self._weights_in(inputs), True
        return [torch.zeros(ROWS, device=self.device, dtype=torch.int64), torch.zeros(ROWS, device=self.device)]

    with mock.patch.object(Block, "keep", keep):
        yield


def _lengths(name: str, given: argparse.Namespace) -> list[int]:
    known = {"Dream-7B": [16_384, 61_440, 262_144], "LLaDA-8B": [4_096, 16_384, 61_440]}
    return given.kept or known.get(name, [4_096])


def _add_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--kept", nargs="*", type=int, default=[], help="tokens that are kept")
    made.add_argument("--cache-dtype", nargs="*", default=[], help="precisions of state")
    made.add_argument("--cache-keep", nargs="*", type=float, default=[], help="shares of keys")
    made.add_argument("--no-exact", action="store_true", help="not as it is computed")
    made.add_argument("--reuse-only", action="store_true", help="no full steps")


def _ways(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Options of the backend: how state is kept."""
    found: list[dict[str, Any]] = [] if given.no_exact else [{}]
    found += [{"cache_dtype": name} for name in given.cache_dtype]
    return found + [{"cache_keep": keep} for keep in given.cache_keep]


BENCHMARK = Benchmark(
    "reuse",
    lambda session, given: measure(
        session,
        _lengths(session.name, given),
        sorted({4096, 16_384, *given.lengths})[: 0 if given.reuse_only else 2],
        _ways(given),
    ),
    "milliseconds of steps of 32 rows, and of full steps",
    ["model", "tokens", "kept as", "stream", "alone", "device", "floor", "full, keeping / plain"],
    lambda r: [
        r["model"], r["tokens"], r.get("cache_dtype") or r.get("cache_keep") or "exact",
        *(r.get(f"{name}_ms") for name in ("stream", "alone", "device", "floor")),
        quotient(r, "full_keeping_ms", "full_plain_ms"),
    ],
    add_arguments=_add_arguments,
)  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
