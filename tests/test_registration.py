"""The backend is known by its name without an installed package, whatever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_INSTALLED = """
import importlib.metadata, sys
find = importlib.metadata.MetadataPathFinder.find_distributions
def others(*arguments, **named):
    return (d for d in find(*arguments, **named) if d.metadata["Name"] != "mosaic-compiler")
importlib.metadata.MetadataPathFinder.find_distributions = others
"""
COMPILE = """
f = lambda x: x * 2 + 1
x = torch.ones(3)
assert torch.equal(torch.compile(f, backend="mosaic")(x), f(x))
assert torch._dynamo.list_backends().count("mosaic") == 1
"""


def python(script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MOSAIC_DISABLE": "fuse"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import mosaic_compiler, torch\n", marks=pytest.mark.slow),
        pytest.param("import torch, mosaic_compiler\n", marks=pytest.mark.slow),
        'import torch; torch.compile(abs, backend="eager")(torch.ones(1)); import mosaic_compiler\n',
    ],
    ids=["mosaic first", "torch first", "torch has looked for backends before"],
)
def test_a_checkout_on_the_path_is_enough(first):
    python(NOT_INSTALLED + first + COMPILE)


def test_an_installed_entry_point_stays_the_one(tmp_path):
    """Registered twice, the installed one first; importing the package alone imports no torch."""
    installed = tmp_path / "mosaic_compiler-9.9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mosaic-compiler\nVersion: 9.9\n")
    (installed / "entry_points.txt").write_text("[torch_dynamo_backends]\nmosaic = mosaic_compiler.backend:mosaic\n")
    python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib.metadata, mosaic_compiler\n"
        "assert 'torch' not in sys.modules\n"
        "importlib.reload(mosaic_compiler)\n"
        "assert importlib.metadata.version('mosaic-compiler') == '9.9'\n"
        "import torch\n" + COMPILE
    )
