"""``torch.compile(..., backend="mosaic")`` without an installed package: a checkout on ``PYTHONPATH`` is enough.

PyTorch asks ``importlib.metadata`` which backends there are, once, when it first looks up a name.  An installed package
has its entry point there.  For a package that was only imported, :class:`_Entry` answers in its place (what Python's
documentation calls extending the search algorithm), so that it makes no difference whether torch or this package is
imported first, and neither imports the other.  Where PyTorch has asked already, the entry is put into its table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

PACKAGE = "mosaic-compiler"
GROUP, BACKEND, TARGET = "torch_dynamo_backends", "mosaic", "mosaic_compiler.backend:mosaic"


class _Entry:
    """A finder of metadata.  The last that is asked: what is installed under the same name comes first."""

    def __init__(self, version: str) -> None:
        self.files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {version}\n",
            "entry_points.txt": f"[{GROUP}]\n{BACKEND} = {TARGET}\n",
        }

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """It finds no modules."""

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        """This package, if it is asked for by name or if all are."""
        from importlib.metadata import Distribution

        class Imported(Distribution):
            def read_text(_, filename: str) -> str | None:  # noqa: N805
                return self.files.get(filename)

            def locate_file(_, path: Any) -> Any:  # noqa: N805
                raise FileNotFoundError(f"{PACKAGE} is not installed: there is no {path}")

        if context is not None and list(context.path) != sys.path:
            return  # asked for what is in some folder
        wanted = getattr(context, "name", None)
        if wanted is None or str(wanted).lower().replace("_", "-") == PACKAGE:
            yield Imported()


def register(version: str) -> None:
    """Make the backend known; again makes no difference."""
    if any(isinstance(finder, _Entry) for finder in sys.meta_path):
        return
    sys.meta_path.append(_Entry(version))
    registry = sys.modules.get("torch._dynamo.backends.registry")
    if registry is None:
        return
    from importlib.metadata import EntryPoint

    registry._BACKENDS.setdefault(BACKEND, EntryPoint(BACKEND, TARGET, GROUP))
