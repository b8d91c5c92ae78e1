"""The floors of the house, read from the code: ``python docs/house.py`` draws ``docs/floors.svg``.

A room is a folder or a module of ``mosaic_compiler``; it imports rooms on lower floors only (``tests/test_floors.py``).
"""

from __future__ import annotations

import ast
from pathlib import Path

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "mosaic_compiler"
PICTURE = DOCS / "floors.svg"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "recipes", "registration", "waiting"),
    ("settings",),
    ("planning", "compat"),
    ("disk",),
    ("ir",),
    ("book",),
    ("kernels", "options"),
    ("lowering",),
    ("passes", "runtime"),
    ("dump", "graph_log", "capture", "true_masks", "one_depth"),
    ("kept_graphs",),
    ("methods",),
    ("backend",),
    ("owned",),
    ("session",),
    ("sampling",),
    ("ahead", "quality"),
    ("report",),
    ("cli_values",),
    ("cli_fit", "cli_generate", "cli_cache", "cli_quality"),
    ("cli", "__init__"),
)
"""From the ground up."""

WIDTH, HEIGHT, GAP, LEFT = 150, 30, 22, 40


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name in it."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that a module imports, also inside of functions."""
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
    """Who imports whom."""
    known = modules()
    return [(name, target) for name, path in sorted(known.items()) for target in sorted(imports_of(path, known))]


def room(module: str) -> str:
    """Where a module stands."""
    return module.partition(".")[0]


def svg() -> str:
    """The picture: one row per floor, the ground at the bottom; a line to every room that a room imports."""
    place = {}
    for number, floor in enumerate(FLOORS):
        for position, name in enumerate(floor):
            shift = (max(map(len, FLOORS)) - len(floor)) * (WIDTH + GAP) // 2
            place[name] = (LEFT + shift + position * (WIDTH + GAP), (len(FLOORS) - 1 - number) * (HEIGHT + GAP) + GAP)
    lines, boxes = [], []
    for source, target in sorted({(room(a), room(b)) for a, b in edges() if room(a) != room(b)}):
        (x, y), (u, v) = place[source], place[target]
        start, end = (x + WIDTH // 2, y + HEIGHT), (u + WIDTH // 2, v)
        lines.append(
            f'<path d="M{start[0]},{start[1]} C{start[0]},{start[1] + 30} {end[0]},{end[1] - 30} {end[0]},{end[1]}"/>'
        )
    for name, (x, y) in place.items():
        is_folder = (PACKAGE / name).is_dir()
        boxes.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>')
        text = f"{name}/" if is_folder else f"{name}.py"
        boxes.append(f'<text x="{x + WIDTH // 2}" y="{y + 20}">{text}</text>')
    width = 2 * LEFT + max(map(len, FLOORS)) * (WIDTH + GAP) - GAP
    height = len(FLOORS) * (HEIGHT + GAP) + GAP
    style = (
        "path{fill:none;stroke:#8aa2b8;stroke-width:1;opacity:.55} rect{fill:#eef3f7;stroke:#46627f} "
        "text{font:13px monospace;text-anchor:middle;fill:#1d2b38} .back{fill:#fff;stroke:none}"
    )
    parts = "\n".join((*lines, *boxes))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">\n<style>{style}</style>\n'
        f'<rect class="back" width="{width}" height="{height}"/>\n{parts}\n</svg>\n'
    )


if __name__ == "__main__":
    PICTURE.write_text(svg())
