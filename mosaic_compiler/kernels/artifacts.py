"""Fused kernels on disk: what Inductor has compiled, kept so that another process can call it without compiling.

Of the module that Inductor writes around a cluster's kernels only its function ``call`` is kept, if it does nothing but
call them and allocate a few numbers per row; C++ kernels are kept as shared objects, Triton's as sources with what
Triton has compiled of them.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import functools
import hashlib
import logging
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mosaic_compiler.compat.inductor import (
    caches_in,
    chosen_launch,
    library_of,
    load_library,
    load_triton,
    moved,
    names_of_wrappers,
)  # fmt: skip
from mosaic_compiler.disk.codec import CodecError, pack, unpack
from mosaic_compiler.disk.folder import sources_digest, the_folder

logger = logging.getLogger("mosaic_compiler")

KIND = "kernel"
_HERE = Path("/mosaic-kernel-files")
"""Stands in kept files for the folder that they lie in."""

_MOST = 64 << 20
"""Bytes of one kernel's files, above which it is not kept."""


def machine_of(device: torch.device) -> tuple[str, ...]:
    """What compiled code depends on besides its source."""
    versions = (torch.__version__, platform.python_version(), platform.system(), sys.implementation.cache_tag or "")
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return (*versions, found.name, f"{found.major}.{found.minor}", str(torch.version.cuda), _triton_version())
    return (*versions, _processor(), str(torch.get_num_threads()))


@functools.cache
def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


@functools.cache
def _processor() -> str:
    """What C++ kernels are compiled for: the processor's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()


def kernel_key(structure: Any, device: torch.device, settings: Mapping[str, Any]) -> str:
    """The key of a kernel: of what it computes, where, and of how it is compiled."""
    text = repr((structure, sorted(settings.items()), machine_of(device), sources_digest()))
    return hashlib.sha256(text.encode()).hexdigest()


def keep(key: str, source: str, call: Callable[..., Any], compiled_in: Path | None) -> None:
    """Keep a kernel that is compiled.

    Args:
        source: of the module that Inductor has written.
        call: its function.
        compiled_in: the folder where Triton has put what it compiled.
    """
    folder = the_folder()
    if folder is None or (wrapper := _wrapper_of(source)) is None:
        return
    text, names, triton = wrapper
    held = _scope_of(call, names)
    libraries = {name: library_of(held.get(name)) for name in names if name not in triton}
    files = {} if compiled_in is None or not triton else _files_below(compiled_in)
    if any(path is None for path in libraries.values()) or (triton and not files):
        return
    cpp = {name: path.read_bytes() for name, path in libraries.items() if path is not None}
    if sum(map(len, (*cpp.values(), *files.values()))) <= _MOST:
        chosen = {name: choice for name in triton if (choice := chosen_launch(held.get(name))) is not None}
        data = {"call": text, "cpp": cpp, "triton": triton, "files": files, "chosen": chosen}
        folder.write(KIND, key, pack(data))


def load(key: str) -> Callable[[list[Any]], Any] | None:
    """The function of a kept kernel; ``None`` if there is none, or it does not load."""
    folder = the_folder()
    if folder is None or (data := folder.read(KIND, key)) is None:
        return None
    try:
        known = unpack(data)
        scope = names_of_wrappers()
        for name, library in known["cpp"].items():
            path = _scratch() / f"{key[:24]}.{name}.so"
            path.write_bytes(library)
            scope[name] = load_library(path, f"mosaic_{key[:24]}_{name}")
            path.unlink()
        if known["triton"]:
            place = _scratch() / key[:24]
            for name, content in known["files"].items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(moved(name, content, _HERE, place))
            with caches_in(place):
                scope |= load_triton(known["triton"], known["chosen"])
        exec(compile(known["call"], f"<kernel {key[:12]}>", "exec"), scope)
    except (CodecError, OSError, ImportError, KeyError, SyntaxError, RuntimeError, AttributeError) as error:
        folder.drop(KIND, key, f"{type(error).__name__}: {error}")
        return None
    found: Callable[[list[Any]], Any] = scope["call"]
    return found


@functools.cache
def _scratch() -> Path:
    """A folder of this process, for files that have to lie somewhere to be loaded."""
    found = Path(tempfile.mkdtemp(prefix="mosaic_kernels_"))
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    return found


def compile_folder(key: str) -> Path:
    """Where Triton puts what it compiles for a kernel."""
    return _scratch() / f"made_{key[:24]}"


def _scope_of(call: Callable[..., Any], names: Sequence[str]) -> Mapping[str, Any]:
    """The global names of a module's function, which may have been wrapped (inputs are copied where they are not
    aligned)."""
    waiting: list[Any] = [call]
    for found in waiting:
        if not callable(found) or len(waiting) > 100:
            continue
        scope: Mapping[str, Any] = getattr(found, "__globals__", {})
        if names and all(name in scope for name in names):
            return scope
        waiting += [getattr(found, name, None) for name in ("__func__", "__wrapped__", "func")]
        for cell in getattr(found, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # it is empty
                waiting.append(cell.cell_contents)
    return {}


def _files_below(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    return {name: moved(name, path.read_bytes(), folder, _HERE) for path, name in names.items()}


def _wrapper_of(source: str) -> tuple[str, list[str], dict[str, str]] | None:
    """The function ``call`` of a module of Inductor's by itself, the kernels that it calls, and the sources of those in
    Triton's language; ``None`` if it needs anything else of its module."""
    tree = ast.parse(source)
    found = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"), None)
    if found is None:
        return None
    kernels: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
            made, name = node.value, node.targets[0].id
            if isinstance(made.func, ast.Attribute) and ast.unparse(made.func.value) == "async_compile":
                text = made.args[1]
                kernels[name] = ""
                if made.func.attr == "triton" and isinstance(text, ast.Constant):
                    kernels[name] = str(text.value)
                elif made.func.attr != "cpp_pybinding":
                    return None
    found.args.args = [argument for argument in found.args.args if argument.arg != "self"]
    names = [node for node in ast.walk(found) if isinstance(node, ast.Name)]
    local = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {arg.arg for arg in found.args.args}
    used = {node.id for node in names} - local
    known = kernels.keys() | names_of_wrappers().keys() | vars(builtins).keys()
    if not used <= known:
        return None
    wanted = [name for name in kernels if name in used]
    return ast.unparse(found), wanted, {name: kernels[name] for name in wanted if kernels[name]}
