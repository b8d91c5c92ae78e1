"""Canvas by canvas: DiffusionGemma's sampler.

    encode the prompt; for each canvas:
        random tokens; at most ``steps`` times:
            draw a token for every position
            keep those of which the model is surest, while their entropies sum up to ``entropy_bound``
            all others become random again
            stop when the most likely tokens have not changed, and entropies are low
        the most likely tokens are the text; encode them

Source: ``generation_diffusion_gemma.py`` of transformers.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_compiler.compat.dynamo import mark_sizes_fixed
from mosaic_compiler.errors import BudgetError
from mosaic_compiler.planning.budget import format_bytes, parse_budget
from mosaic_compiler.planning.plan import Fallback, MemoryPlan
from mosaic_compiler.runtime.engine import Step, running, within_budget
from mosaic_compiler.sampling import noise
from mosaic_compiler.sampling.canvas_model import CanvasStep, EncoderStep, Parts, check_conditioning, conditioned

PIECE = 4096
"""Tokens of a prompt that are encoded at a time."""


@dataclass(frozen=True)
class EntropyBound:
    """What the sampler can be told; the names are transformers'.

    Attributes:
        steps: at most so many for each canvas (``max_denoising_steps``).
        entropy_bound: in nats: tokens are kept, the surest first, while entropies of those before sum up to no more.
        t_max, t_min: temperatures of the first step, and behind the last one; it falls in a straight line.
        stability_threshold: a canvas is done when its most likely tokens were the same in so many steps before ..
        confidence_threshold: .. and its mean entropy is below this.
    """

    steps: int = 48
    entropy_bound: float = 0.1
    t_max: float = 0.8
    t_min: float = 0.4
    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    def check(self) -> None:
        """Raise :class:`ValueError` for what makes no sense."""
        for name in ("steps", "stability_threshold"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        for name in ("entropy_bound", "t_max", "t_min", "confidence_threshold"):
            if not isinstance(value := getattr(self, name), int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for name in ("entropy_bound", "confidence_threshold"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not (0 < self.t_min <= self.t_max < math.inf):
            raise ValueError(f"temperatures must be 0 < t_min <= t_max, got {self.t_min} and {self.t_max}")
        if self.stability_threshold < 0:
            raise ValueError(f"stability_threshold must be at least 0, got {self.stability_threshold}")


class CanvasRun:
    """One call of ``generate`` on a model with canvases.

    Args:
        prompt: int64 [B, P].
        length: new tokens; the last canvas is cut.
        eos: where rows end; ``None``: nowhere.
        options: of the backend.

    Attributes:
        ids: int64 [B, N], prompt and text.
        forwards, encoded: denoising steps, and passes of the encoder.
        state_bytes: keys and values, and what canvases are conditioned on.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: Tensor,
        length: int,
        sampler: EntropyBound,
        *,
        seed: int,
        eos: int | None,
        options: Mapping[str, Any],
        is_compiled: bool,
    ) -> None:
        self._known = _known_of(model)
        self._parts = self._known.parts
        self.sampler, self.ids, self._eos, self._seed = sampler, prompt, eos, seed
        self._end = prompt.shape[1] + length
        self.forwards = self.encoded = self._draws = 0
        self.plan: MemoryPlan | None = None
        self._ran: dict[int, Step] = {}
        given = dict(options)
        self._budget = parse_budget(given.pop("memory_budget", None))
        self._options, self._is_compiled = given, is_compiled
        self._kept: list[Tensor] = []
        self._shown: list[Tensor] = []
        self._tokens, self.state_bytes = 0, 0

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """What ran in another way than planned."""
        return tuple(dict.fromkeys(found for step in self._ran.values() for found in step.fallbacks))

    def look_again(self) -> None:
        """The compiled steps of a canvas look at the model in every call."""

    def ids_by_step(self) -> Iterator[Tensor]:
        """Run; the draft after each step, int64 [B, N]."""
        batch = self.ids.shape[0]
        check_conditioning(self._parts, self.ids)
        ended = torch.zeros(batch, dtype=torch.bool, device=self.ids.device)
        for begin in range(0, self.ids.shape[1], PIECE):
            self._encode(self.ids[:, begin : begin + PIECE])
        while self.ids.shape[1] < self._end:
            best = torch.empty(0)
            for best in self._denoised():
                yield torch.cat([self.ids, best], 1)[:, : self._end]
            if self._eos is not None:
                behind = (best == self._eos).cumsum(1) - (best == self._eos).long() > 0
                best = torch.where(behind | ended.unsqueeze(1), self._eos, best)
                ended = ended | (best == self._eos).any(1)
            self.ids = torch.cat([self.ids, best], 1)
            if bool(ended.all()) or self.ids.shape[1] >= self._end:
                break
            self._encode(best)
        self.ids = self.ids[:, : self._end]
        if self.ids.shape[1] < self._end:
            assert self._eos is not None
            more = self.ids.new_full((batch, self._end - self.ids.shape[1]), self._eos)
            self.ids = torch.cat([self.ids, more], 1)

    def _denoised(self) -> Iterator[Tensor]:
        """One canvas: its most likely tokens [B, C] after each step."""
        parts, given, batch = self._parts, self.sampler, self.ids.shape[0]
        shape = (batch, parts.canvas)
        cells = torch.arange(batch * parts.canvas, device=self.ids.device)
        # no view of anything, as those of later steps are not: Dynamo compiles those apart
        canvas, best = self._random(cells).view(shape).clone(), None
        soft = self._kept[0].new_zeros((*shape, parts.embedding.weight.shape[1]), dtype=parts.dtype)
        done = torch.zeros(batch, dtype=torch.bool, device=self.ids.device)
        history: list[Tensor] = []
        for left in range(given.steps, 0, -1):
            share = torch.tensor(left, dtype=torch.int32) / given.steps
            temperature = given.t_min + (given.t_max - given.t_min) * share
            keys = noise.row_keys(self._seed, noise.TOKENS, self._draws, cells)
            drawn, likely, entropy, made = self._step(canvas, soft, temperature, keys)
            self.forwards += 1
            fresh = torch.where(_surest(entropy, given.entropy_bound), drawn, self._random(cells).view(shape))
            if best is not None:  # rows that are done stay as they are
                likely = torch.where(done.unsqueeze(1), best, likely)
                fresh = torch.where(done.unsqueeze(1), canvas, fresh)
                made = torch.where(done[:, None, None], soft, made)
            last = history[len(history) - given.stability_threshold :] if given.stability_threshold else []
            stable = torch.full_like(done, len(last) == given.stability_threshold)
            for before in last:
                stable = stable & (before == likely).all(1)
            history = [*history, likely][-max(given.stability_threshold, 1) :]
            done = done | (stable & (entropy.mean(1) < given.confidence_threshold))
            canvas, best, soft = fresh, likely, made
            yield best
            if bool(done.all()):
                return

    def _random(self, cells: Tensor) -> Tensor:
        """int64 [B * C], tokens that are drawn evenly."""
        self._draws += 1
        keys = noise.row_keys(self._seed, noise.CANVAS, self._draws, cells)
        return (noise.uniform(keys, 1).squeeze(1) * self._parts.vocabulary).long()

    # ------------------------------------------------------------------------------------- the model
    def _step(self, canvas: Tensor, soft: Tensor, temperature: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        step = self._known.canvas
        with conditioned(step):
            begin = canvas.new_empty(1).expand(self._tokens)
            temperature = temperature.to(canvas.device)
            result: tuple[Tensor, ...] = self._run("canvas", step, canvas, soft, temperature, keys, begin, *self._shown)
            return result

    def _encode(self, ids: Tensor) -> None:
        """Put keys and values of more tokens behind those that are kept."""
        begin = ids.new_empty(1).expand(self._tokens)
        made = self._run("encoder", self._known.encoder, ids, begin, *self._shown)
        if not self._kept:
            self._make_room(made)
        for layer, (kept, tensor) in enumerate(zip(self._kept, made, strict=True)):
            at, window = self._tokens, self._parts.windows[layer // 2]
            if window:  # what nobody sees any more goes
                seen = kept[:, : min(self._tokens, window - 1)].transpose(1, 2)
                at, tensor = 0, torch.cat([seen, tensor], 2)[:, :, -(window - 1) :]
            kept[:, at : at + tensor.shape[2]] = tensor.transpose(1, 2)
        self._tokens += ids.shape[1]
        self._shown = self._views()
        self.encoded += 1

    def _make_room(self, made: tuple[Tensor, ...]) -> None:
        """Memory for keys and values of the whole text, and of a window where no more is seen."""
        parts = self._parts
        most = -(-self._end // parts.canvas) * parts.canvas + parts.canvas
        self._kept = []
        for layer, tensor in enumerate(made):
            window = parts.windows[layer // 2]
            rows = min(window - 1, most) if window else most
            self._kept.append(tensor.new_empty(tensor.shape[0], rows, tensor.shape[1], tensor.shape[3]))
        of_canvas = self.ids.shape[0] * parts.canvas * parts.embedding.weight.shape[1] * parts.dtype.itemsize
        self.state_bytes = sum(tensor.nbytes for tensor in self._kept) + of_canvas

    def _views(self) -> list[Tensor]:
        """Keys and values as the model wants them, [B, H, n, d]; where they stand."""
        found = []
        for layer, kept in enumerate(self._kept):
            window = self._parts.windows[layer // 2]
            count = min(self._tokens, window - 1) if window else self._tokens
            view = kept[:, :count].transpose(1, 2)
            mark_sizes_fixed(view, (0, 1, 3))
            found.append(view)
        return found

    def _run(self, name: str, module: nn.Module, *arguments: Any) -> Any:
        if not self._is_compiled:
            return module(*arguments)
        budget = self._budget
        if budget is not None and self.state_bytes:
            budget -= self.state_bytes
            if budget <= 0:
                raise BudgetError(
                    f"memory_budget {format_bytes(self._budget or 0)} is less than the state alone, which takes "
                    f"{format_bytes(self.state_bytes)}: keys and values of {self._end} tokens. Raise memory_budget, or "
                    "take a shorter text",
                    self.state_bytes,
                    self._budget or 0,
                    None,
                )
        ran: list[Step] = []
        with running(ran.append), within_budget(budget):
            result = self._known.compiled(name, module, self._options)(*arguments)
        self._ran.update({id(step): step for step in ran})
        for step in ran:
            if step.plan is not None and (self.plan is None or step.plan.peak > self.plan.peak):
                self.plan = step.plan
        return result


def _surest(entropy: Tensor, bound: float) -> Tensor:
    """bool [B, C]: the positions of least entropy, while the entropies of those before them sum up to no more."""
    ordered, order = torch.sort(entropy, dim=-1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered <= bound)


class _Known:
    """The parts of one model, and what is compiled of them."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = Parts(model)
        self.encoder, self.canvas = EncoderStep(self.parts), CanvasStep(self.parts)
        self._functions: dict[tuple[str, str], Callable[..., Any]] = {}

    def compiled(self, name: str, module: nn.Module, options: Mapping[str, Any]) -> Callable[..., Any]:
        key = name, repr(sorted(options.items()))
        if key not in self._functions:
            self._functions[key] = torch.compile(module, backend="mosaic", dynamic=True, options=dict(options))
        return self._functions[key]


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _known_of(model: nn.Module) -> _Known:
    if model not in _known:
        _known[model] = _Known(model)
    return _known[model]
