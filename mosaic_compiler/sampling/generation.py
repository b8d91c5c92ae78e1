"""``generate``: text from a diffusion LLM, with the published samplers, inside a memory budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_compiler.planning.caches import policy_of, refresh_of
from mosaic_compiler.planning.ladder import rungs_of
from mosaic_compiler.planning.precisions import check_residual
from mosaic_compiler.planning.selection import DEFAULT_KEEP, check_keep, selection_of
from mosaic_compiler.sampling.bidirectional import (
    check_bidirectional,
    check_block_causal,
    check_padding,
    declared_block,
)
from mosaic_compiler.sampling.calls import MASK_FORMS, call_for, kind_of
from mosaic_compiler.sampling.canvas import EntropyBound
from mosaic_compiler.sampling.canvas_generation import generate_canvases
from mosaic_compiler.sampling.canvas_model import is_canvas_model
from mosaic_compiler.sampling.compiled import dynamo_as_needed
from mosaic_compiler.sampling.inputs import check_inputs, check_streamer, first_of, has_padding, in_eval_mode, length_of
from mosaic_compiler.sampling.request import CHECKS, EOS_RULES, EndTokens, Sampling, check_factor
from mosaic_compiler.sampling.result import Generation, Streamer, watched
from mosaic_compiler.sampling.rotary import scaled_rotary
from mosaic_compiler.sampling.run import Run

logger = logging.getLogger("mosaic_compiler")


def generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    gen_length: int | None = None,
    max_new_tokens: int | None = None,
    steps: int | None = None,
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
    edit_threshold: float | None = None,
    max_post_steps: int = 16,
    sub_block_length: int = 8,
    entropy_bound: EntropyBound | float | None = None,
    bidirectional: bool = False,
    block_causal: int | None = None,
    rope_factor: float | str | None = None,
    generator: torch.Generator | None = None,
    stop_at_eos: bool = False,
    cache: str = "exact",
    cache_refresh: str | int = "block",
    cache_dtype: str | None = None,
    cache_keep: float | int | None = None,
    cache_score: str = "probability",
    cache_sets: str | None = None,
    cache_evict: bool = True,
    cache_residual: int = 0,
    memory_budget: int | str | None = None,
    options: dict[str, Any] | None = None,
    compile: bool = True,
    on_step: Callable[[int, Tensor], None] | None = None,
    streamer: Streamer | None = None,
    progress: bool = False,
    output_history: bool = False,
) -> Generation:
    """Fill in new tokens behind a prompt (and masked tokens in it), as LLaDA's ``generate`` or Dream's
    ``diffusion_generate`` do; or, with ``gen_length=0``, the masked tokens of the prompt only.

    Logits and noise are computed for the rows that a step may commit, and for no others.

    Args:
        model: a masked LM or bidirectional causal LM of transformers, or remote code with the signature of LLaDA's
            ``LLaDAModelLM`` or Dream's ``DreamModel``.
        input_ids: int64 [B, P]; prompts of unequal length are padded on the left.
        attention_mask: [B, P], 0 for padding.
        gen_length, max_new_tokens: new tokens (two names for one thing; 128); 0: infilling, nothing is appended.
        steps: of LLaDA's sampler over all blocks; of Dream's in all (128); of models with a canvas at most for each
            (48).
        block_length: LLaDA: tokens per block, filled in from left to right; ``None``: one block.  Infilling: a block
            begins at the first masked token that is in none yet.
        temperature: 0: the most likely tokens.  LLaDA: of the Gumbel noise; Dream: of the softmax.
        cfg_scale: LLaDA: classifier-free guidance; doubles the batch.
        remasking: LLaDA: ``low_confidence``, or ``random``; SDAR: ``low_confidence_dynamic``: every token above
            ``threshold`` (0.85), if those are at least as many as the step would commit, else the best ones; LLaDA2.1:
            ``joint_threshold``: every token above ``threshold`` (0.95), at least one, and tokens of the block that were
            committed before are edited, see ``edit_threshold``; as many steps as it takes.
        threshold: Fast-dLLM: commit every token of at least this confidence, at least one; as many steps as it takes.
        edit_threshold, max_post_steps: LLaDA2.1: a committed token of the block changes where another one is more
            likely and its confidence is above ``edit_threshold`` (0.9; 0: whatever it is, 1: none does); at most so
            many steps only edit.
        entropy_bound: models with a canvas (DiffusionGemma, found by what its forward takes): nats up to which the
            surest tokens of a step are kept (0.1), or all that
            :class:`~mosaic_compiler.sampling.canvas.EntropyBound` says.  ``gen_length`` is a canvas if left out; of the
            other options, ``steps``, ``generator``, ``stop_at_eos``, ``rope_factor`` and those behind ``cache`` count.
        sub_block_length: Fast-dLLM v2: tokens that are filled in before those behind them in their block.
        logits_eos_inf, confidence_eos_eot_inf, eos_rule: LLaDA's options for the tokens that end a text; ``eos_rule``
            is ``code`` (as published code does it; the default), ``logits`` or ``confidence`` (as documented); see
            :class:`~mosaic_compiler.sampling.request.EndTokens`.
        alg, alg_temp, top_p, top_k, eps: Dream's options: ``origin``, ``maskgit_plus``, ``topk_margin``, ``entropy``.
        sampler: ``llada``, ``dream`` (logits are shifted by one), ``fast_dllm_v2`` (so are its; the first token of a
            block by itself, then sub-block by sub-block, all above ``threshold``, 1 if left out, and the best one) or
            ``auto``: Dream's if ``alg`` is given or the model has a ``diffusion_generate`` of its own, Fast-dLLM v2's
            if its config has ``bd_size``.
        mask_token_id, mask_id, eos_token_id, eot_token_id: ``None``: from the model's config.
        bidirectional: every row of the model attends to all others when it is called without a mask: what ``generate``
            checks, and refuses where it cannot prove it.
        block_causal: each row sees its own block of so many tokens, and all before it: the mask of block-causal models
            (LLaDA2.x, SDAR: 32), which ``generate`` makes.  ``None``: as long as the model's config says, if it does
            (``bd_size``; ``block_size`` beside a ``mask_token_id``).  Blocks end at multiples of ``block_length``, by
            default as long.  ``cache="exact"`` then keeps what is proven: a step computes what is masked in its block,
            and rows whose block has changed.
        rope_factor: for texts longer than those that the model was trained on: the base of its rotary positions times
            this, while it runs; ``auto`` (or ``longllada``) and ``ultrallada`` say how much, from the length, and from
            what its config says that it was trained on (see ``sampling/rotary.py``).
        generator: where noise comes from; ``None``: PyTorch's default generator.
        stop_at_eos: end when every sequence has an end token with nothing masked before it; what is behind is filled
            with it.
        cache: what is kept from step to step: ``none``; ``exact`` (the default): what is proven to stay what it is, and
            that is nothing for models whose rows attend to all others; ``prefix``, ``dual``: steps compute the rows
            from the block on, or of the block (Fast-dLLM); ``select``: as ``dual``, against the keys that count for
            the block; ``delayed``: those of masked tokens and of the tokens that the last step committed (dKV-Cache).
            ``auto``: as ``dual``, the first of these that fits ``memory_budget``: all keys as they are computed, in
            ``int8``, in ``int4``; 5 % of them; 5 % in ``int4``; nothing.  All but the first two are approximations:
            other text may come out.
        cache_refresh: when all rows are computed again: ``block`` (the first step of each block), ``never`` (but for
            the first step), or every so many steps; 1 is no cache.
        cache_dtype: the precision of what is kept: ``bf16``, ``fp8``, ``int8``, ``int4`` (one scale per token and
            head), or a choice by layers (``2*exact+int4``: the first two as computed, all others in 4 bits); an
            approximation, which needs a half to an eighth of the memory; ``None``: as it is computed;
            ``auto``: as it is computed, or in ``int8``, or in ``int4``: the first that fits ``memory_budget`` (which
            the log, and ``cache_dtype`` of the result say).
        cache_keep: with a cache that is an approximation: how many keys of other rows than those that steps compute are
            kept, a share of them (``0.05``, the default of ``select``) or a number (``2048``), chosen in each step for
            all rows; ``None``: all.
        cache_score: how they are chosen: ``probability``, the largest that any of the computed rows gives a key;
            ``mage``, how many of them have it among their likeliest; ``sparse-dllm``, as that publishes it (one step
            late, without a softmax).
        cache_sets: ``head``: each head of keys has its own; ``layer``: one set for all heads; ``None``: as the score
            was published.
        cache_evict: ``True``: the other keys are not kept, and others can be chosen in a step for all rows only;
            ``False``: all are kept, so many are read, and the first step of each block chooses them (with
            ``cache_refresh="never"``, no step for all rows follows the first one).
        cache_residual: with ``cache_dtype``, so many rows at the end of the sequence are kept as they are computed,
            beside all rows in fewer bits.
        memory_budget, options: of the backend, see :class:`~mosaic_compiler.MosaicOptions`; the budget is for what is
            kept as well.
        compile: ``False``: run the same in eager PyTorch.
        on_step: called with the number of forward passes and the ids after each.
        streamer: gets the draft after each step, in transformers' manner.
        progress: show a progress bar, on stderr.
        output_history: keep the ids after each step.

    Raises:
        ValueError: for options that make no sense, a model that attends causally, or no known mask token.
        TypeError: for a streamer that is none.
        BudgetError: before the first step, if it does not fit.
        StateError: for a cache, if the model has nothing that can be kept.
    """
    if is_canvas_model(model):
        theirs = {
            "cfg_scale": cfg_scale, "remasking": remasking, "threshold": threshold, "logits_eos_inf": logits_eos_inf,
            "confidence_eos_eot_inf": confidence_eos_eot_inf, "alg": alg, "alg_temp": alg_temp, "top_p": top_p,
            "top_k": top_k, "temperature": temperature, "block_length": block_length, "block_causal": block_causal,
            "edit_threshold": edit_threshold, "attention_mask": has_padding(attention_mask) or None, "cache": cache,
            "sampler": sampler, "eos_rule": eos_rule, "cache_refresh": cache_refresh, "eps": eps,
            "cache_dtype": cache_dtype, "cache_keep": cache_keep, "cache_score": cache_score, "cache_sets": cache_sets,
            "cache_evict": cache_evict, "cache_residual": cache_residual,
            "mask_token_id": mask_token_id, "mask_id": mask_id, "eot_token_id": eot_token_id,
            "max_post_steps": max_post_steps, "sub_block_length": sub_block_length, "bidirectional": bidirectional,
            "progress": progress,
        }  # fmt: skip
        return generate_canvases(
            model, input_ids, length_of(gen_length, max_new_tokens), steps, entropy_bound, theirs,
            attention_mask, eos_token_id, stop_at_eos, generator, rope_factor,
            {**({} if memory_budget is None else {"memory_budget": memory_budget}), **(options or {})}, compile,
            on_step, streamer, output_history,
        )  # fmt: skip
    if entropy_bound is not None:
        raise ValueError(
            f"entropy_bound is for models with a canvas, and {type(model).__name__} has none: leave it out"
        )
    steps = 128 if steps is None else steps
    policy, refresh = policy_of(cache), refresh_of(cache_refresh)
    if policy.is_kept and not compile:
        raise ValueError(f"cache={cache!r} needs a compiled model: leave out compile=False, or take cache='none'")
    for name in ("cache_dtype", "cache_keep", "cache_score", "cache_sets", "cache_evict", "cache_residual"):
        if name in (options or {}):
            raise ValueError(f"options: {name} is an argument of generate by itself: say it there")
    if cache_dtype is not None and (not compile or not (policy.is_kept or policy.is_exact)):
        raise ValueError(
            f"cache_dtype={cache_dtype!r} is for what is kept from step to step, and nothing is: choose a cache, "
            "'dual' for example, and a compiled model"
        )
    if cache_keep is None and policy.chooses:
        cache_keep = DEFAULT_KEEP
    check_keep(cache_keep)
    selection = selection_of(cache_score, cache_sets, cache_evict)
    rungs = rungs_of(cache, cache_dtype, cache_keep)
    if cache_keep is not None and not policy.is_kept:
        raise ValueError(
            f"cache_keep={cache_keep!r} is for keys that are kept approximately, and cache={cache!r} keeps none so: "
            "choose a cache, 'select' for example"
        )
    check_residual(cache_residual, cache_dtype, cache_keep)
    if cache_residual and cache == "auto":
        raise ValueError("cache_residual is for all keys in fewer bits, and cache='auto' may choose some: take 'dual'")
    if not cache_evict and (cache_keep is None or cache == "auto"):
        raise ValueError(
            "cache_evict=False keeps all keys and reads chosen ones: say how many with cache_keep, under another cache "
            "than 'auto' (which evicts to save memory)"
        )
    config = getattr(model, "config", None)
    if sampler not in CHECKS:
        raise ValueError(f"sampler must be one of {', '.join(CHECKS)}, got {sampler!r}")
    if eos_rule not in EOS_RULES:
        raise ValueError(f"eos_rule must be one of {', '.join(EOS_RULES)}, got {eos_rule!r}")
    given_length = length_of(gen_length, max_new_tokens)
    length = 128 if given_length is None else given_length
    block = _block_of(block_causal)
    if block_causal is None and not bidirectional:
        block = _declared(model)
    kind = sampler if sampler != "auto" else "dream" if alg is not None else kind_of(model)
    eos = first_of(eos_token_id, getattr(config, "eos_token_id", None))
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
        block_length=block_length if block_length is not None else block or length or max(input_ids.shape[-1], 1),
        mask=mask_of(model, mask_token_id if mask_token_id is not None else mask_id),
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
        block_causal=block,
        edit_threshold=edit_threshold,
        max_post_steps=max_post_steps,
        sub_block_length=sub_block_length,
    )
    sampling.check()
    check_factor(rope_factor)
    check_inputs(input_ids, attention_mask, config, length, is_scaled=rope_factor is not None)
    if not length and not bool((input_ids == sampling.mask).any()):
        raise ValueError(f"gen_length must be at least 1: the prompt has no masked tokens ({sampling.mask}) to fill in")
    check_streamer(streamer)
    drawn = torch.randint(1 << 62, (), generator=generator, device=None if generator is None else generator.device)
    given = {**({} if memory_budget is None else {"memory_budget": memory_budget}), **(options or {})}
    total, form = input_ids.shape[1] + length, MASK_FORMS[0]
    with in_eval_mode(model), scaled_rotary(model, rope_factor, total):
        if sampling.block_causal:
            form = check_block_causal(model, input_ids, sampling.mask, sampling.block_causal)
        elif not bidirectional:
            check_bidirectional(model, input_ids, sampling.mask, total)
        padded = has_padding(attention_mask)
        if padded:
            check_padding(model, sampling.mask, input_ids.device, sampling.block_causal, form)
        call = call_for(model, padded, sampling.block_causal, form)
        sampling = replace(sampling, seed=int(drawn))
        run = Run(
            model, call, input_ids, attention_mask, sampling, given, compile, policy, refresh, rungs, selection,
            cache_residual,
        )  # fmt: skip
        try:
            with torch.no_grad(), dynamo_as_needed(), _bar(progress, run) as advance:
                history = watched(run, on_step, streamer, keep=output_history, advance=advance)
        finally:
            run.close()
    counts = run.schedule.counts
    return Generation(
        run.ids,
        run.forwards,
        run.plan,
        history,
        run.fallbacks,
        counts,
        run.state_bytes,
        counts["reuse"] + counts.get("choose", 0) > 0 and (run.is_rounded or not policy.is_exact),
        run.rung.precision,
        run.rung.keep,
    )


def _declared(model: nn.Module) -> int:
    """Tokens of a block, as the model's config says; 0: it does not."""
    found = declared_block(model)
    if found is None:
        return 0
    name, block = found
    logger.info("mosaic: block_causal=%d, because %s's config has %s=%d", block, type(model).__name__, name, block)
    return block


def _block_of(given: int | None) -> int:
    """Tokens of a block; 0: there are none."""
    if given is None:
        return 0
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"block_causal must be the tokens of a block, at least 1, got {given!r}")
    return given


@contextmanager
def _bar(shown: bool, run: Run) -> Iterator[Callable[[Tensor], None]]:
    """A progress bar over the tokens that are filled in."""
    if not shown:
        yield lambda ids: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    mask = run.sampling.mask
    total = int((run.ids == mask).sum())
    text = TextColumn("{task.completed}/{task.total} tokens")
    with Progress(BarColumn(), text, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda ids: bar.update(task, completed=total - int((ids == mask).sum()))


def mask_of(model: nn.Module, given: int | None = None, fallback: int | None = None) -> int:
    """The mask token: the one that is given, the config's, or the fallback.

    Raises:
        ValueError: if there is none, or the model has no such token.
    """
    config = getattr(model, "config", None)
    configs = (config, getattr(model, "generation_config", None))
    found = first_of(given, *(getattr(each, "mask_token_id", None) for each in configs), fallback)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no mask token (its config has no mask_token_id), so it is no masked diffusion "
            "language model, and those are what this runs. If it is one, say which token is the mask: mask_token_id "
            "(--mask-id), from its tokenizer's mask_token_id or the model's card"
        )
    size = getattr(config, "vocab_size", None)
    if found < 0 or (isinstance(size, int) and found >= size):
        raise ValueError(f"mask_token_id {found} is no token of the model" + (f": it has {size}" if size else ""))
    return found
