"""What this machine has of what the compiler can use, and how to install what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the report.  ``advice`` is empty where nothing is missing."""

    what: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Look at versions, the device, its virtual memory, and the kernels that will be used."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    import torch

    yield Finding("torch", torch.__version__)  # its package may not say for which devices it was built
    yield _package("triton", "comes with the CUDA builds of torch; without it fused kernels are C++ on the CPU")
    yield _package("transformers", "pip install 'mosaic-compiler[hf]' to load models")
    yield _package("cuda-bindings", "pip install 'mosaic-compiler[cuda]' for the virtual-memory arena on GPUs")
    for name in ("bokeh", "matplotlib"):
        yield _package(name, "pip install 'mosaic-compiler[report]' for `mosaic report`")
    yield from _devices()


def _package(name: str, advice: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", advice)


def _devices() -> Iterator[Finding]:
    import torch

    from mosaic_compiler.kernels.gather_logits import choose
    from mosaic_compiler.planning.budget import format_bytes
    from mosaic_compiler.runtime.devices import free_memory
    from mosaic_compiler.runtime.pools import arena_problem

    found = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    if len(found) == 1:
        yield Finding("GPU", "none that torch can use", "everything runs on the CPU; install a CUDA build of torch")
    for device in found:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        free = free_memory(device, 0)
        yield Finding(str(device), f"{name}, {'unknown' if free is None else format_bytes(free)} free")
        problem = arena_problem(device)
        advice = "" if problem is None else "one plain allocation instead, which moves when it grows"
        yield Finding(f"{device} arena", "reserved addresses, memory on demand" if problem is None else problem, advice)
        choice = choose(device, torch.bfloat16, 4096, 126464)
        yield Finding(f"{device} head", f"{choice.kernel}: {choice.reason}")
    if torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        yield Finding("driver", f"CUDA {torch.version.cuda}, cuDNN {cudnn}")
