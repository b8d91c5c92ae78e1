"""``generate`` for models with a canvas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_compiler.sampling.canvas import CanvasRun, EntropyBound
from mosaic_compiler.sampling.compiled import dynamo_as_needed
from mosaic_compiler.sampling.inputs import check_inputs, check_streamer, first_of, in_eval_mode
from mosaic_compiler.sampling.request import check_factor
from mosaic_compiler.sampling.result import Generation, Streamer, watched
from mosaic_compiler.sampling.rotary import scaled_rotary

_OF_MASKS: Mapping[str, Any] = {
    "cfg_scale": 0.0, "remasking": "low_confidence", "logits_eos_inf": False, "confidence_eos_eot_inf": False,
    "temperature": 0.0, "cache": "exact", "cache_score": "probability", "sampler": "auto", "eos_rule": "code",
    "cache_refresh": "block", "cache_evict": True, "cache_residual": 0, "eps": 1e-3,
    "max_post_steps": 16, "sub_block_length": 8, "bidirectional": False, "progress": False,
}  # fmt: skip
"""Options of samplers for masked tokens where they say nothing; those of the others are ``None``."""


def generate_canvases(
    model: nn.Module,
    input_ids: Tensor,
    length: int | None,
    steps: int | None,
    entropy_bound: EntropyBound | float | None,
    theirs: Mapping[str, Any],
    attention_mask: Tensor | None,
    eos: int | None,
    stop_at_eos: bool,
    generator: torch.Generator | None,
    rope_factor: float | str | None,
    options: dict[str, Any],
    is_compiled: bool,
    on_step: Callable[[int, Tensor], None] | None,
    streamer: Streamer | None,
    output_history: bool,
) -> Generation:
    """``generate`` for models with a canvas; ``theirs`` are options that are not for them."""
    wrong = [name for name, value in theirs.items() if value != _OF_MASKS.get(name)]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: not for models with a canvas, such as {type(model).__name__}: leave it out (they "
            "take steps, entropy_bound, and prompts of one length)"
        )
    config: Any = model.config
    bound = entropy_bound if isinstance(entropy_bound, EntropyBound) else EntropyBound()
    if entropy_bound is not None and not isinstance(entropy_bound, EntropyBound):
        bound = replace(bound, entropy_bound=entropy_bound)
    bound = bound if steps is None else replace(bound, steps=steps)
    bound.check()
    length = config.canvas_length if length is None else length
    if isinstance(length, bool) or not isinstance(length, int):
        raise ValueError(f"gen_length must be a whole number, got {length!r}")
    if length < 1:
        raise ValueError(f"gen_length must be at least 1 (there are no masked tokens to fill in), got {length}")
    configs = (getattr(model, "generation_config", None), config, config.get_text_config(decoder=True))
    end = first_of(eos, *(getattr(each, "eos_token_id", None) for each in configs))
    if stop_at_eos and end is None:
        raise ValueError("which token ends a text? give eos_token_id: the model's config has none")
    check_factor(rope_factor)
    if not input_ids.numel():
        raise ValueError(f"a canvas is denoised behind a prompt of at least one token, got {list(input_ids.shape)}")
    check_inputs(input_ids, attention_mask, config, length, is_scaled=rope_factor is not None)
    check_streamer(streamer)
    drawn = torch.randint(1 << 62, (), generator=generator, device=None if generator is None else generator.device)
    with (
        in_eval_mode(model),
        scaled_rotary(model, rope_factor, input_ids.shape[1] + length),
        torch.no_grad(),
        dynamo_as_needed(),
    ):
        run = CanvasRun(
            model, input_ids, length, bound, seed=int(drawn), eos=end if stop_at_eos else None, options=options,
            is_compiled=is_compiled,
        )  # fmt: skip
        history = watched(run, on_step, streamer, keep=output_history)
    kinds = {"full": run.encoded, "reuse": run.forwards}
    return Generation(run.ids, run.forwards, run.plan, history, run.fallbacks, kinds, run.state_bytes, False)
