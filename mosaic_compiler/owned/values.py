"""What is found out about a function without running it, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mosaic_compiler.compat import trees
from mosaic_compiler.disk.folder import sources_digest, the_folder
from mosaic_compiler.disk.values import MISSING, read, write
from mosaic_compiler.kernels.artifacts import machine_of
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.owned.fingerprint import Fingerprint


def kept_on_disk(
    kind: str,
    fn: Callable[..., Any],
    example: Sequence[Any],
    options: Mapping[str, Any],
    device: str,
    make: Callable[[], Any],
) -> Any:
    """What ``make()`` returns for a function, an example of its arguments and options; made once.

    Args:
        kind: of the entry.
        device: what it is planned for.
    """
    folder, modes = the_folder(), trees.modes()
    if folder is None or modes is None:
        return make()
    found = Fingerprint((fn, tuple(example)))
    if found.doubts:
        return make()
    given = MosaicOptions.parse(options)
    machine = machine_of(torch.device(device))
    parts = (found.digest, modes, given.for_passes, given, device, machine, sources_digest())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    known = read(folder, kind, key)
    if known is not MISSING:
        return known
    made = make()
    write(folder, kind, key, made, getattr(fn, "__qualname__", type(fn).__name__))
    return made
