"""The house: rooms import rooms on lower floors only, inside of functions, too (docs/architecture.md, "Floors")."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import networkx as nx
import pytest

spec = importlib.util.spec_from_file_location("house", Path(__file__).parent.parent / "docs" / "house.py")
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)


def test_every_room_has_a_floor():
    assert sorted(name for floor in house.FLOORS for name in floor) == sorted({*map(house.room, house.modules())})


def test_imports_go_down():
    floor_of = {name: number for number, floor in enumerate(house.FLOORS) for name in floor}
    between = [(a, b) for a, b in house.edges() if house.room(a) != house.room(b)]
    assert not [(a, b) for a, b in between if floor_of[house.room(a)] <= floor_of[house.room(b)]]


def test_no_circle_of_imports():
    circles = nx.strongly_connected_components(nx.DiGraph(house.edges()))
    assert not [circle for circle in circles if len(circle) > 1]


@pytest.mark.parametrize("name", sorted(name for name in house.modules() if house.room(name) == "planning"))
def test_planning_needs_no_torch(name):
    assert "import torch" not in house.modules()[name].read_text()


def test_the_picture_is_that_of_the_code():
    assert house.PICTURE.read_text() == house.svg(), "draw it again: python docs/house.py"


def test_no_file_is_long_and_most_are_short():
    lengths = sorted(len(path.read_text().splitlines()) for path in house.modules().values())
    assert lengths[-1] <= 400
    assert lengths[len(lengths) // 2] < 130
