"""Weights of a step, held against the layouts that it was compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mosaic_compiler.errors import StaleGraphError
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.lowered import Input, TensorFacts
from mosaic_compiler.runtime.link import object_of


class Weights:
    """What a step expects of its parameters and buffers.

    Dynamo may take a module's parameters for immutable, and not look at what their ``.data`` is now.

    Args:
        inputs: all of the step's.
        static: positions of the weights among them.
    """

    def __init__(self, inputs: Sequence[Input], static: Sequence[int]) -> None:
        facts = [(index, inputs[index].name, inputs[index].tensor) for index in static]
        self._expected = [(i, name, known, _exactly_of(known)) for i, name, known in facts if known is not None]

    def check(self, values: Sequence[Any], sizes: Sizes) -> None:
        """Raise :class:`StaleGraphError` if one has another dtype, device or layout than when it was compiled."""
        for index, name, expected, exactly in self._expected:
            if exactly is not None and _exactly(values[index]) == exactly:
                continue  # the quick way: this is asked of hundreds of weights for every length
            was = _layout(expected.dtype, expected.device, expected.shape, expected.strides, sizes)
            tensor = values[index]
            now = _layout(str(tensor.dtype), str(tensor.device), tensor.shape, tensor.stride(), sizes)
            if was != now:
                raise StaleGraphError(
                    f"{name} was compiled as (dtype, device, sizes, strides) {was}, and now is {now}: call "
                    "torch._dynamo.reset() after such a change, or set "
                    "torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False before compiling"
                )


def _exactly(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()


def _exactly_of(facts: TensorFacts) -> tuple[Any, ...] | None:
    """Dtype, device, sizes and strides; ``None`` if they depend on symbols."""
    if not all(number.is_Integer for number in (*facts.shape, *facts.strides)):
        return None
    shape, strides = tuple(map(int, facts.shape)), tuple(map(int, facts.strides))
    return object_of(facts.dtype), object_of(f"device:{facts.device}"), shape, strides


def _layout(dtype: str, device: str, shape: Any, strides: Any, sizes: Sizes) -> tuple[Any, ...]:
    """Dtype, device, sizes and strides as numbers; the stride of a size of 0 or 1 does not count."""
    numbers = [sizes(size) for size in shape]
    steps = [sizes(step) if size > 1 else 0 for size, step in zip(numbers, strides, strict=True)]
    return dtype, device, numbers, steps
