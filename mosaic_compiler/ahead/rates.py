"""How fast a device runs what steps consist of: measured there, or by the data sheet.

A data sheet says what nobody reaches.  The shares of it that steps do reach were measured on an H100, in bf16
(``benchmarks/results/reuse.json``, ``coded_attention.json``); of a card that nobody has measured they are an estimate.
:func:`measured` times the same kinds of work on the machine at hand, once: what it finds is kept on disk.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mosaic_compiler.disk.folder import the_folder
from mosaic_compiler.disk.values import read, write

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MATMULS, ATTENTION, WEIGHTS, STATE, FEW_QUERIES = 0.65, 0.6, 0.7, 0.9, 0.44
CODED: Mapping[int, float] = {4: 0.175, 8: 0.145}
CHOOSING, SORTING, EXTRA = 0.084, 0.04, 3e-5
"""Shares of published rates: products and attention of all rows; reading weights, and state; attention of a few rows,
and of few rows to codes of so many bits.  To choose keys: products with them, and bytes (24 for each key of each set).
Seconds for the smaller kernels of an attention whose keys are codes or chosen ones."""

_BYTES_SORTED = 24


@dataclass(frozen=True)
class Rates:
    """Per second.

    Attributes:
        source: where the numbers are from, for people.
        products, attention: floating-point operations, of all rows.
        few: of attention of a few rows.
        coded: the same to keys and values in so many bits.
        choosing: of products that score keys.
        weights, state: bytes that are read.
        sorted: bytes of scores that are looked through.
        extra: seconds besides, for each attention whose keys are codes or chosen.
    """

    source: str
    products: float
    attention: float
    few: float
    coded_4: float
    coded_8: float
    choosing: float
    weights: float
    state: float
    sorted: float
    extra: float

    def coded(self, bits: int) -> float:
        """Operations of attention to codes of so many bits."""
        return self.coded_4 if bits == 4 else self.coded_8


def by_data_sheet(name: str, bandwidth: float, rate: float) -> Rates:
    """Rates of a card with a published bandwidth and rate of bf16 operations."""
    where = "measured on an H100" if name == "H100" else f"by {name}'s data sheet, at the shares that an H100 reaches"
    return Rates(
        where, MATMULS * rate, ATTENTION * rate, FEW_QUERIES * rate, CODED[4] * rate, CODED[8] * rate, CHOOSING * rate,
        WEIGHTS * bandwidth, STATE * bandwidth, SORTING * bandwidth, EXTRA,
    )  # fmt: skip


def rates_here(size: int = 4096) -> Rates:
    """Of this machine's GPU (or CPU), measured when it is first asked.

    Args:
        size: of the matrices that are multiplied; a few hundred for a test.
    """
    import torch

    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    name = torch.cuda.get_device_name() if is_gpu else f"this CPU, {torch.get_num_threads()} threads"
    key = f"{name} {torch.__version__} {size}"
    known = read(the_folder(), "rates", key)
    if isinstance(known, Rates):
        return known
    found = measured(device, name, size)
    write(the_folder(), "rates", key, found, name)
    return found


def measured(device: torch.device, name: str, size: int = 4096) -> Rates:
    """Time each kind of work on a device; some seconds, and about 200 bytes for each of ``size * size`` numbers."""
    import torch

    from mosaic_compiler.kernels.coded_attention import attend_codes_
    from mosaic_compiler.kernels.key_selection import select_keys_

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, depth, rows = max(size // 128, 1), 128, 32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    left, few, others = random(size, size), random(rows, size), [random(size, 3 * size) for _ in range(4)]
    products = 6 * size**3 / _seconds(lambda: left @ others[0], device)
    weights = 4 * others[0].nbytes / _seconds(lambda: [few @ other for other in others], device)  # more than is cached
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (random(1, heads, size, depth) for _ in range(3))
    attention = 4 * heads * size * size * depth / _seconds(lambda: attend(q, k, v), device)
    query, keys, values = (random(1, heads, many, depth) for many in (rows, 4 * size, 4 * size))
    work = 4 * heads * rows * 4 * size * depth
    exact = _seconds(lambda: attend(query, keys, values), device)
    own, places = random(1, heads, rows, depth), torch.arange(rows, device=device).view(1, 1, rows)
    coded = {}
    for bits, precision in ((4, "int4"), (8, "int8")):
        codes = torch.randint(1, 100, (1, heads, 4 * size, depth * bits // 8), device=device, dtype=torch.uint8)
        codes = codes.view(torch.int8) if bits == 8 else codes
        scale = torch.rand(1, heads, 4 * size, 1, device=device)
        given = (query, codes, scale, codes, scale, own, own, places, None, None, None, None, precision)
        coded[bits] = work / _seconds(functools.partial(attend_codes_, torch.empty_like(query), *given), device)
    kept = torch.empty(1, heads, max(size // 5, rows), device=device, dtype=torch.int64)
    choose = _seconds(lambda: select_keys_(kept, query, keys, places[0], None, None, None, None, "probability"), device)
    share = CHOOSING / (CHOOSING + SORTING)  # of the time, as far as is known: the two are not timed apart
    return Rates(
        f"measured on {name}", products, attention, work / exact, coded[4], coded[8], work / (share * choose),
        weights, 2 * keys.nbytes / exact, _BYTES_SORTED * heads * 4 * size / ((1 - share) * choose), EXTRA,
    )  # fmt: skip


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of some calls."""
    import torch

    times = []
    for number in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number > 2:
            times.append(time.perf_counter() - began)
    return max(statistics.median(times), 1e-9)


def sorted_bytes(keys: float) -> float:
    """What is looked through to choose among so many scores."""
    return _BYTES_SORTED * keys
