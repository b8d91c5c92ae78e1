"""``Proposer``: a model's proposals, compiled once whatever numbers a sampler is told, and what ran for them."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_compiler.errors import FallbackError
from mosaic_compiler.graph_log import logger
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning.budget import check_machine, parse_budget
from mosaic_compiler.planning.plan import Fallback, MemoryPlan
from mosaic_compiler.runtime.step import CompiledStep, running, within_budget
from mosaic_compiler.sampling.calls import ModelCall
from mosaic_compiler.sampling.proposal import HeadRows, Proposal

_UNLIMITED = 1 << 30

_EAGER = Fallback(
    "eager",
    "",
    "",
    "no graph of mosaic's ran: Dynamo is switched off, or could not compile the model's forward "
    "(TORCH_LOGS=graph_breaks says why), so the step ran in eager PyTorch, outside of any plan or budget",
    "",
)


class Proposer:
    """Proposes tokens for the rows of one call of ``generate()``.

    Budgets are limits of plans and everything that a sampler is told is an input, so neither is part of what is
    compiled: a model has one compiled proposal per kind of rule and per set of other options.

    Args:
        model, call, rule: see :class:`Proposal`.
        options: of the backend; ``None``: run in eager PyTorch.

    Raises:
        OptionsError: for an option that makes no sense.

    Attributes:
        plan: of all that ran, the one with the highest peak.
        fallbacks: what ran in another way than asked for, by name.
    """

    def __init__(self, model: nn.Module, call: ModelCall, rule: nn.Module, options: Mapping[str, Any] | None) -> None:
        self.plan: MemoryPlan | None = None
        self._fallbacks: dict[tuple[str, str], Fallback] = {}
        self._model, self._call, self._rule = model, call, rule
        self._is_compiled = options is not None
        given = dict(options or {})
        self._budget = parse_budget(given.pop("memory_budget", None))
        self._options, self._strict = given, MosaicOptions.parse(given).strict
        if self._is_compiled and (weight := next(model.parameters(), None)) is not None:
            check_machine(self._budget, weight.device)
        known = _known.setdefault(model, {})
        key = call, type(rule), repr(rule.__dict__), repr(sorted(given.items()))
        if self._is_compiled:
            self._compiled = known.setdefault(key, _Compiled(given))
        if self._is_compiled and self._compiled.function is None:
            self._compiled.use(self._proposal())

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        return tuple(self._fallbacks.values())

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Propose; see :meth:`Proposal.forward`.

        If the model turns out to be several graphs, rows are picked in front of its head from the next call on.

        Raises:
            FallbackError: in strict mode, where nothing of ours ran.
        """
        if not self._is_compiled:
            return self._proposal()(*arguments)  # type: ignore[no-any-return]
        ran: list[CompiledStep] = []
        picked = self._compiled.picked
        with running(ran.append), within_budget(self._budget), picked or nullcontext():
            result: tuple[Tensor, Tensor] = self._compiled.function(*arguments)
        for step in ran:
            if step.plan is not None and (self.plan is None or step.plan.peak > self.plan.peak):
                self.plan = step.plan
            self._fallbacks.update(((fallback.name, fallback.node), fallback) for fallback in step.fallbacks)
        if not ran:
            self._say(_EAGER)
        elif picked is None and len(set(map(id, ran))) > 1:
            self._pick_in_front_of_the_head()
        return result

    def _proposal(self, picked: HeadRows | None = None) -> Proposal:
        return Proposal(self._model, self._call, self._rule, picked)

    def _pick_in_front_of_the_head(self) -> None:
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):
            picked = HeadRows(head)
            self._compiled.use(self._proposal(picked), picked)
            return
        reason = (
            f"the forward of {type(self._model).__name__} breaks into several graphs (TORCH_LOGS=graph_breaks says "
            "where), and it has no get_output_embeddings(): logits of all rows are computed"
        )
        self._say(Fallback("all-rows", "", "", reason, ""))

    def _say(self, fallback: Fallback) -> None:
        """Name a fallback, once; in strict mode it is an error."""
        if self._strict:
            raise FallbackError(f"strict mode: {fallback.name}: {fallback.reason}")
        key = fallback.name, fallback.node
        if key not in self._fallbacks:
            self._fallbacks[key] = fallback
            logger.warning("mosaic: %s: %s", fallback.name, fallback.reason)
            warnings.warn(fallback.reason, stacklevel=4)


class _Compiled:
    """A compiled proposal of one model, and what picks its rows in front of the head."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self.function: Any = None
        self.picked: HeadRows | None = None

    def use(self, proposal: Proposal, picked: HeadRows | None = None) -> None:
        self.function = torch.compile(proposal, backend="mosaic", dynamic=True, options=self._options)
        self.picked = picked


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Compiled]] = weakref.WeakKeyDictionary()


@contextmanager
def dynamo_as_needed() -> Iterator[None]:
    """Log lines in a model's forward do not break its graph, hooks are looked at, and no number of models or settings
    is too many: Dynamo counts compilations per function, and runs the ninth in eager PyTorch."""
    import torch._dynamo.config as config

    functions = {warnings.warn, logging.info, logging.warning, logging.debug}
    names = ("info", "warning", "debug", "info_once", "warning_once", "warning_advice")  # the last three: transformers'
    methods = {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}
    known = {
        "reorderable_logging_functions": {print},
        "ignore_logging_functions": functions | methods,
        "skip_nnmodule_hook_guards": False,  # HeadRows is a hook that comes and goes
        "recompile_limit": _UNLIMITED,
        "accumulated_recompile_limit": _UNLIMITED,
    }
    # Dynamo cannot write functions of its own configuration into its metrics, and says so each time
    metrics = logging.getLogger("torch._dynamo.metrics_context")
    metrics.addFilter(_is_no_complaint)
    try:
        with config.patch({name: value for name, value in known.items() if hasattr(config, name)}):
            yield
    finally:
        metrics.removeFilter(_is_no_complaint)


def _is_no_complaint(record: logging.LogRecord) -> bool:
    text = f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}"
    return "not supported between instances of 'function'" not in text and "not JSON serializable" not in text
