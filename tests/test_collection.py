"""Tests are found where only a part of what they need is installed, as on a borrowed GPU machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_collecting_needs_neither_bokeh_nor_matplotlib_nor_ortools(tmp_path):
    (tmp_path / "blocked.py").write_text(
        "import sys\nfor name in ('bokeh', 'matplotlib', 'ortools'):\n    sys.modules[name] = None\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    arguments = ["--collect-only", "-p", "blocked", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_gpu.py" in done.stdout
