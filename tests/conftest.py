from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("SYMPY_CACHE_SIZE", "20000")  # before sympy is imported

import pytest
import torch
from hypothesis import HealthCheck, settings

import mosaic_compiler
from mosaic_compiler.owned.function import forget_made
from mosaic_compiler.settings import SWITCHES

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("default")

TINY_LLADA = Path(__file__).parent.parent / "examples" / "tiny-llada"


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: the garbage collector need not look at it again and again (a fifth of the time)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


def pytest_unconfigure(config: pytest.Config) -> None:
    """As it was: some libraries complain of what is alive at the end."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fresh_dynamo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test compiles afresh, with one thread per worker and no MOSAIC_ switches set, but without ``fuse`` (kernels
    take seconds to compile; ``tests/test_fuse.py`` has it on), and without a cache on disk."""
    torch.set_num_threads(1)
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOSAIC_CACHE", "off")
    if request.node.get_closest_marker("fuse") is None:
        monkeypatch.setenv("MOSAIC_DISABLE", "fuse")
    forget_made()
    yield
    torch._dynamo.reset()


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What other tests of this run have compiled is there, as it is for users: for tests of results."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    monkeypatch.setenv("MOSAIC_CACHE", str(shared / "warm"))


@pytest.fixture
def fresh_gpu() -> Iterator[None]:
    """What a test leaves on the device is given back."""
    yield
    torch._dynamo.reset()
    mosaic_compiler.release_memory()
    torch.cuda.empty_cache()


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs ``mosaic``: exit code, stdout, stderr."""
    from mosaic_compiler import cli

    monkeypatch.setenv("MOSAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mosaic", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


@pytest.fixture(scope="session")
def tiny_llada() -> torch.nn.Module:
    """The shipped 7M-parameter masked-diffusion model, float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(TINY_LLADA, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def genesis() -> torch.Tensor:
    """Token ids of the shipped passage, int64 [1, about 7000]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_LLADA)
    return torch.tensor([tokenizer((TINY_LLADA.parent / "genesis.txt").read_text()).input_ids])
