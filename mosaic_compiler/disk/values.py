"""Entries that hold data: read and written as values."""

from __future__ import annotations

from typing import Any

from mosaic_compiler.disk.codec import CodecError, pack, unpack
from mosaic_compiler.disk.folder import Folder

MISSING: Any = object()
"""Stands for an entry that is not there (``None`` is a value)."""


def read(folder: Folder | None, kind: str, key: str) -> Any:
    """What an entry holds; :data:`MISSING` if there is none, or it is thrown away because it is damaged."""
    if folder is None or (data := folder.read(kind, key)) is None:
        return MISSING
    try:
        return unpack(data)
    except CodecError as error:
        folder.drop(kind, key, str(error))
        return MISSING


def write(folder: Folder | None, kind: str, key: str, value: Any, label: str = "") -> None:
    """Keep a value, if there is a folder.

    Raises:
        CacheError: for one that is no such data.
    """
    if folder is not None:
        folder.write(kind, key, pack(value), label)
