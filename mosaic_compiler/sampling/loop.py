"""The plain loop around a denoising step: block after block until nothing is masked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mosaic_compiler.sampling.step import block_window


def transfer_counts(masked: Tensor, steps: int) -> Tensor:
    """How many tokens to commit at each step, the remainder first.

    Source: LLaDA's ``get_num_transfer_tokens``.

    Args:
        masked: int64 [B], masked tokens per sequence.
        steps: number of steps, at least 1.

    Returns:
        int64 [B, steps]; each row sums to ``masked``.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    base, remainder = masked // steps, masked % steps
    positions = torch.arange(steps, device=masked.device)
    return base.unsqueeze(1) + (positions.unsqueeze(0) < remainder.unsqueeze(1)).to(masked.dtype)


def denoise(
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    input_ids: Tensor,
    *,
    mask_token_id: int,
    steps: int,
    block_length: int | None = None,
    on_step: Callable[[Tensor], None] = lambda input_ids: None,
) -> Tensor:
    """Run ``step`` until no masked token is left.

    Args:
        step: a :class:`DenoisingStep`, compiled or not.
        input_ids: int64 [B, N]; not changed.
        mask_token_id: the id that marks a masked token.
        steps: steps per block.  Blocks without masked tokens are skipped, steps that would commit
            nothing too.
        block_length: tokens per block, left to right; ``None`` means one block.
        on_step: called with the ids after each step, for progress bars and drafts.

    Returns:
        int64 [B, N] without masked tokens.

    Raises:
        ValueError: for sizes that make no sense.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [B, N], got {list(input_ids.shape)}")
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length must be at least 1, got {block_length}")
    length = input_ids.shape[1]
    size = length if block_length is None else block_length
    with torch.no_grad():
        for start in range(0, length, max(size, 1)):
            window = block_window(length, start, min(start + size, length), input_ids.device)
            masked = ((input_ids == mask_token_id) & window).sum(dim=1)
            if not int(masked.max()):
                continue
            # [steps, B]; cloned, so that each row has the same strides and nothing recompiles
            counts = transfer_counts(masked, steps).t().clone(memory_format=torch.contiguous_format)
            for count in counts.unbind(dim=0):
                if not int(count.max()):
                    continue
                input_ids = step(input_ids, window, count)
                on_step(input_ids)
    return input_ids
