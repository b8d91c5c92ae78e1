"""``Proposer``: a model's proposals, compiled once whatever numbers a sampler is told, and what ran for them."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from mosaic_compiler.compat.dynamo import ANYTHING_MAY_CHANGE, configured
from mosaic_compiler.errors import FallbackError
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.owned.function import Owned
from mosaic_compiler.planning.budget import parse_budget
from mosaic_compiler.planning.plan import Fallback, MemoryPlan
from mosaic_compiler.runtime.devices import check_machine
from mosaic_compiler.runtime.engine import Step, running, within_budget
from mosaic_compiler.sampling.calls import ModelCall
from mosaic_compiler.sampling.proposal import HeadRows, Proposal

logger = logging.getLogger("mosaic_compiler")

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
        options: of the backend.
        is_compiled: ``False``: run in eager PyTorch.

    Raises:
        OptionsError: for an option that makes no sense.

    Attributes:
        plan: of all that ran, the one with the highest peak.
        fallbacks: what ran in another way than asked for, by name.
    """

    def __init__(
        self, model: nn.Module, call: ModelCall, rule: nn.Module, options: Mapping[str, Any], is_compiled: bool
    ) -> None:
        self.plan: MemoryPlan | None = None
        self._said: dict[str, Fallback] = {}
        self._ran: dict[int, Step] = {}
        self._model, self._call, self._rule = model, call, rule
        given = dict(options)
        self._budget = parse_budget(given.pop("memory_budget", None))
        self._strict = MosaicOptions.parse(given).strict
        if (weight := next(model.parameters(), None)) is not None:
            check_machine(self._budget, weight.device)
        with _known_lock:
            known = _known.setdefault(model, _Known())
        self._lock = known.lock
        self._compiled: _Compiled | None = None
        if is_compiled:
            key = call, type(rule), repr(rule.__dict__), repr(sorted(given.items()))
            with self._lock:
                self._compiled = known.compiled.setdefault(key, _Compiled(given))
                if self._compiled.function is None:
                    self._compiled.use(self._proposal())
                self._compiled.function.refresh("when asked")  # between steps of a generation nobody changes a model

    def look_again(self) -> None:
        """Somebody else's code has run: the model may be another one."""
        if self._compiled is not None:
            self._compiled.function.look_again()

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        found = [fallback for step in self._ran.values() for fallback in step.fallbacks]
        return tuple(dict.fromkeys((*found, *self._said.values())))

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Propose; see :meth:`Proposal.forward`.

        If the model turns out to be several graphs, rows are picked in front of its head from the next call on.

        Raises:
            FallbackError: in strict mode, where nothing of ours ran.
        """
        with self._lock:
            return self._proposal()(*arguments) if self._compiled is None else self._run(self._compiled, arguments)

    def _run(self, compiled: _Compiled, arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        ran: list[Step] = []
        picked = compiled.picked
        with running(ran.append), within_budget(self._budget), picked or nullcontext():
            result: tuple[Tensor, Tensor] = compiled.function(*arguments)
        graphs = {id(step): step for step in ran}
        self._ran.update(graphs)
        for step in graphs.values():
            if step.plan is not None and (self.plan is None or step.plan.peak > self.plan.peak):
                self.plan = step.plan
        if not ran:
            self._say(_EAGER)
        elif picked is None and len(graphs) > 1:
            self._pick_in_front_of_the_head(compiled)
        return result

    def _proposal(self, picked: HeadRows | None = None) -> Proposal:
        return Proposal(self._model, self._call, self._rule, picked)

    def _pick_in_front_of_the_head(self, compiled: _Compiled) -> None:
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):
            picked = HeadRows(head)
            compiled.use(self._proposal(picked), picked)
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
        if fallback.name not in self._said:
            self._said[fallback.name] = fallback
            logger.warning("mosaic: %s: %s", fallback.name, fallback.reason)
            warnings.warn(fallback.reason, stacklevel=4)


class _Compiled:
    """A compiled proposal of one model, and what picks its rows in front of the head."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self.function: Any = None
        self.picked: HeadRows | None = None

    def use(self, proposal: Proposal, picked: HeadRows | None = None) -> None:
        self.function = Owned(proposal, self._options)
        self.picked = picked


class _Known:
    """What is compiled for one model, by rule and options.

    Attributes:
        lock: threads take turns with a model, because a hook on its head is there for one of them only.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.compiled: dict[Any, _Compiled] = {}


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_known_lock = threading.Lock()


@contextmanager
def dynamo_as_needed() -> Iterator[None]:
    """Log lines in a model's forward do not break its graph, hooks are looked at, and no number of models or settings
    is too many: Dynamo counts compilations per function, and runs the ninth in eager PyTorch."""
    functions = {warnings.warn, logging.info, logging.warning, logging.debug}
    names = ("info", "warning", "debug", "info_once", "warning_once", "warning_advice")  # the last three: transformers'
    methods = {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}
    known = {
        "reorderable_logging_functions": {print},
        "ignore_logging_functions": functions | methods,
        **ANYTHING_MAY_CHANGE,  # HeadRows is a hook that comes and goes
    }
    # Dynamo cannot write functions of its own configuration into its metrics, and says so each time
    metrics = logging.getLogger("torch._dynamo.metrics_context")
    metrics.addFilter(_is_no_complaint)
    try:
        with configured(known):
            yield
    finally:
        metrics.removeFilter(_is_no_complaint)


def _is_no_complaint(record: logging.LogRecord) -> bool:
    text = f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}"
    return "not supported between instances of" not in text and "not JSON serializable" not in text
