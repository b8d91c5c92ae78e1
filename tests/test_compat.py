"""PyTorch's private modules are named in ``compat/`` and ``kernels/fused.py`` only, and listed in the documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mosaic_compiler"
ALLOWED = {"torch._ops"}


def dotted(node: ast.AST) -> str:
    """``torch._C._nn`` for that attribute, else an empty text."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def private_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [
                f"{node.module}.{name.name}" if node.module == "torch" else str(node.module) for name in node.names
            ]
            names += [f"{node.module}.{name.name}" for name in node.names if name.name.startswith("_")]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        else:
            continue
        for name in names:
            is_op = name.startswith(("torch.ops.", "torch.testing"))
            is_private = (
                any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
                or ".experimental" in name
            )
            if name.startswith("torch.") and is_private and not is_op and name not in ALLOWED:
                yield name


def test_only_compat_and_one_kernel_module_name_private_modules():
    homes = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if list(private_names(path))}
    assert {home for home in homes if not home.startswith("compat/")} == {"kernels/fused.py"}


def test_each_of_them_is_documented():
    text = (ROOT / "docs" / "torch-internals.md").read_text()
    for path in (PACKAGE / "compat").glob("*.py"):
        for name in private_names(path):
            parts = name.split(".")
            homes = [".".join(parts[:length]) for length in range(2, len(parts) + 1)]
            assert any(f"`{home}" in text for home in homes[1:] or homes), f"{path.name}: {name}"
