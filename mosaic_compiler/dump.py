"""What a compilation leaves behind for people: numbered runnable graphs, ``plan.json``, debug lines.

``options={"dump": DIR}`` writes one folder per graph::

    DIR/graph-000/00-captured.py   01-canonicalize.py   02-in-place.py   lowered-loops.txt   plan.json

Each ``.py`` file runs by itself: it rebuilds the graph and calls it on random inputs.  ``lowered-*.txt`` are the graphs
of the step as they are bound: every op, how it gets its result, and the buffer that it goes into.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.compat.symbols import hint_of
from mosaic_compiler.ir.clusters import Cluster, cluster_of
from mosaic_compiler.ir.loops import ChunkLoop, loop_of
from mosaic_compiler.passes.pipeline import PassRecord
from mosaic_compiler.planning.plan import Fallback, MemoryPlan

if TYPE_CHECKING:
    from mosaic_compiler.runtime.step import CompiledStep

_lock = threading.Lock()

_HEADER = '''"""{title}

Constructed by {name} (took {milliseconds:.1f} ms, verified in {verify:.1f} ms).
{nodes} nodes.  Run me: I call the graph on random inputs and print what comes out.
Set ``chunk_rows`` of a loop to run it in chunks.
"""

import torch
from torch import device, inf, nan  # noqa: F401
{imports}
CONSTANTS = torch.load(__file__ + ".pt") if {has_constants} else {{}}


{bodies}class Graph(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, value in CONSTANTS.items():
            setattr(self, name, value)
{loops}
'''

_FOOTER = """

def example_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tensor(shape, stride, dtype, high):
        if dtype.is_floating_point or dtype.is_complex:
            value = torch.randn(shape, generator=generator).to(dtype)
        else:
            value = torch.randint(0, high, shape, generator=generator).to(dtype)
        return torch.empty_strided(shape, stride, dtype=dtype).copy_(value)

    return [
{inputs}
    ]


if __name__ == "__main__":
    with torch.no_grad():
        outputs = Graph()(*example_inputs())
    for index, value in enumerate(outputs if isinstance(outputs, (tuple, list)) else [outputs]):
        print(index, tuple(value.shape) if isinstance(value, torch.Tensor) else value)
"""


class GraphDump:
    """Writes one graph's folder, and prints the lines of ``MOSAIC_DEBUG``."""

    def __init__(self, folder: str | None, module: fx.GraphModule, level: int) -> None:
        self._level = level
        self._number = 1
        self._folder = _next_folder(Path(folder)) if folder else None
        if self._folder is not None:
            record = PassRecord("capture", 0.0, 0.0, len(module.graph.nodes), len(module.graph.nodes))
            (self._folder / "00-captured.py").write_text(render(module, record, self._folder / "00-captured.py"))

    def after_pass(self, module: fx.GraphModule, record: PassRecord) -> None:
        if self._level >= 2:
            _say(
                f"pass {record.name}: {record.nodes_before} -> {record.nodes_after} nodes, "
                f"{record.seconds * 1e3:.1f} ms + {record.verify_seconds * 1e3:.1f} ms verified"
            )
        if self._folder is not None:
            path = self._folder / f"{self._number:02d}-{record.name}.py"
            path.write_text(render(module, record, path))
            self._number += 1

    def compiled(self, step: CompiledStep) -> None:
        if self._folder is not None:
            for name, lowered in step.kept.variants.items():
                (self._folder / f"lowered-{name}.txt").write_text(f"{lowered}\n")
        if self._level >= 1:
            _say(f"compiled a graph of {len(step.lives.schedule)} nodes, {len(step.fallbacks)} fallbacks")
        if self._level >= 3:
            for fallback in step.fallbacks:
                _say(f"fallback {fallback.name}: {fallback.node} {fallback.op}: {fallback.reason} {fallback.source}")

    def plan(self, plan: MemoryPlan, fallbacks: Sequence[Fallback]) -> None:
        if self._level >= 1:
            sizes = ", ".join(plan.sizes) or "static sizes"
            _say(f"plan of {sizes}: height {plan.height}, bound {plan.lower_bound}, peak {plan.peak}")
        if self._folder is not None:
            (self._folder / "plan.json").write_text(replace(plan, fallbacks=tuple(fallbacks)).to_json())


def _say(text: str) -> None:
    print(f"mosaic: {text}", file=sys.stderr, flush=True)


def _next_folder(root: Path) -> Path:
    with _lock:
        root.mkdir(parents=True, exist_ok=True)
        number = len(list(root.glob("graph-*")))
        folder = root / f"graph-{number:03d}"
        folder.mkdir()
    return folder


def render(module: fx.GraphModule, record: PassRecord, path: Path) -> str:
    """The graph as a Python file that runs; constants go to ``<path>.pt`` beside it."""
    constants = {
        str(node.target): getattr(module, str(node.target))
        for node in module.graph.nodes
        if node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), torch.Tensor)
    }
    if constants:
        torch.save(constants, f"{path}.pt")
    header = _HEADER.format(
        imports=_IMPORTS if any(node.op == "call_module" for node in module.graph.nodes) else "",
        bodies=_bodies(module, ""),
        loops=_constructions(module, ""),
        title=path.stem, name=record.name, milliseconds=record.seconds * 1e3, verify=record.verify_seconds * 1e3,
        nodes=record.nodes_after, has_constants=bool(constants),
    )  # fmt: skip
    code = _indented(module.code)
    inputs = "\n".join(
        f"        {_example(node)},  # {node.name}" for node in module.graph.nodes if node.op == "placeholder"
    )
    return header + code + _FOOTER.format(inputs=inputs)


def _indented(code: str) -> str:
    return "\n".join("    " + line if line else "" for line in code.strip().splitlines())


_IMPORTS = """
import sympy  # noqa: F401

from mosaic_compiler.ir.clusters import Cluster  # noqa: F401
from mosaic_compiler.ir.loops import ChunkLoop, LoopOutput, Scatter  # noqa: F401
"""


def _parts(module: fx.GraphModule) -> dict[str, ChunkLoop | Cluster]:
    """The submodules that a graph calls, by name."""
    found: dict[str, ChunkLoop | Cluster] = {}
    for node in module.graph.nodes:
        part = loop_of(node) or cluster_of(node)
        if part is not None:
            found[str(node.target)] = part
    return found


def _body_class(name: str) -> str:
    return "".join(part.title() for part in name.split("_")) + "Body"


def _bodies(module: fx.GraphModule, prefix: str) -> str:
    """The bodies of loops and clusters as classes, inner ones first."""
    text = ""
    for name, part in _parts(module).items():
        full = prefix + name
        text += _bodies(part.body, full + "_")
        inner = _constructions(part.body, full + "_")
        start = f"    def __init__(self):\n        super().__init__()\n{inner}\n" if inner else ""
        text += f"class {_body_class(full)}(torch.nn.Module):\n{start}{_indented(part.body.code)}\n\n\n"
    return text


def _constructions(module: fx.GraphModule, prefix: str) -> str:
    """The lines that make a graph's loops (with what they slice and where their results go) and clusters."""
    text = ""
    for name, part in _parts(module).items():
        made = f"{_body_class(prefix + name)}()"
        if isinstance(part, Cluster):
            text += f"        self.{name} = Cluster({made}, {part.into})\n"
            continue
        outputs = ", ".join(f"LoopOutput({o.dim}, {o.order}, {o.into}, {o.scatter})" for o in part.outputs)
        text += (
            f"        self.{name} = ChunkLoop(\n            {made}, {part.operands},\n"
            f"            [{outputs}], sympy.Symbol({str(part.chunk)!r}),\n        )\n"
        )
    return text


def _example(node: fx.Node) -> str:
    """An expression for an input: sizes are the hints that the graph was traced with."""
    value = ir.value_of(node)
    if not isinstance(value, torch.Tensor):
        return repr(_hint(value))
    shape, stride = ([_hint(n) for n in numbers] for numbers in (value.shape, value.stride()))
    return f"tensor({shape}, {stride}, {value.dtype}, 8)"


def _hint(value: Any) -> Any:
    return hint_of(value)
