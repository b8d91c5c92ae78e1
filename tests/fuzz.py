"""Random toy programs against eager PyTorch: ``make fuzz``, or ``python -m tests.fuzz --count 100``.

A program is a few lines of ordinary PyTorch code, made from a seed: views of views, writes in place (into views, masks
and inputs), ``as_strided``, keyword arguments, whole numbers that wrap around, attention with masks, and custom ops
whose schema or fake kernel is wrong.  Dynamo captures it once; what it captured is compiled as it is for users, in
poison mode and in chunks of rows, and each of them has to return what eager PyTorch returns, at two lengths.

A program that ``aot_eager`` gets wrong as well is not ours.  Seeds that are done are kept in a file, so a run that was
cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd

from mosaic_compiler.backend import _decompositions, compile_aten
from mosaic_compiler.capture import forget_floats, specialize_floats
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.true_masks import drop_true_masks

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_lines import MADE, MASKS, SQUARES, WHOLE, WRITES
from undeclared import define

WIDTH = 4
LENGTHS = (6, 9)
VARIANTS = ({}, {"poison": True}, {"poison": True, "chunk_rows": 2})

library = torch.library.Library("fuzz", "FRAGMENT")


def _define() -> None:
    """Ops that do other things than they say: return an argument, one result twice, or another layout."""
    ops = {
        "same(Tensor x) -> Tensor": (lambda x: x, torch.empty_like),
        "part(Tensor x) -> Tensor": (lambda x: x[1:], lambda x: torch.empty_like(x[1:])),
        "twice(Tensor x) -> (Tensor, Tensor)": (
            lambda x: (y := x + 1, y.view_as(y)),
            lambda x: (torch.empty_like(x), torch.empty_like(x)),
        ),
        "dense(Tensor x) -> Tensor": (lambda x: (x * 2).contiguous(), torch.empty_like),
        "sometimes(Tensor x) -> Tensor": (lambda x: x if float(x.sum()) > 0 else x.clone(), torch.empty_like),
    }
    for schema, (real, fake) in ops.items():
        define(library, schema, real, fake)


_define()


def program_of(seed: int) -> str:
    """The source of a function ``f(x, y, i, w, k)`` whose every line runs in eager PyTorch at every length."""
    rng = random.Random(seed)
    worlds = [dict(zip("xyiwk", inputs_of(seed, n), strict=True), n=n) for n in LENGTHS]
    lines: list[str] = []
    names = {"a": ["x", "y"], "s": [], "m": [], "i": ["i"]}
    wanted = rng.randint(4, 10)
    for _ in range(20 * wanted):
        if len(lines) == wanted:
            break
        kind = rng.choices("asmiW", weights=(8, 2, 3, 2, 6))[0]
        template = rng.choice({"a": MADE, "s": SQUARES, "m": MASKS, "i": WHOLE, "W": WRITES}[kind])
        blanks = {c: rng.choice(names[c]) for c in "asmi" if names[c]}
        blanks["b"] = rng.choice(names["a"])
        blanks["q"] = f"{blanks['a']}[None, None]"
        try:
            statement = template.format(**blanks)
        except KeyError:  # nothing of that kind yet
            continue
        name = f"{kind}{len(lines)}"
        line = statement if kind == "W" else f"{name} = {statement}"
        if all(_runs(line, name if kind != "W" else None, kind, world) for world in worlds):
            lines.append(line)
            if kind != "W":
                names[kind].append(name)
        else:  # a line that fails may have written something: begin again with what was good
            worlds = [dict(zip("xyiwk", inputs_of(seed, n), strict=True), n=n) for n in LENGTHS]
            for world in worlds:
                for good in lines:
                    exec(good, {"torch": torch, "F": F}, world)
    made = [name for kind in names.values() for name in kind if name not in ("x", "y", "i")]
    returned = rng.sample(made, min(len(made), 3)) if made else ["x * 1"]
    body = "\n    ".join(["n = x.shape[0]", *lines, f"return {', '.join(returned)},"])
    return f"def f(x, y, i, w, k):\n    {body}\n"


def _runs(line: str, name: str | None, kind: str, world: dict) -> bool:
    try:
        exec(line, {"torch": torch, "F": F}, world)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
    for found in [world[name]] if name is not None else [v for v in world.values() if isinstance(v, torch.Tensor)]:
        if found.numel() > 4000 or (kind == "s" and found.dim() != 2) or (kind == "i" and found.dim() != 1):
            return False
        if found.is_floating_point() and not bool((found.abs() < 1e6).all()):
            return False
    return True


def inputs_of(seed: int, n: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    whole = torch.randint(0, 9, (n,), generator=generator)
    return x, y, whole, torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator), 1 + seed % 3


class WrongResultError(AssertionError):
    """A compiled program and eager PyTorch disagree."""


def check(seed: int, *, fuse: bool = False) -> str:
    """``ok``, or ``not ours`` where aot_eager fails as well; raises what went wrong otherwise."""
    function = function_of(seed)
    try:
        _compare(function, seed, _backend_of_all(fuse))
    except Exception:
        torch._dynamo.reset()
        try:
            _compare(function, seed, "aot_eager")
        except Exception:
            return "not ours"
        raise
    finally:
        torch._dynamo.reset()
    return "ok"


def function_of(seed: int):
    scope = {"torch": torch, "F": F}
    exec(compile(program_of(seed), f"<fuzz {seed}>", "exec"), scope)
    return scope["f"]


def _compare(function, seed: int, backend) -> None:
    compiled = torch.compile(function, backend=backend, dynamic=True)
    for n in LENGTHS:
        mine, theirs = inputs_of(seed, n), inputs_of(seed, n)
        with torch.no_grad():
            expected, got = function(*theirs), compiled(*mine)
        same_all((*got, *mine[:4]), (*expected, *theirs[:4]), f"{n} rows")


def same_all(got, expected, where: str) -> None:
    for position, (one, other) in enumerate(zip(got, expected, strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise WrongResultError(
                f"{where}, value {position}: {one.dtype} {list(one.shape)}, not {other.dtype} {list(other.shape)}"
            )
        if not torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True):
            raise WrongResultError(f"{where}, value {position}: off by {(one - other).abs().max()}")


def _copy(tensor):
    """A tensor of the same layout in a copy of its whole storage."""
    whole = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage().clone())
    copy = torch.as_strided(whole, tensor.shape, tensor.stride(), tensor.storage_offset())
    return torch._neg_view(copy) if tensor.is_neg() else copy


def _backend_of_all(fuse: bool):
    """A backend that compiles one captured graph in every variant, and holds all of them against the first."""
    disable = () if fuse else ("fuse",)

    def backend(module, inputs):
        def compile_graph(graph, aten_inputs):
            context = torch._guards.TracingContext.try_get()
            static = tuple(context.fw_metadata.static_input_indices)
            steps = [compile_aten(graph, MosaicOptions(disable=disable, **v), static) for v in VARIANTS]

            def call(given):
                copies = [[_copy(g) if isinstance(g, torch.Tensor) else g for g in given] for _ in steps[1:]]
                first = steps[0](list(given))
                for step, copy, variant in zip(steps[1:], copies, VARIANTS[1:], strict=True):
                    results = [v for v in (*step(list(copy)), *copy) if isinstance(v, torch.Tensor)]
                    expected = [v for v in (*first, *given) if isinstance(v, torch.Tensor)]
                    same_all(results, expected, f"{variant} against no options")
                return first

            call._boxed_call = True
            return call

        kept = specialize_floats(module, inputs)
        compiler = aot_autograd(
            fw_compiler=compile_graph,
            inference_compiler=compile_graph,
            decompositions=_decompositions(),
            keep_inference_input_mutations=True,
        )
        compiled = compiler(drop_true_masks(module), kept)
        forget_floats()
        return compiled

    return backend


# ----------------------------------------------------------------------------------------------- many of them
def _run(task: tuple[int, int]) -> tuple[int, str, str]:
    seed, fuse_every = task
    warnings.filterwarnings("ignore")
    try:
        return seed, check(seed, fuse=bool(fuse_every) and seed % fuse_every == 0), ""
    except Exception as error:
        error = getattr(error, "inner_exception", None) or error
        where = "".join(traceback.format_exception(error)[-4:])
        return seed, "failed", f"{program_of(seed)}{where}"


def _alone() -> None:
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="programs (default 10000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fuse-every", type=int, default=100, help="compile kernels for every so many (0: never)")
    parser.add_argument("--state", type=Path, default=Path("build/fuzz.json"), help="what is done, to go on with")
    given = parser.parse_args()
    done = json.loads(given.state.read_text()) if given.state.exists() else {}
    todo = [
        seed for seed in range(given.first, given.first + given.count) if done.get(str(seed)) not in ("ok", "not ours")
    ]
    print(f"seeds {given.first} to {given.first + given.count - 1}, {len(todo)} to do", flush=True)
    given.state.parent.mkdir(parents=True, exist_ok=True)
    started, failed = time.monotonic(), 0
    with multiprocessing.get_context("spawn").Pool(given.workers, _alone, maxtasksperchild=200) as pool:
        tasks = ((seed, given.fuse_every) for seed in todo)
        for number, (seed, outcome, text) in enumerate(pool.imap_unordered(_run, tasks), 1):
            done[str(seed)] = outcome
            if outcome == "failed":
                failed += 1
                print(f"seed {seed} FAILED\n{text}", flush=True)
            if number % 50 == 0 or number == len(todo):
                given.state.write_text(json.dumps(done))
                seconds = time.monotonic() - started
                print(f"{number} of {len(todo)}, seed {seed}, {failed} failed, {seconds:.0f} s", flush=True)
    counts = {name: list(done.values()).count(name) for name in ("ok", "not ours", "failed")}
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
