"""``mosaic generate``: text on stdout, everything that is said about it on stderr."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mosaic_compiler.cli_values import (
    Bidirectional,
    Device,
    Dtype,
    MaskId,
    TrustRemoteCode,
    parse_bytes,
    parse_dtype,
    parse_factor,
    parse_keep,
)
from mosaic_compiler.errors import ConfigError, MosaicError
from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.precisions import check_residual
from mosaic_compiler.planning.selection import SCORES, selection_of
from mosaic_compiler.waiting import doing


def generate(
    model: Annotated[
        Path | None, typer.Option(help="a folder of transformers; the shipped tiny-llada if left out")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="text to begin with")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="a file with the text to begin with")] = None,
    infill: Annotated[Path | None, typer.Option(help="a file whose masks, <mask> or ___, are filled in")] = None,
    gen_length: Annotated[int | None, typer.Option(help="new tokens; 128 if left out")] = None,
    steps: Annotated[int, typer.Option(help="steps in all")] = 32,
    block_length: Annotated[int | None, typer.Option(help="LLaDA: tokens per block")] = None,
    budget: Annotated[str | None, typer.Option(help="memory for activations, such as 64MiB")] = None,
    cache: Annotated[
        str,
        typer.Option(
            help="what is kept from step to step: none, exact, or approximately: prefix, dual, select, delayed"
        ),
    ] = "exact",
    cache_refresh: Annotated[
        str, typer.Option(help="when all rows are computed again: block, never, or a number of steps")
    ] = "block",
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="precision of what is kept: bf16, fp8, int8, int4, by layers (2*exact+int4), or auto: what fits; as "
            "computed if left out"
        ),
    ] = None,
    cache_keep: Annotated[
        str | None, typer.Option(help="other keys that are kept: a share (0.05), a number (2048), or all")
    ] = None,
    cache_score: Annotated[str, typer.Option(help=f"how they are chosen: {', '.join(SCORES)}")] = "probability",
    cache_sets: Annotated[str | None, typer.Option(help="chosen for each head, or each layer")] = None,
    cache_residual: Annotated[
        int, typer.Option(help="with --cache-dtype: so many last rows are kept as computed as well", min=0)
    ] = 0,
    cache_evict: Annotated[
        bool, typer.Option(help="the other keys are not kept; else all are, and each block chooses which it reads")
    ] = True,
    temperature: Annotated[float, typer.Option(help="0: the most likely tokens")] = 0.0,
    cfg: Annotated[float, typer.Option(help="LLaDA: scale of the guidance")] = 0.0,
    remasking: Annotated[
        str,
        typer.Option(help="low_confidence, random: LLaDA; low_confidence_dynamic: SDAR; joint_threshold: LLaDA2.1"),
    ] = "low_confidence",
    threshold: Annotated[float | None, typer.Option(help="Fast-dLLM: commit what is at least this confident")] = None,
    alg: Annotated[str | None, typer.Option(help="Dream: origin, maskgit_plus, topk_margin or entropy")] = None,
    top_p: Annotated[float | None, typer.Option(help="Dream: keep the likeliest tokens of this probability")] = None,
    top_k: Annotated[int | None, typer.Option(help="Dream: keep this many of the likeliest tokens")] = None,
    mask_id: MaskId = None,
    eos: Annotated[int | None, typer.Option(help="stop at this token; otherwise all new tokens are filled in")] = None,
    block_causal: Annotated[
        int | None,
        typer.Option(help="tokens see their own block of so many, and all before it (LLaDA2.x, SDAR: 32)"),
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="llada, dream, fast_dllm_v2, or auto: what the model was published with")
    ] = "auto",
    edit_threshold: Annotated[
        float | None, typer.Option(help="joint_threshold: edit committed tokens where others are this likely")
    ] = None,
    max_post_steps: Annotated[int, typer.Option(help="joint_threshold: steps of a block that only edit")] = 16,
    sub_block_length: Annotated[int, typer.Option(help="Fast-dLLM v2: tokens per sub-block")] = 8,
    rope_factor: Annotated[
        str | None,
        typer.Option(help="longer texts than in training: rotary base times this; auto: as the length asks for"),
    ] = None,
    bidirectional: Bidirectional = False,
    seed: Annotated[int, typer.Option(help="of the noise", min=0, max=(1 << 63) - 1)] = 0,
    dtype: Dtype = "fp32",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="for machines: no live text")] = False,
) -> None:
    """Fill in new tokens behind a prompt, or the masks of a text; the text settles in the terminal."""
    import time

    from mosaic_compiler.planning.caches import policy_of, refresh_of
    from mosaic_compiler.planning.ladder import rungs_of
    from mosaic_compiler.sampling.request import Sampling, check_factor

    if (prompt is not None) + (file is not None) + (infill is not None) != 1:
        raise ConfigError("give the text to begin with: --prompt TEXT, or --file FILE; or --infill FILE")
    if (source := infill or file) is not None:
        try:
            prompt = source.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: {getattr(error, 'strerror', None) or 'no text'}") from None
    assert prompt is not None
    length = _length(infill, prompt, gen_length, eos)
    refresh = int(cache_refresh) if cache_refresh.isdecimal() else cache_refresh
    limit = None if budget is None else parse_bytes("--budget", budget)
    keep = 1.0 if cache_keep == "all" and cache == "select" else parse_keep(cache_keep)
    factor = None if rope_factor is None else parse_factor(rope_factor)
    try:  # what can be known to be wrong without a model, before one is loaded
        Sampling(
            sampler=sampler if alg is None or sampler != "auto" else "dream", length=length, steps=steps,
            block_length=(block_causal or length or 1) if block_length is None else block_length,
            temperature=temperature, guidance=cfg, block_causal=block_causal or 0,
            remasking=remasking, threshold=threshold, algorithm=alg or "origin", top_p=top_p, top_k=top_k,
            edit_threshold=edit_threshold, max_post_steps=max_post_steps, sub_block_length=sub_block_length,
        ).check()  # fmt: skip
        policy_of(cache)
        refresh_of(refresh)
        rungs_of(cache, cache_dtype, keep)
        selection_of(cache_score, cache_sets, cache_evict)
        check_residual(cache_residual, cache_dtype, keep)
        check_factor(factor)
    except ValueError as error:
        raise ConfigError(str(error)) from None

    out = Console(file=sys.stdout)
    live = out.is_terminal and not as_json
    with redirect_stdout(sys.stderr):  # what a model's own code prints is not its text
        from mosaic_compiler.report.load import ids_with_masks, load_model

        with doing("loading the model"):
            loaded, tokenizer = load_model(
                model, parse_dtype(dtype), device=device, trust_remote_code=trust_remote_code
            )
        import torch

        from mosaic_compiler.report.live import LiveText
        from mosaic_compiler.sampling.canvas_model import is_canvas_model
        from mosaic_compiler.sampling.generation import generate as run
        from mosaic_compiler.sampling.generation import mask_of

        try:
            if is_canvas_model(loaded) and infill is not None:
                raise ConfigError("--infill: a model with a canvas has no masks to fill in; give --prompt or --file")
            mask = -1 if is_canvas_model(loaded) else mask_of(loaded, mask_id, tokenizer.mask_token_id)
            tokens = tokenizer(prompt).input_ids if infill is None else ids_with_masks(tokenizer, prompt, mask)
            ids = torch.tensor([tokens], dtype=torch.int64, device=next(loaded.parameters()).device)
            shown = ids.shape[1] if infill is None else 0
            started = time.perf_counter()
            result = run(
                loaded, ids, gen_length=length, steps=steps, block_length=block_length, memory_budget=limit,
                temperature=temperature, cfg_scale=cfg, remasking=remasking, threshold=threshold, alg=alg,
                top_p=top_p, top_k=top_k, bidirectional=bidirectional, block_causal=block_causal, rope_factor=factor,
                sampler=sampler, edit_threshold=edit_threshold, max_post_steps=max_post_steps,
                sub_block_length=sub_block_length,
                mask_token_id=None if mask < 0 else mask, eos_token_id=eos,
                stop_at_eos=eos is not None, cache=cache, cache_refresh=refresh, cache_dtype=cache_dtype,
                cache_keep=keep, cache_score=cache_score, cache_sets=cache_sets, cache_evict=cache_evict,
                cache_residual=cache_residual,
                streamer=LiveText(tokenizer, mask, shown, out) if live else None,
                progress=sys.stderr.isatty() and not live and not as_json and mask >= 0,
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
        except ValueError as error:
            raise error if isinstance(error, MosaicError) else ConfigError(str(error)) from None
    seconds = time.perf_counter() - started
    text = tokenizer.decode(result.sequences[0, shown:], skip_special_tokens=True)
    new = result.sequences[0, shown:] if infill is None else result.sequences[ids == mask]
    given = result.sequences.shape[1] - len(new)
    peak = None if result.plan is None else result.plan.workspace
    if as_json:
        print(json.dumps({
            "text": text, "tokens": new.tolist(), "prompt_tokens": given, "steps": result.steps,
            "seconds": seconds, "workspace": peak, "steps_by_kind": dict(result.steps_by_kind),
            "state": result.state_bytes, "approximate": result.is_approximate,
        }))  # fmt: skip
        return
    if not live:
        print(text)
    where = "behind" if infill is None else "among"
    said = f"{len(new)} tokens {where} {given} in {seconds:.1f} s, {result.steps} steps"
    if result.is_approximate:
        said += (
            f" ({result.steps_by_kind['reuse']} of them with {format_bytes(result.state_bytes)} of state: approximate)"
        )
    Console(stderr=True).print(said + ("" if peak is None else f", {format_bytes(peak)} of activations"), style="dim")


def _length(infill: Path | None, text: str, gen_length: int | None, eos: int | None) -> int:
    """How many tokens are appended."""
    from mosaic_compiler.sampling.request import MASKS

    if infill is None:
        if gen_length == 0:
            raise ConfigError("gen_length must be at least 1; masks in a text are filled in by --infill FILE")
        return 128 if gen_length is None else gen_length
    if gen_length or eos is not None:
        raise ConfigError("--infill appends nothing to its text: leave out --gen-length and --eos")
    if not MASKS.search(text):
        raise ConfigError(f"{infill}: nothing to fill in: write <mask> or ___ for each token that is missing")
    return 0
