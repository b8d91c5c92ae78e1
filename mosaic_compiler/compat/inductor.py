"""Inductor's compiled kernels, taken apart and put together again where nothing is compiled."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_GUARDS: Any = torch._C._dynamo.guards
_NAMES = (
    "assert_size_stride", "assert_alignment", "_empty_strided_cpu", "_empty_strided_cuda", "_reinterpret_tensor",
)  # fmt: skip


def names_of_wrappers() -> dict[str, Any]:
    """What the functions that Inductor writes around its kernels may call besides them."""
    found = {name.lstrip("_"): getattr(_GUARDS, name) for name in _NAMES if hasattr(_GUARDS, name)}
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return {**found, "get_raw_stream": stream, "torch": torch}


def library_of(function: Any) -> Path | None:
    """The shared object that a C++ kernel was loaded from."""
    module = sys.modules.get(getattr(function, "__module__", "") or "") or getattr(function, "__self__", None)
    found = getattr(module, "__file__", None)
    return None if found is None else Path(found)


def load_library(path: Path, name: str) -> Callable[..., Any]:
    """A C++ kernel of a shared object that Inductor has built."""
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(_GUARDS._torchinductor_pyobject_tensor_data_ptr)
    spec = importlib.util.spec_from_file_location(f"{name}.kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel: Callable[..., Any] = module.kernel
    return kernel


def load_triton(sources: dict[str, str], chosen: dict[str, Any]) -> dict[str, Any]:
    """Triton kernels by name, of the sources that Inductor has written; what is compiled lies in its cache.

    Args:
        chosen: what :func:`chosen_launch` said of those that had chosen.
    """
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    with config.patch(compile_threads=1):  # nothing is compiled, so no worker processes are started
        compiler = AsyncCompile()
        scope = {name: compiler.triton(name, source, device_str="cuda") for name, source in sources.items()}
        compiler.wait(scope)
    for name, wanted in chosen.items():
        kernel = scope[name]
        launchers = [launcher for launcher in kernel.launchers if _launch(launcher.config) == wanted]
        kernel.launchers = launchers or kernel.launchers
    return scope


def chosen_launch(kernel: Any) -> Any:
    """The launch parameters that a kernel has chosen by measuring; ``None``: it has not measured yet."""
    launchers: Any = getattr(kernel, "launchers", ())
    return _launch(launchers[0].config) if len(launchers) == 1 else None


def _launch(config: Any) -> list[Any]:
    return [sorted(config.kwargs.items()), config.num_warps, config.num_stages]


def moved(name: str, content: bytes, before: Path, after: Path) -> bytes:
    """A file of Triton's cache for a cache in another folder: lists of files have whole paths in them."""
    if not Path(name).name.startswith("__grp__"):
        return content
    return content.replace(json.dumps(str(before))[1:-1].encode(), json.dumps(str(after))[1:-1].encode())


@contextlib.contextmanager
def caches_in(folder: Path | None) -> Iterator[None]:
    """Inductor and Triton keep what they compile below this folder meanwhile; ``None``: where they do anyhow."""
    if folder is None:
        yield
        return
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    # said to worker processes, too, which else stay with their first one
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def best_instructions() -> Any:
    """The vector instructions that Inductor takes on this CPU: the first of its list that a program can be built and
    run with.  It tries all of them (two seconds for each); ``None``: it has to."""
    from torch._inductor import config, cpu_vec_isa

    if sys.platform != "linux" or config.cpp.simdlen is not None or os.getenv("ATEN_CPU_CAPABILITY"):
        return None
    if not hasattr(cpu_vec_isa, "x86_isa_checker") or not hasattr(cpu_vec_isa, "supported_vec_isa_list"):
        return None
    flags = cpu_vec_isa.x86_isa_checker()
    known = [isa for isa in cpu_vec_isa.supported_vec_isa_list if all(flag in flags for flag in str(isa).split())]
    return next((isa for isa in known if isa), None)


@contextlib.contextmanager
def with_instructions(found: Any) -> Iterator[None]:
    """Kernels that this thread generates meanwhile have these; ``None``: those that Inductor finds."""
    from torch._inductor import cpu_vec_isa as names

    cpu_vec_isa: Any = names
    before = cpu_vec_isa.valid_vec_isa_list
    if found is not None and not before.cache_info().currsize:
        cpu_vec_isa.valid_vec_isa_list = lambda: [found]
    try:
        yield
    finally:
        cpu_vec_isa.valid_vec_isa_list = before
