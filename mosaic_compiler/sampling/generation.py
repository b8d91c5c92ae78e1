"""``generate``: text from a diffusion LLM, with the published samplers, inside a memory budget."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mosaic_compiler.backend import observing
from mosaic_compiler.planning.outline import capacity
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.runtime.step import CompiledStep
from mosaic_compiler.sampling import commit, noise
from mosaic_compiler.sampling.calls import call_for, check_bidirectional, is_dream_like
from mosaic_compiler.sampling.loop import transfer_counts
from mosaic_compiler.sampling.proposal import HeadRows, Proposal
from mosaic_compiler.sampling.rules import DREAM_ALGORITHMS, EOS_RULES, DreamRule, EndTokens, LLaDARule


class Streamer(Protocol):
    """What transformers calls a streamer: it gets the draft of all ids after each step, then the end."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Generation:
    """What :func:`generate` returns.

    Attributes:
        sequences: int64 [B, N], prompt and what was generated.
        steps: forward passes of the model.
        plan: the plan with the highest peak; ``None`` if nothing was compiled.
        history: the ids after each step, if asked for.
    """

    sequences: Tensor
    steps: int
    plan: MemoryPlan | None
    history: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """Everything that a sampler can be told; see :func:`generate`."""

    sampler: str
    length: int
    steps: int
    block_length: int
    mask: int
    temperature: float
    guidance: float
    remasking: str
    threshold: float | None
    ends: EndTokens | None
    eos: int | None
    stop_at_eos: bool
    algorithm: str
    algorithm_temperature: float | None
    top_p: float | None
    top_k: int | None
    eps: float
    seed: int

    def check(self) -> None:
        """Raise :class:`ValueError` for what makes no sense."""
        if self.length < 1:
            raise ValueError(f"gen_length must be at least 1, got {self.length}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.guidance < 0:
            raise ValueError(f"cfg_scale must be at least 0, got {self.guidance}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        if self.sampler == "dream":
            if self.algorithm not in DREAM_ALGORITHMS:
                raise ValueError(f"alg must be one of {', '.join(DREAM_ALGORITHMS)}, got {self.algorithm!r}")
            if not 0 <= self.eps < 1:
                raise ValueError(f"eps must be at least 0 and below 1, got {self.eps}")
            return
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(f"remasking must be low_confidence or random, got {self.remasking!r}")
        if self.block_length < 1 or self.length % self.block_length:
            raise ValueError(
                f"gen_length {self.length} must be a multiple of block_length {self.block_length}: "
                f"take {-(-self.length // max(self.block_length, 1)) * max(self.block_length, 1)} tokens"
            )
        blocks = self.length // self.block_length
        if self.steps % blocks:
            raise ValueError(
                f"steps {self.steps} must be a multiple of the {blocks} blocks: "
                f"take {-(-self.steps // blocks) * blocks}"
            )

    @property
    def rule(self) -> nn.Module:
        """The rule for proposals."""
        if self.sampler == "dream":
            return DreamRule(self.temperature, self.top_p, self.top_k, self.algorithm)
        return LLaDARule(self.temperature, self.ends, wide=self.threshold is not None)


def generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    gen_length: int | None = None,
    max_new_tokens: int | None = None,
    steps: int = 128,
    block_length: int | None = None,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    threshold: float | None = None,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    eos_rule: str = "code",
    alg: str | None = None,
    alg_temp: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    eps: float = 1e-3,
    sampler: str = "auto",
    mask_token_id: int | None = None,
    mask_id: int | None = None,
    eos_token_id: int | None = None,
    eot_token_id: int | None = None,
    generator: torch.Generator | None = None,
    stop_at_eos: bool = False,
    memory_budget: int | str | None = None,
    options: dict[str, Any] | None = None,
    compile: bool = True,
    on_step: Callable[[int, Tensor], None] | None = None,
    streamer: Streamer | None = None,
    progress: bool = False,
    output_history: bool = False,
) -> Generation:
    """Fill in new tokens behind a prompt (and masked tokens in it), as LLaDA's ``generate`` or Dream's
    ``diffusion_generate`` do.

    Logits and noise are computed for the rows that a step may commit, and for no others.

    Args:
        model: a masked LM or bidirectional causal LM of transformers, or remote code with the signature of LLaDA's
            ``LLaDAModelLM`` or Dream's ``DreamModel``.
        input_ids: int64 [B, P]; prompts of unequal length are padded on the left.
        attention_mask: [B, P], 0 for padding.
        gen_length, max_new_tokens: new tokens (two names for one thing; 128).
        steps: of LLaDA's sampler over all blocks; of Dream's in all.
        block_length: LLaDA: tokens per block, filled in from left to right; ``None``: one block.
        temperature: 0: the most likely tokens.  LLaDA: of the Gumbel noise; Dream: of the softmax.
        cfg_scale: LLaDA: classifier-free guidance; doubles the batch.
        remasking: LLaDA: ``low_confidence``, or ``random``.
        threshold: Fast-dLLM: commit every token of at least this confidence, at least one; as many steps as it takes.
        logits_eos_inf, confidence_eos_eot_inf, eos_rule: LLaDA's options for the tokens that end a text; ``eos_rule``
            is ``code`` (as published code does it; the default), ``logits`` or ``confidence`` (as documented); see
            :class:`~mosaic_compiler.sampling.rules.EndTokens`.
        alg, alg_temp, top_p, top_k, eps: Dream's options: ``origin``, ``maskgit_plus``, ``topk_margin``, ``entropy``.
        sampler: ``llada``, ``dream`` (logits are shifted by one) or ``auto``: Dream's if ``alg`` is given or the model
            has a ``diffusion_generate`` of its own.
        mask_token_id, mask_id, eos_token_id, eot_token_id: ``None``: from the model's config.
        generator: where noise comes from; ``None``: PyTorch's default generator.
        stop_at_eos: end when every sequence has an end token with nothing masked before it; what is behind is filled
            with it.
        memory_budget, options: of the backend, see :class:`~mosaic_compiler.MosaicOptions`.
        compile: ``False``: run the same in eager PyTorch.
        on_step: called with the number of forward passes and the ids after each.
        streamer: gets the draft after each step, in transformers' manner.
        progress: show a progress bar.
        output_history: keep the ids after each step.

    Raises:
        ValueError: for options that make no sense, a model that attends causally, or no known mask token.
        BudgetError: before the first step, if it does not fit.
    """
    config = getattr(model, "config", None)
    if sampler not in ("auto", "llada", "dream"):
        raise ValueError(f"sampler must be auto, llada or dream, got {sampler!r}")
    if eos_rule not in EOS_RULES:
        raise ValueError(f"eos_rule must be one of {', '.join(EOS_RULES)}, got {eos_rule!r}")
    if gen_length is not None and max_new_tokens is not None and gen_length != max_new_tokens:
        raise ValueError(f"gen_length {gen_length} and max_new_tokens {max_new_tokens} are two names for one thing")
    length = next((n for n in (gen_length, max_new_tokens) if n is not None), 128)
    kind = sampler if sampler != "auto" else "dream" if alg is not None or is_dream_like(model) else "llada"
    eos = _first(eos_token_id, getattr(config, "eos_token_id", None))
    if (logits_eos_inf or confidence_eos_eot_inf or stop_at_eos) and eos is None:
        raise ValueError("which token ends a text? give eos_token_id: the model's config has none")
    ends = None
    if logits_eos_inf or confidence_eos_eot_inf:
        assert eos is not None
        ends = EndTokens(eos, eot_token_id, logits_eos_inf, eos_rule if confidence_eos_eot_inf else None)
    sampling = Sampling(
        sampler=kind,
        length=length,
        steps=steps,
        block_length=length if block_length is None else block_length,
        mask=_mask_of(model, mask_token_id if mask_token_id is not None else mask_id),
        temperature=temperature,
        guidance=cfg_scale,
        remasking=remasking,
        threshold=threshold,
        ends=ends,
        eos=eos,
        stop_at_eos=stop_at_eos,
        algorithm=alg or "origin",
        algorithm_temperature=alg_temp,
        top_p=top_p,
        top_k=top_k,
        eps=eps,
        seed=0,
    )
    sampling.check()
    _check_inputs(input_ids, attention_mask, config, length)
    check_bidirectional(model)
    drawn = torch.randint(1 << 62, (), generator=generator, device=None if generator is None else generator.device)
    run = _Run(model, input_ids, attention_mask, replace(sampling, seed=int(drawn)))
    run.prepare(compile, {**({} if memory_budget is None else {"memory_budget": memory_budget}), **(options or {})})
    history: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _without_breaks(), _bar(progress, run) as advance:
            for ids in run.ids_by_step():
                if output_history:
                    history.append(ids.clone())
                if on_step is not None:
                    on_step(run.forwards, ids)
                if streamer is not None:
                    streamer.put(ids.cpu())
                advance(ids)
    finally:
        model.train(was_training)
        if streamer is not None:
            streamer.end()
    return Generation(run.ids, run.forwards, run.plan, tuple(history))


class _Run:
    """One call of :func:`generate`: the ids so far, and how the next ones are made."""

    def __init__(self, model: nn.Module, prompt: Tensor, attention_mask: Tensor | None, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        batch, self.start = prompt.shape
        new = prompt.new_full((batch, sampling.length), sampling.mask)
        self.ids = torch.cat([prompt, new], 1)
        self.given = self.ids != sampling.mask
        self.real: Tensor | None = None
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            self.real = torch.cat([attention_mask.bool().to(prompt.device), torch.ones_like(new, dtype=torch.bool)], 1)
        self.call = call_for(model, self.real is not None)
        self.forwards = 0
        self._compiled: list[CompiledStep] = []
        self._picked: HeadRows | None = None
        self._options: dict[str, Any] | None = None
        self._warned = False
        self._propose: Callable[..., tuple[Tensor, Tensor]] = lambda *arguments: (prompt, prompt)

    @property
    def plan(self) -> MemoryPlan | None:
        """The plan with the highest peak."""
        plans = [step.plan for step in self._compiled if step.plan is not None]
        return max(plans, key=lambda plan: plan.peak, default=None)

    def prepare(self, compile: bool, options: dict[str, Any]) -> None:
        """Compile, or find what a former call has compiled."""
        self._options = options if compile else None
        if not compile:
            self._propose = Proposal(self.model, self.call, self.sampling.rule, self.sampling.guidance)
            return
        self._use(_known.setdefault(self.model, {}).setdefault(self._key, _Compiled(self._proposal(), options)))

    @property
    def _key(self) -> Any:
        rule = self.sampling.rule
        options = repr(sorted((self._options or {}).items()))
        return self.call, type(rule), repr(rule.__dict__), self.sampling.guidance, options

    def _proposal(self, picked: HeadRows | None = None) -> Proposal:
        return Proposal(self.model, self.call, self.sampling.rule, self.sampling.guidance, picked)

    def _use(self, compiled: _Compiled) -> None:
        self._propose, self._compiled, self._picked = compiled.function, compiled.steps, compiled.picked

    def _propose_compiled(self, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        """Call what is compiled; if it turned out to be several graphs, rows are picked in front of the head."""
        with observing(self._compiled.append), self._picked or nullcontext():
            result = self._propose(*arguments)
        if self._options is None or self._picked is not None or len(self._compiled) < 2:
            return result
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Module):
            if not self._warned:
                warnings.warn(
                    f"the forward of {type(self.model).__name__} breaks into several graphs (TORCH_LOGS=graph_breaks "
                    "says where), and it has no get_output_embeddings(): logits of all rows are computed",
                    stacklevel=2,
                )
            self._warned = True
            return result
        picked = HeadRows(head)
        known = _known[self.model][self._key] = _Compiled(self._proposal(picked), self._options, picked)
        self._use(known)
        return result

    def ids_by_step(self) -> Iterator[Tensor]:
        """Run; the ids after each forward pass."""
        blocks = self._dream() if self.sampling.sampler == "dream" else self._llada()
        for _ in blocks:
            yield self.ids
            if self.sampling.stop_at_eos and self._ended():
                return

    # ------------------------------------------------------------------------------------ samplers
    def _llada(self) -> Iterator[None]:
        given = self.sampling
        blocks = given.length // given.block_length
        per_block = given.steps // blocks
        for block in range(blocks):
            end = self.start + (block + 1) * given.block_length
            within = slice(end - given.block_length, end)
            counts = transfer_counts((self.ids[:, within] == given.mask).sum(1), per_block)
            if given.threshold is not None:
                while bool((self.ids[:, within] == given.mask).any()):
                    before = self.ids
                    proposed, confidence = self._proposals(self._masked(end), self.forwards)
                    self.ids = commit.commit_confident(before, proposed, confidence, given.threshold)
                    self.forwards += 1
                    yield
                    if given.temperature == 0 and torch.equal(before, self.ids):
                        break  # the model proposes the mask itself, and would for ever
                continue
            for number in range(per_block):
                step = block * per_block + number
                masked = self._masked(end)
                if bool(counts[:, number].any()) and bool(masked.any()):
                    proposed, confidence = self._proposals(masked, step)
                    self.ids = commit.commit_best(self.ids, proposed, confidence, counts[:, number])
                    self.forwards += 1
                    yield

    def _masked(self, end: int) -> Tensor:
        """bool [B, N]: masked positions before the end of a block."""
        return (self.ids == self.sampling.mask) & (torch.arange(self.ids.shape[1], device=self.ids.device) < end)

    def _dream(self) -> Iterator[None]:
        given, batch = self.sampling, self.ids.shape[0]
        times = torch.linspace(1, given.eps, given.steps + 1)
        everywhere = torch.arange(self.ids.numel(), device=self.ids.device)
        for step in range(given.steps):
            masked = self.ids == given.mask
            if given.algorithm == "origin":
                last = step == given.steps - 1
                share = torch.ones(()) if last else 1 - times[step + 1] / times[step]
                keys = noise.row_keys(given.seed, noise.TRANSFER, step, everywhere)
                chosen = commit.dream_origin(self.ids, share.to(self.ids.device), masked, keys)
                if not bool(chosen.any()):
                    continue
                proposed, _ = self._proposals(chosen, step)
                self.ids = torch.where(chosen, proposed, self.ids)
            else:
                count = commit.dream_count(int(masked.sum()), batch, step, given.steps, given.eps)
                if not count:
                    continue
                proposed, confidence = self._proposals(masked, step)
                keys = noise.row_keys(given.seed, noise.CHOICE, step, everywhere)
                self.ids = commit.commit_dream(
                    self.ids, proposed, confidence, count,
                    mask=given.mask, temperature=given.algorithm_temperature, keys=keys,
                )  # fmt: skip
            self.forwards += 1
            yield

    def _proposals(self, wanted: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Proposed ids and their confidence, [B, N]; -inf where nothing was wanted."""
        given, length = self.sampling, self.ids.shape[1]
        cells = wanted.flatten().nonzero().squeeze(1)
        rows = cells
        if given.sampler == "dream":  # position n is predicted from row n - 1
            rows = torch.where(cells % length > 0, cells - 1, cells)
        keys = noise.row_keys(given.seed, noise.TOKENS, step, cells)
        room = capacity(len(cells)) - len(cells)  # a few rows twice, so that one plan serves many steps
        padded = [torch.cat([tensor, tensor[:1].expand(room)]) for tensor in (rows, keys)]
        unguided = torch.where(self.given, given.mask, self.ids) if given.guidance > 0 else None
        token, confidence = self._propose_compiled(self.ids, *padded, unguided, self.real)
        token, confidence = token[: len(cells)], confidence[: len(cells)]
        if given.sampler == "llada" and given.remasking == "random":
            drawn = noise.uniform(noise.row_keys(given.seed, noise.CONFIDENCE, step, cells), 1).squeeze(1).float()
            confidence = torch.where(confidence < 0, -1.0, drawn)  # below 0: see EndTokens
        proposed, scores = self.ids.flatten().clone(), confidence.new_full((self.ids.numel(),), float("-inf"))
        proposed[cells], scores[cells] = token, confidence
        return proposed.view_as(self.ids), scores.view_as(self.ids)

    def _ended(self) -> bool:
        """Every sequence has an end token with nothing masked before it; if so, it is repeated to the end."""
        eos, new = self.sampling.eos, self.ids[:, self.start :]
        assert eos is not None
        ends = new == eos
        first = torch.where(ends.any(1), ends.int().argmax(1), new.shape[1])
        behind = torch.arange(new.shape[1], device=new.device) > first.unsqueeze(1)
        if not bool(ends.any(1).all()) or bool(((new == self.sampling.mask) & ~behind).any()):
            return False
        self.ids = torch.cat([self.ids[:, : self.start], torch.where(behind, eos, new)], 1)
        return True


class _Compiled:
    """A compiled proposal, and the graphs that it consists of."""

    def __init__(self, made: Proposal, options: dict[str, Any], picked: HeadRows | None = None) -> None:
        self.function = torch.compile(made, backend="mosaic", dynamic=True, options=options)
        self.steps: list[CompiledStep] = []
        self.picked = picked


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Compiled]] = weakref.WeakKeyDictionary()


@contextmanager
def _without_breaks() -> Iterator[None]:
    """Log lines in a model's forward do not break its graph, and hooks are looked at."""
    import torch._dynamo.config as config

    functions = {warnings.warn, logging.info, logging.warning, logging.debug}
    methods = {logging.Logger.info, logging.Logger.warning, logging.Logger.debug}
    known = {
        "reorderable_logging_functions": {print},
        "ignore_logging_functions": functions | methods,
        "skip_nnmodule_hook_guards": False,  # HeadRows is a hook that comes and goes
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


@contextmanager
def _bar(shown: bool, run: _Run) -> Iterator[Callable[[Tensor], None]]:
    """A progress bar over the tokens that are filled in."""
    if not shown:
        yield lambda ids: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    mask = run.sampling.mask
    total = int((run.ids == mask).sum())
    text = TextColumn("{task.completed}/{task.total} tokens")
    with Progress(BarColumn(), text, TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda ids: bar.update(task, completed=total - int((ids == mask).sum()))


def _first(*values: Any) -> int | None:
    """The first that is given; of a list its first."""
    for value in values:
        value = value[0] if isinstance(value, Sequence) and value else value
        if isinstance(value, int):
            return value
    return None


def _mask_of(model: nn.Module, given: int | None) -> int:
    configs = (getattr(model, "config", None), getattr(model, "generation_config", None))
    found = _first(given, *(getattr(config, "mask_token_id", None) for config in configs))
    if found is None:
        raise ValueError("which token is the mask? give mask_token_id: the model's config has none")
    return found


def _check_inputs(input_ids: Tensor, attention_mask: Tensor | None, config: Any, length: int) -> None:
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.shape[0]:
        raise ValueError(f"input_ids must be int64 [B, P], got {input_ids.dtype} {list(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be [B, P] like input_ids {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and input_ids.shape[1] + length > most:
        warnings.warn(
            f"{input_ids.shape[1]} + {length} tokens are more than the {most} positions that the model was trained for",
            stacklevel=3,
        )
