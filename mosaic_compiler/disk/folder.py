"""A folder of entries: each is a file under the hash of everything that it depends on.

An entry is written beside its place and moved there, so that a reader sees all of it or nothing, whoever is killed
when.  Its first line says how its bytes are hashed: an entry that does not add up is thrown away.  The folder is kept
below a size; what was not used for longest goes first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mosaic_compiler.disk.behind import settle
from mosaic_compiler.errors import OptionsError
from mosaic_compiler.planning.budget import parse_budget
from mosaic_compiler.settings import read_settings

logger = logging.getLogger("mosaic_compiler")

DEFAULT_SIZE = 4 << 30
"""Bytes that the folder may take."""

_FORMAT = "mosaic-entry-1"
_STALE = 3600
"""Seconds after which a file that was begun and never finished is somebody's who was killed."""


@dataclass(frozen=True)
class Entry:
    """One file.

    Attributes:
        path: where it is.
        kind: what it holds: ``step``, ``kinds``, ``kernel``, ``outline``.
        label: for people: which model.
        nbytes: of the file.
        used: seconds since the epoch when it was last used.
    """

    path: Path
    kind: str
    label: str
    nbytes: int
    used: float


class Folder:
    """The entries below one folder.

    Args:
        root: it is made when the first entry is written.
        most: bytes that all of them may take.
    """

    def __init__(self, root: Path, most: int = DEFAULT_SIZE) -> None:
        self.root, self.most = root, most
        self._has_said = False

    def read(self, kind: str, key: str) -> bytes | None:
        """The bytes of an entry; ``None`` if there is none, or it is damaged."""
        settle()
        path = self._path(kind, key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        try:
            data = _checked(raw, kind, key)
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            self.drop(kind, key, str(error))
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    def write(self, kind: str, key: str, data: bytes, label: str = "") -> None:
        """Keep an entry.  A folder that cannot be written to is said once, and nothing is kept."""
        packed = zlib.compress(data, 1)
        head = {"format": _FORMAT, "kind": kind, "key": key, "label": label, "sha256": _digest(packed)}
        path = self._path(kind, key)
        beside = path.parent / f".{key}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                beside.write_bytes(json.dumps(head).encode() + b"\n" + packed)
                os.replace(beside, path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            self.prune()
        except OSError as error:
            if not self._has_said:
                self._has_said = True
                logger.warning(
                    "mosaic: nothing can be kept in %s (%s): every process compiles again; set MOSAIC_CACHE to a "
                    "folder that can be written to, or to off",
                    self.root,
                    error.strerror or error,
                )

    def drop(self, kind: str, key: str, why: str) -> None:
        """Throw an entry away."""
        logger.warning("mosaic: a damaged entry of the cache is thrown away: %s: %s", self._path(kind, key), why)
        with suppress(OSError):
            self._path(kind, key).unlink(missing_ok=True)

    def keys(self, kind: str, prefix: str) -> list[str]:
        """Keys of entries that begin with this (two characters or more), in order."""
        settle()
        folder = self.root / kind / prefix[:2]
        with suppress(OSError):
            return sorted(path.name for path in folder.iterdir() if path.name.startswith(prefix))
        return []

    def entries(self) -> list[Entry]:
        """All of them, the last used first.  What is damaged has no label."""
        found = []
        for path, status in self._files():
            if not path.name.startswith("."):
                found.append(Entry(path, path.parent.parent.name, _label(path), status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: -entry.used)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(status.st_size for _, status in self._files())

    def clear(self) -> int:
        """Delete everything; how many files there were."""
        count = 0
        for path, _ in list(self._files()):
            with suppress(OSError):
                path.unlink()
                count += 1
        return count

    def prune(self) -> None:
        """Delete what was not used for longest until nine tenths of the size are left, if it is above."""
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        total, now = sum(status.st_size for _, status in files), time.time()
        is_full = total > self.most
        for path, status in files:
            is_stale = path.name.startswith(".") and now - status.st_mtime > _STALE
            if is_stale or (is_full and total > self.most * 9 // 10):
                with suppress(OSError):
                    path.unlink()
                    total -= status.st_size

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        settle()
        for path in self.root.glob("*/*/*"):
            with suppress(OSError):  # another process was faster
                yield path, path.stat()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checked(raw: bytes, kind: str, key: str) -> bytes:
    """The data of a file.

    Raises:
        ValueError: if it is not what was written.
    """
    first, _, packed = raw.partition(b"\n")
    head: Any = json.loads(first)
    if (head["format"], head["kind"], head["key"]) != (_FORMAT, kind, key):
        raise ValueError("it is another entry's")
    if head["sha256"] != _digest(packed):
        raise ValueError("its bytes have changed")
    return zlib.decompress(packed)


def _label(path: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
        return str(json.loads(file.readline(1 << 16))["label"])
    return ""


def the_folder() -> Folder | None:
    """What ``MOSAIC_CACHE`` says: a folder, by default ``mosaic_compiler`` in the user's cache folder; ``off``: none.

    Raises:
        OptionsError: for a malformed ``MOSAIC_CACHE_SIZE``.
    """
    settings = read_settings()
    if settings.cache == "off":
        return None
    root = Path(settings.cache) if settings.cache else _default_root()
    try:
        most = parse_budget(settings.cache_size) if settings.cache_size else DEFAULT_SIZE
    except OptionsError as error:
        raise OptionsError(f"MOSAIC_CACHE_SIZE: {error}") from None
    return _folder(root, most or DEFAULT_SIZE)


def _default_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosaic_compiler"


@cache
def _folder(root: Path, most: int) -> Folder:
    return Folder(root, most)


@cache
def sources_digest() -> str:
    """A hash of this package's own code."""
    found = hashlib.sha256()
    package = Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
