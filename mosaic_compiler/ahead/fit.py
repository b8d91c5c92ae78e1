"""``mosaic fit``: does a model run at N tokens in B bytes?  Needs no weights and no GPU, and traces each model once.

What tracing finds out (:class:`planning.outline.StepOutline`) is kept on disk under a hash of everything that it
depends on, so that later questions need neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaic_compiler.ahead.cached import Stateful, longest_that, stateful
from mosaic_compiler.ahead.configs import DTYPES, build
from mosaic_compiler.disk.folder import Folder, sources_digest, the_folder
from mosaic_compiler.disk.values import read, write
from mosaic_compiler.errors import BudgetError, CaptureError, ConfigError
from mosaic_compiler.planning.buffers import lower_bound
from mosaic_compiler.planning.outline import StepOutline
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.planning.selection import Selection

RESERVE = 600 << 20
"""Bytes of a card that CUDA itself takes."""

IN_AND_OUT = 17
"""Bytes per token of a step's inputs (ids, window) and of what it returns."""


@dataclass(frozen=True)
class Traced:
    """What is known of a model's denoising step.

    Attributes:
        outline: the step as this compiler runs it.
        eager: the same for the graph as it was captured, whose bytes live are what eager PyTorch needs.
        weights: bytes of the parameters.
        stateful: steps that keep state and use it, if that was asked for.
    """

    outline: StepOutline
    eager: StepOutline
    weights: int
    stateful: Stateful | None = None


@dataclass(frozen=True)
class Answer:
    """For one length: the plan (``None`` if the step does not fit), and what eager would need."""

    tokens: int
    plan: MemoryPlan | None
    problem: str
    eager_peak: int


def traced(
    config: Mapping[str, Any],
    dtype: str = "bfloat16",
    device: str = "auto",
    cache: Path | None = None,
    on_trace: Callable[[], None] = lambda: None,
    with_state: bool = False,
    precision: str | None = None,
    selection: Selection | None = None,
) -> Traced:
    """Trace a model's step, or take it from the cache.

    Args:
        config: see :func:`~mosaic_compiler.ahead.configs.load_config`.
        dtype: one of :data:`DTYPES`.
        device: whose kernels are planned for: ``cuda`` (where torch can use a GPU), ``cpu``, or ``auto``.
        on_trace: called if the model has to be traced.
        with_state: also steps that keep state.
        precision: of state, as ``generate(cache_dtype=)`` takes it.
        selection: how keys are chosen; ``None``: all are kept.
        cache: folder; ``None``: what ``MOSAIC_CACHE`` says.

    Raises:
        ConfigError: if transformers cannot build such a model, or its forward fails.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"device {device!r} is none of auto, cuda, cpu")
    folder = the_folder() if cache is None else Folder(cache)
    key = _key(config, dtype, device, with_state, precision, selection)
    known = read(folder, "fit", key)
    if isinstance(known, Traced):
        return known
    found = _trace(config, dtype, device, on_trace, with_state, precision, selection)
    write(folder, "fit", key, found, str(config.get("model_type", "")))
    return found


def answer(model: Traced, tokens: int, room: int, row_share: float = 0.5) -> Answer:
    """The plan for one length in ``room`` bytes besides weights."""
    budget = room - IN_AND_OUT * tokens
    eager_peak = _eager_peak(model, tokens)
    if budget <= 0:
        return Answer(tokens, None, "no room is left beside the weights", eager_peak)
    try:
        return Answer(tokens, model.outline.plan_for(tokens, row_share, budget).plan, "", eager_peak)
    except BudgetError as error:
        return Answer(tokens, None, str(error), eager_peak)


def longest(model: Traced, room: int, row_share: float = 0.5) -> tuple[int, int]:
    """The most tokens that run in ``room`` bytes besides weights: with this compiler, and in eager PyTorch."""
    if room <= 0:
        return 0, 0
    found = 0
    for _ in range(4):  # inputs and results take room as well
        found = model.outline.longest(max(room - IN_AND_OUT * found, 1), row_share)
    return found, longest_that(lambda tokens: _eager_peak(model, tokens) <= room)


def _eager_peak(model: Traced, tokens: int) -> int:
    """Most bytes live at once where every op allocates its result and frees what nobody reads any more."""
    return lower_bound(model.eager.planner.lives.at(model.eager.sizes_for(tokens))) + IN_AND_OUT * tokens


def _key(
    config: Mapping[str, Any],
    dtype: str,
    device: str,
    with_state: bool,
    precision: str | None,
    selection: Selection | None,
) -> str:
    """A hash of everything that a trace depends on: config, versions, and this package's sources."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "sympy")}
    try:
        versions["transformers"] = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        versions["transformers"] = ""
    text = json.dumps([dict(config), dtype, device, with_state, precision, str(selection), versions], sort_keys=True)
    return hashlib.sha256(text.encode() + sources_digest().encode()).hexdigest()


def _trace(
    config: Mapping[str, Any],
    dtype: str,
    device: str,
    on_trace: Callable[[], None],
    with_state: bool,
    precision: str | None,
    selection: Selection | None,
) -> Traced:
    import torch

    from mosaic_compiler.ahead.forecast import capture_step
    from mosaic_compiler.lowering.lifetimes import find_lives
    from mosaic_compiler.sampling import DenoisingStep

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("planning with a GPU's kernels needs a GPU: use device auto, which takes the CPU's here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, mask = build(config, getattr(torch, dtype))
    on_trace()
    step = DenoisingStep(model, mask, block_causal=config.get("block_causal"))
    tokens = 64
    example = (
        torch.empty(1, tokens, dtype=torch.int64, device="meta"),
        torch.empty(1, tokens, dtype=torch.bool, device="meta"),
        torch.empty(1, dtype=torch.int64, device="meta"),
    )
    try:
        more = {} if selection is None else selection.options
        captured = capture_step(step, example, {"cache_dtype": precision, **more}, device=device, is_direct=True)
    except CaptureError as error:
        raise ConfigError(
            f"{config['model_type']}: {error}, or look for a value of the config that is missing or wrong"
        ) from error
    outline = captured.outline
    eager = find_lives(captured.captured).data()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = stateful(captured) if with_state else None
    return Traced(outline.data(), StepOutline({"eager": eager}, outline.hints, ()), weights, kept)
