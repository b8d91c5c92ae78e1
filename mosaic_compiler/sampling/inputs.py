"""What ``generate`` is given: checked, read, and kept as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def length_of(gen_length: int | None, max_new_tokens: int | None) -> int | None:
    """The length that is given by one of two names."""
    if gen_length is not None and max_new_tokens is not None and gen_length != max_new_tokens:
        raise ValueError(f"gen_length {gen_length} and max_new_tokens {max_new_tokens} are two names for one thing")
    return gen_length if gen_length is not None else max_new_tokens


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """A model in eval mode, until the block ends."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def first_of(*values: Any) -> int | None:
    """The first that is given; of a list its first."""
    for value in values:
        value = value[0] if isinstance(value, Sequence) and value else value
        if isinstance(value, int):
            return value
    return None


def has_padding(attention_mask: Tensor | None) -> bool:
    """Some token is marked as padding."""
    return attention_mask is not None and not bool(attention_mask.bool().all())


def check_streamer(streamer: Any) -> None:
    """Raise :class:`TypeError` for a streamer that is none."""
    missing = [name for name in ("put", "end") if not callable(getattr(streamer, name, None))]
    if streamer is not None and missing:
        raise TypeError(
            f"a streamer needs put(ids) and end(), as those of transformers have; {type(streamer).__name__} has no "
            f"{' and no '.join(missing)}. To be called after each step only: on_step"
        )


def check_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, config: Any, length: int, *, is_scaled: bool
) -> None:
    """Raise :class:`ValueError` for what are no ids; warn of what will not go well."""
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.shape[0]:
        raise ValueError(f"input_ids must be int64 [B, P], got {input_ids.dtype} {list(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be [B, P] like input_ids {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    if attention_mask is not None and length and not bool(attention_mask[:, -1:].all()):
        warnings.warn(
            "a prompt is padded on the right, and what is generated would stand behind the padding: pad on the left "
            "(tokenizer.padding_side = 'left')",
            stacklevel=3,
        )
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and input_ids.shape[1] + length > most and not is_scaled:
        warnings.warn(
            f"{input_ids.shape[1]} + {length} tokens are more than the {most} positions that the model was trained "
            "for: rope_factor='auto' lets it tell them apart",
            stacklevel=3,
        )
