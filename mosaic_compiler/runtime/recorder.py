"""Replaying: a bound program whose calls are all kernels is recorded once, and launched as one from then on.

A step for few rows is many small kernels: launched one by one, the host takes longer than the device.  What is recorded
are addresses, so a call's inputs are copied to where the recorded ones lie, and its results are copied from there.
Weights and state lie where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Sequence[Any]], list[Any]]


class Recorder:
    """One program's recording, for a CUDA device.

    Args:
        run: runs the program.
        fixed: positions of inputs whose memory stays where it is.
        device: where it runs.

    Attributes:
        problem: why it cannot be recorded; empty if it can, as far as it is known.
    """

    def __init__(self, run: Run, fixed: Collection[int], device: torch.device) -> None:
        self._run, self._fixed, self._device = run, frozenset(fixed), device
        self._graph: Any = None
        self._inputs: list[tuple[int, Any]] = []  # those that may be others in each call, with their positions
        self._outputs: list[Any] = []
        self.problem = ""

    def forget(self) -> None:
        """The program is another one now."""
        self._graph, self._inputs, self._outputs = None, [], []

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the program: the recording, if it is for such inputs."""
        if self._graph is None and not self.problem:
            self._record(inputs)
        if self._graph is None or not self._is_for(inputs):
            return self._run(inputs)
        for index, place in self._inputs:
            if isinstance(place, Tensor) and place.is_cuda:
                place.copy_(inputs[index], non_blocking=True)
        self._graph.replay()
        return [out.clone() if isinstance(out, Tensor) else out for out in self._outputs]

    def _record(self, inputs: Sequence[Any]) -> None:
        """Capture the program's kernels, on a stream of its own."""
        places = [self._place(index, given) for index, given in enumerate(inputs)]
        graph: Any = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    outputs = self._run(places)
                finally:
                    graph.capture_end()
        except Exception as error:  # whatever an op raises that waits for the device
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.problem = f"its kernels cannot be recorded: {first[:200]}"
            generator: Any = torch.cuda.default_generators[self._device.index or 0]
            generator.graphsafe_set_state(generator.clone_state())  # it still takes itself for a part of the recording
            return
        current.wait_stream(stream)
        self._inputs = [(index, place) for index, place in enumerate(places) if index not in self._fixed]
        self._graph, self._outputs = graph, outputs

    def _place(self, index: int, given: Any) -> Any:
        """Where an input lies in the recording; numbers that are read on the host are part of it."""
        if index in self._fixed or not isinstance(given, Tensor):
            return given
        return given.clone() if given.device.type == "cuda" else given.detach().clone()

    def _is_for(self, inputs: Sequence[Any]) -> bool:
        return all(_is_same(place, inputs[index]) for index, place in self._inputs)


def _is_same(place: Any, given: Any) -> bool:
    """A call with ``given`` can be replayed: on the device anything of that layout, on the host the same numbers."""
    if not isinstance(place, Tensor) or not isinstance(given, Tensor):
        return bool(type(place) is type(given) and place == given)
    if place.shape != given.shape or place.dtype != given.dtype or place.device != given.device:
        return False
    return place.is_cuda or torch.equal(place, given)
