"""The house: rooms import rooms on lower floors only, inside of functions, too (docs/architecture.md, "Floors")."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parent.parent / "mosaic_compiler"

FLOORS = (
    {"errors", "recipes", "registration"},
    {"settings"},
    {"planning", "compat"},
    {"ir"},
    {"book"},
    {"kernels", "options"},
    {"lowering"},
    {"passes", "runtime"},
    {"dump", "graph_log", "capture", "true_masks"},
    {"methods"},
    {"backend"},
    {"sampling"},
    {"ahead"},
    {"report"},
    {"cli_values"},
    {"cli_generate"},
    {"cli", "__init__"},
)


def modules() -> dict[str, Path]:
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mosaic_compiler":
            home = (node.module or "").partition(".")[2]
            full = {f"{home}.{name.name}".lstrip(".") for name in node.names}
            found |= {name if name in known else home or "__init__" for name in full}
        elif isinstance(node, ast.Import):
            found |= {n.name.partition(".")[2] for n in node.names if n.name.startswith("mosaic_compiler.")}
    return found


def edges() -> list[tuple[str, str]]:
    known = modules()
    return [(name, target) for name, path in known.items() for target in imports_of(path, known)]


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_a_floor():
    assert sorted(name for floor in FLOORS for name in floor) == sorted({room(name) for name in modules()})


def test_imports_go_down():
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = [
        f"{source} imports {target}"
        for source, target in edges()
        if room(source) != room(target) and floor_of[room(source)] <= floor_of[room(target)]
    ]
    assert not wrong


def test_no_circle_of_imports():
    assert not [circle for circle in nx.strongly_connected_components(nx.DiGraph(edges())) if len(circle) > 1]


@pytest.mark.parametrize("name", sorted(name for name in modules() if room(name) == "planning"))
def test_planning_needs_no_torch(name):
    assert "import torch" not in modules()[name].read_text()
