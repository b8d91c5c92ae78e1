"""``out=`` overloads and in-place twins are used only where they are the functional op (``book/trusted.py``).

PyTorch's own samples run under a mode that sees every operator below them, and calls the form that a plan would use
into memory that holds NaN: the result has to be the functional op's, bit for bit, in the place that it was given.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._ops import OpOverload
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic_compiler.book import inplace_twin, native_out
from mosaic_compiler.book import trusted_ops as listed

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float64, torch.uint8)
NAMES = {info.name for info in op_db}
aten = torch.ops.aten


class Forms(TorchDispatchMode):
    """Holds the form of each operator against the operator.

    Attributes:
        seen: the operators that were looked at.
        wrong: what differed.
    """

    def __init__(self):
        super().__init__()
        self.seen: set[OpOverload] = set()
        self.wrong: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        result = op(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else (result,)
        if op.namespace != "aten" or not results or not all(map(_is_plain, results)):
            return result
        if torch.Tag.nondeterministic_seeded in op.tags:
            return result
        native = native_out(op)
        try:
            if native is not None and len(native[1]) == len(results):
                into = [_poisoned(r) for r in results]
                native[0](*args, **kwargs, **dict(zip(native[1], into, strict=True)))
            elif native is None and inplace_twin(op) is not None and args[0].dtype == result.dtype:
                into = [_poisoned(result).copy_(given[0])]
                inplace_twin(op)(into[0], *args[1:], **kwargs)
            else:
                return result
        except Exception as error:
            self.wrong.append(f"{op}{_described(args)}: {error}")
            return result
        self.seen.add(op)
        for got, expected in zip(into, results, strict=True):
            if got.shape != expected.shape or not torch.equal(_bits(got), _bits(expected)):
                self.wrong.append(f"{op}{_described(args)}{kwargs}: {got.flatten()[:4]} != {expected.flatten()[:4]}")
        return result


def _is_plain(value):
    is_strided = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return is_strided and not value.is_conj() and not value.is_neg()


def _poisoned(result):
    strides = result.stride()
    if any(step == 0 and size > 1 for size, step in zip(result.shape, strides, strict=True)):
        strides = [math.prod(result.shape[dim + 1 :]) for dim in range(result.dim())]
    made = torch.empty_strided(result.shape, strides, dtype=result.dtype)
    made.untyped_storage().fill_(0xFF)
    return made


def _bits(tensor):
    """Its values, with all NaNs equal."""
    tensor = tensor.contiguous()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    if tensor.dtype.is_floating_point:
        return torch.where(tensor.isnan(), torch.full((), 7.5e4, dtype=tensor.dtype), tensor)
    return tensor


def _described(args):
    return [(str(a.dtype), list(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in args]


def swept(infos, dtypes, samples):
    found = Forms()
    for info in infos:
        for dtype in dtypes:
            if dtype not in info.supported_dtypes("cpu"):
                continue
            try:
                made = list(zip(range(samples), info.sample_inputs("cpu", dtype, requires_grad=False), strict=False))
            except Exception:  # some samples of some dtypes cannot be made
                continue
            for _, sample in made:
                for transposed in (False, True):
                    value = sample.input
                    if transposed:
                        if not _is_plain(value) or value.dim() < 2:
                            continue
                        value = value.mT.contiguous().mT
                    try:
                        with found:
                            info.op(value, *sample.args, **sample.kwargs)
                    except Exception:  # samples that the op itself refuses
                        continue
    return found


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_the_first_samples_of_every_operator(every):
    """Of all of them, or of every ninth."""
    found = swept(op_db[::every], (torch.float32,), 1)
    assert not found.wrong, "\n".join(found.wrong[:20])
    assert len(found.seen) > 200 // every
    assert len(set(listed()) & found.seen) > 60 // every


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(8))
def test_all_samples(shard):
    found = swept(op_db[shard::8], DTYPES, 10_000)
    assert not found.wrong, "\n".join(found.wrong[:20])


@pytest.mark.parametrize("op", listed(), ids=str)
def test_what_is_listed_exists(op):
    way = listed()[op]
    assert (native_out(op) if way == "out" else inplace_twin(op)) is not None


UNTRUSTED = {
    "binary_cross_entropy": lambda x: torch.nn.functional.binary_cross_entropy(x.sigmoid(), (x + 1).sigmoid()),
    "mse_loss": lambda x: torch.nn.functional.mse_loss(x * 2, x + 1),
    "huber_loss": lambda x: torch.nn.functional.huber_loss(x * 2, x + 1, reduction="sum"),
    "smooth_l1_loss": lambda x: torch.nn.functional.smooth_l1_loss(x * 2, x + 1),
    "soft_margin_loss": lambda x: torch.nn.functional.soft_margin_loss(x * 2, x.sign()),
    "batch_norm": lambda x: torch.nn.functional.batch_norm((x * 2).mT, None, None, training=True),
    "qr": lambda x: [part * 1 for part in torch.linalg.qr(x * 1)],
    "unbind_copy": lambda x: torch.unbind_copy((x * 2)[None])[0] + 1,
    "split_with_sizes_copy": lambda x: torch.split_with_sizes_copy(x * 2, [x.shape[0]])[0] + 1,
    "mul.Scalar": lambda x: torch.ops.aten.mul.Scalar(x.bfloat16() * 1, 0.1).float() * 1,
    "log_sigmoid": lambda x: torch.nn.functional.logsigmoid((x * 2).mT) * 1,
    "max_unpool2d": lambda x: torch.nn.functional.max_unpool2d(
        *torch.nn.functional.max_pool2d((x * 2)[None, None], 2, return_indices=True), 2
    ),
}


@pytest.mark.parametrize("shape", [(50, 70), (6, 8)])
@pytest.mark.parametrize("name", UNTRUSTED)
def test_other_overloads_are_not_used(name, shape):
    x = torch.randn(shape)
    fast = torch.compile(UNTRUSTED[name], backend="mosaic", dynamic=True, options={"poison": True})
    with torch.no_grad():
        torch.testing.assert_close(fast(x), UNTRUSTED[name](x), rtol=1e-5, atol=1e-5)
