"""explain(), dumps, switches, and that the documentation names all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mosaic_compiler
from mosaic_compiler.errors import OptionsError
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes.pipeline import PASSES
from mosaic_compiler.planning.buffers import Buffer
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.settings import SWITCHES, read_settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(torch.relu(self.up(x)) * 2, -1).sum(-1)


def test_explain_reports_plan_passes_and_provenance():
    block, x = Block().eval(), torch.randn(3, 7, 16)
    report = mosaic_compiler.explain(block, x)
    assert torch.equal(report.result, block(x))
    assert [record.name for record in report.passes] == [p.name for p in PASSES if p.name != "fuse"]
    assert report.plan.peak > 0
    addmm = next(b for b in report.plan.buffers if b.op.startswith("aten.addmm"))
    assert addmm.module == "up"
    assert addmm.shape == (21, 32)
    assert addmm.nbytes == 21 * 32 * 4
    assert re.search(r"test_inspecting\.py:\d+$", addmm.source)
    text = str(report)
    for expected in (
        "peak",
        "arena height",
        "addmm",
        "21x32",
        "live bytes over the step",
        "canonicalize",
        "fallbacks: none",
    ):
        assert expected in text


GLOBAL = Block().eval()


def test_modules_have_their_own_names_wherever_they_come_from():
    def of_a_global(x):
        return GLOBAL(x)

    here = sys.modules[__name__]

    def of_a_closure(x):
        return here.GLOBAL(x)

    def of_an_argument(x, block):
        return block(x)

    x, names = torch.randn(3, 7, 16), set()
    with torch.no_grad():
        for fn, given in ((of_a_global, ()), (of_a_closure, ()), (of_an_argument, (GLOBAL,))):
            plan = mosaic_compiler.explain(fn, x, *given).plan
            names |= {b.module for b in plan.buffers if b.op.startswith("aten.addmm")}
    assert names == {"GLOBAL.up", "up"}


def test_sizes_are_called_what_they_are_in_the_graph():
    def step(ids, mask, weight, times):
        rows = torch.nn.functional.embedding(ids, weight)
        kept = torch.where((ids == 3).unsqueeze(-1), rows @ weight.T, 0.0)
        return kept, torch.where(mask, times, 0)

    arguments = (torch.arange(40).view(2, 20) % 5, torch.ones(7) > 0, torch.randn(11, 13), 4)
    report = mosaic_compiler.explain(step, *arguments)
    meanings = set(dict(report.plan.meanings).values())
    assert {"tokens", "sequences", "masked rows", "as size 0 of args[1]", "as size 0 of args[2]"} <= meanings
    assert "20 tokens, 2 sequences" in str(report)
    assert "sequences*tokens" in str(report), "the table of computed rows says it in words, too"


def test_rows_that_are_not_masked_are_only_called_needed():
    def step(ids, weight):
        rows = torch.nn.functional.embedding(ids, weight) @ weight.T
        return torch.where((ids == 3).logical_not().unsqueeze(-1), rows, 0.0)

    report = mosaic_compiler.explain(step, torch.arange(40).view(2, 20) % 5, torch.randn(11, 13))
    assert "needed rows" in dict(report.plan.meanings).values()
    assert "masked rows" not in dict(report.plan.meanings).values()


def test_explain_can_be_called_many_times_and_on_compiled_functions():
    block, x = Block().eval(), torch.randn(3, 7, 16)
    for _ in range(12):
        assert mosaic_compiler.explain(block, x).graphs
    compiled = torch.compile(block, backend="mosaic", dynamic=True)
    assert mosaic_compiler.explain(compiled, x).graphs


def test_explain_reports_every_graph():
    def f(x):
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    report = mosaic_compiler.explain(f, torch.randn(5))
    assert len(report.graphs) == 2
    assert "graph 2 of 2" in str(report)


def test_explain_of_nothing_says_so():
    report = mosaic_compiler.explain(lambda x: 7, torch.randn(3))
    assert report.graphs == ()
    with pytest.raises(ValueError, match="nothing was compiled"):
        _ = report.plan


@pytest.mark.fuse
def test_dump_writes_runnable_graphs_and_the_plan(tmp_path):
    report = mosaic_compiler.explain(Block().eval(), torch.randn(3, 7, 16), dump=str(tmp_path))
    folder = tmp_path / "graph-000"
    files = sorted(path.name for path in folder.glob("*.py"))
    assert files == ["00-captured.py", *(f"{i:02d}-{p.name}.py" for i, p in enumerate(PASSES, 1))]
    assert MemoryPlan.from_json((folder / "plan.json").read_text()) == report.plan
    lowered = {path.name: path.read_text() for path in folder.glob("lowered-*.txt")}
    assert "lowered-loops.txt" in lowered
    assert all(
        "[destination] -> " in text and text.splitlines()[-1].startswith("return %") for text in lowered.values()
    )
    printed = set()
    for name in files:
        source = (folder / name).read_text()
        assert "Constructed by" in source
        with contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_path(str(folder / name), run_name="__main__")
        printed.add(out.getvalue())
    run = subprocess.run([sys.executable, folder / files[-1]], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert {*printed, run.stdout} == {"0 (3, 7)\n"}


def test_a_second_graph_gets_a_second_folder(tmp_path):
    for expected in ("graph-000", "graph-001"):
        mosaic_compiler.explain(Block().eval(), torch.randn(3, 7, 16), dump=tmp_path)
        assert (tmp_path / expected / "plan.json").exists()


def test_switches_win_over_options(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("MOSAIC_DISABLE", "in-place")
    monkeypatch.setenv("MOSAIC_POISON", "1")
    monkeypatch.setenv("MOSAIC_DEBUG", "2")
    monkeypatch.setenv("MOSAIC_DUMP", str(tmp_path))
    report = mosaic_compiler.explain(lambda x: (x * 2).sin() + 1, torch.randn(5))
    assert [record.name for record in report.passes] == [p.name for p in PASSES if p.name != "in-place"]
    assert "pass canonicalize" in capfd.readouterr().err
    assert (tmp_path / "graph-000" / "plan.json").exists()
    options = MosaicOptions.parse({"disable": "canonicalize"})
    assert options.disable == ("canonicalize", "in-place")
    assert options.poison
    monkeypatch.setenv("MOSAIC_POISON", "0")
    assert not MosaicOptions.parse({"poison": True}).poison


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MOSAIC_DEBUG", "9", "not a level"),
        ("MOSAIC_POISON", "perhaps", "not a switch"),
        ("MOSAIC_POSION", "1", "unknown environment switch"),
        ("MOSAIC_DISABLE", "inplace", "did you mean 'in-place'"),
    ],
)
def test_malformed_switches(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionsError, match=message):
        MosaicOptions.parse({}, settings=read_settings())


def test_every_switch_option_pass_and_plan_field_is_documented():
    environment = (DOCS / "environment.md").read_text()
    assert set(re.findall(r"\bMOSAIC_[A-Z_]+\b", environment)) == set(SWITCHES)
    for field in dataclasses.fields(MosaicOptions):
        assert f"`{field.name}`" in environment, field.name
    architecture = (DOCS / "architecture.md").read_text()
    for p in PASSES:
        assert f"`{p.name}`" in architecture, p.name
    schema = (DOCS / "plan-schema.md").read_text()
    plan = MemoryPlan((Buffer("a", "heap", 4, 0, 1, term="call"),), ("n",))
    body = json.loads(plan.to_json())
    for key in (*body, *body["summary"], *body["buffers"][0]):
        assert f"`{key}`" in schema, key


def test_every_module_is_mentioned_in_the_architecture():
    architecture = (DOCS / "architecture.md").read_text()
    for path in (ROOT / "mosaic_compiler").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in architecture, path.name


def test_pass_names_files_and_classes_correspond():
    for p in PASSES:
        snake = p.name.replace("-", "_")
        assert type(p).__name__ == "".join(part.title() for part in p.name.split("-")) + "Pass"
        assert type(p).__module__ == f"mosaic_compiler.passes.{snake}"


def test_readme_names_only_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text())) <= targets


@pytest.mark.slow
def test_the_pass_of_the_documentation_passes_its_own_tests(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "writing-passes.md").read_text(), re.S)
    (tmp_path / "test_neg_neg.py").write_text(code)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_neg_neg.py"], cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "2 passed" in ran.stdout, ran.stdout
