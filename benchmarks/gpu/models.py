"""The models that are measured (published dims, random weights), and the three systems that run their step."""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import mosaic_compiler
from mosaic_compiler.backend import mosaic, observing
from mosaic_compiler.runtime.pools import pool_for, release_memory
from mosaic_compiler.runtime.step import CompiledStep
from mosaic_compiler.sampling import DenoisingStep, block_window
from mosaic_compiler.true_masks import drop_true_masks

torch._dynamo.config.recompile_limit = 64  # one code object (the step's) is compiled by several systems

MASK = 100
GIB = 1 << 30
SYSTEMS = ("eager", "inductor", "mosaic")


@dataclass(frozen=True)
class Dims:
    """Published sizes of a model; ``experts`` > 0: a mixture of so many, 8 of them for each token."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    experts: int = 0


MODELS = {
    "LLaDA-8B": Dims(32, 4096, 32, 32, 12288, 126464),
    "Dream-7B": Dims(28, 3584, 28, 4, 18944, 152064),
    "LLaDA-MoE-7B-A1B": Dims(16, 2048, 16, 16, 1024, 157184, experts=64),
    "toy": Dims(2, 128, 4, 4, 256, 512),
    "toy-gqa": Dims(2, 128, 4, 2, 256, 512),
}


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def build(
    name: str,
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    on: torch.device | None = None,
) -> DenoisingStep:
    """A step of a model with random weights."""
    import transformers as hf

    dims = MODELS[name]
    config: dict[str, Any] = {
        "vocab_size": dims.vocabulary, "hidden_size": dims.width, "intermediate_size": dims.feed_forward,
        "num_hidden_layers": layers or dims.layers, "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads, "is_causal": False, "use_cache": False,
        "max_position_embeddings": 1 << 21,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with on or device():
            if dims.experts:
                experts = {"num_experts": dims.experts, "num_experts_per_tok": 8}
                model = hf.OlmoeForCausalLM(hf.OlmoeConfig(**config, **experts, experts_implementation="grouped_mm"))
            elif dims.kv_heads == dims.heads:
                model = hf.LlamaForCausalLM(hf.LlamaConfig(**config))
            else:
                model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**config))
    finally:
        torch.set_default_dtype(torch.float32)
    return DenoisingStep(model.eval().requires_grad_(False), MASK)


def weights(step: DenoisingStep) -> int:
    """Bytes of its parameters."""
    return sum(p.numel() * p.element_size() for p in step.parameters())


def arguments(name: str, tokens: int, masked: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random ids of which the share ``masked`` is to be filled in; an eighth of the sequence is committed."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(MASK + 1, MODELS[name].vocabulary, (1, tokens), generator=generator)
    ids[:, torch.randperm(tokens, generator=generator)[: round(tokens * masked)]] = MASK
    return ids.to(device()), block_window(tokens, 0, tokens, device()), torch.tensor([tokens // 8], device=device())


def use_expandable_segments() -> None:
    """Let PyTorch's allocator grow what it has: no slivers, for any of the systems."""
    if torch.cuda.is_available():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget() -> None:
    """Let go of everything that was compiled, and of the models that it holds."""
    torch._dynamo.reset()
    clean()


def clean() -> None:
    """Give back everything that nobody uses."""
    gc.collect()
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def for_inductor(step: DenoisingStep) -> Callable[..., Any]:
    """Inductor as it would be chosen for this task: symbolic sizes, and without the all-true N x N attention mask that
    transformers builds when it is compiled (with it, Inductor runs out of memory from 32,768 tokens on)."""
    from torch._inductor.compile_fx import compile_fx

    def backend(module: Any, inputs: Any) -> Any:
        return compile_fx(drop_true_masks(module), inputs)

    return torch.compile(step, backend=backend, dynamic=True, fullgraph=True)


@dataclass
class Session:
    """One model, and its step in the three systems, each compiled when it is first called.

    Attributes:
        cold: seconds of each system's first call, compilation included.
    """

    name: str
    layers: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    cold: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.step = build(self.name, self.layers, self.dtype)
        self._made: dict[str, tuple[Callable[..., Any], list[CompiledStep]]] = {}
        self._functions: dict[str, Callable[..., Any]] = {"eager": self.step}

    def warm_up(self, tokens: int = 4096, systems: Sequence[str] = SYSTEMS) -> None:
        """Compile everything, for sequences of these tokens."""
        for system in systems:
            self.function(system, tokens)

    def function(self, system: str, tokens: int = 4096) -> Callable[..., Any]:
        """The step in one system."""
        if system not in self._functions:
            given = arguments(self.name, tokens)
            made = for_inductor(self.step) if system == "inductor" else self.mosaic(self.options)
            synchronize()
            started = time.perf_counter()
            made(*given)
            synchronize()
            self.cold[system] = time.perf_counter() - started
            self._functions[system] = made
        return self._functions[system]

    def mosaic(self, options: dict[str, Any]) -> Callable[..., Any]:
        """The step compiled with these options; what is compiled goes to ``compiled(options)``."""
        key = repr(options)
        if key not in self._made:
            found: list[CompiledStep] = []

            def backend(module: Any, inputs: Any) -> Any:
                with observing(found.append):
                    return mosaic(module, inputs, options=options)

            self._made[key] = torch.compile(_fresh(self.step), backend=backend, dynamic=True, fullgraph=True), found
        return self._made[key][0]

    def compiled(self, options: dict[str, Any]) -> CompiledStep:
        """What a call with these options has compiled."""
        return self._made[repr(options)][1][0]


def _fresh(step: DenoisingStep) -> DenoisingStep:
    """The same step as another object: Dynamo keeps what it compiled per object."""
    return DenoisingStep(step.model, step.mask_token_id)


def timed_generation(
    model: Any, ids: torch.Tensor, look: Callable[[], None] = lambda: None, **given: Any
) -> tuple[Any, list[float]]:
    """What ``generate()`` gives, and the milliseconds between its steps; ``look`` is called after each."""
    times = [time.perf_counter()]

    def note(step: int, ids: torch.Tensor) -> None:
        synchronize()
        times.append(time.perf_counter())
        look()

    result = mosaic_compiler.generate(model, ids, on_step=note, **{"mask_token_id": MASK, **given})
    return result, [1e3 * (after - before) for before, after in itertools.pairwise(times)]


def high_water(function: Callable[..., Any], given: tuple[Any, ...]) -> int:
    """Most bytes that a call holds above what was there before: allocator and arena."""
    pool = pool_for(device())
    function(*given)
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*given)
    synchronize()
    return torch.cuda.max_memory_allocated() - before + pool.reserved()


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all GPU benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--models", nargs="*", default=["LLaDA-8B", "Dream-7B", "LLaDA-MoE-7B-A1B"], choices=MODELS)
    made.add_argument("--layers", type=int, default=None, help="run fewer layers")
    made.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 32768])
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--out", default=None, help="folder for the results")
    return made
