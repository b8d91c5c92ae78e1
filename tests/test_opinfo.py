"""All of PyTorch's operators, with the samples that PyTorch has of them: the same results as eager's.

What is wrong with ``aot_eager`` as well does not count, and an error of ours is an answer; see ``tests/opinfo.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("expecttest", reason="PyTorch's samples need it")

import opinfo
from effort import examples

from mosaic_compiler.errors import CaptureError, InvariantError

SHARDS = 48


def failures(found: Iterable[opinfo.Sample], seconds: float = 20) -> list[str]:
    """What is wrong, a line per sample."""
    verdicts = [(sample, opinfo.judge(sample, seconds)) for sample in found]
    return [f"{sample.name}: {v.kind}: {v.reason}\n{v.trace}" for sample, v in verdicts if v.is_failure]


def of_shard(part: str, shard: int, shards: int) -> list[str]:
    """Every so many-th operator: neighbours in PyTorch's list are alike, and take alike long."""
    found: list[str] = []
    for name in list(opinfo.operators())[shard::shards]:
        seconds = 90 if opinfo.PARTS[part].way == "fuse" else 20
        found += failures(opinfo.samples_of(opinfo.PARTS[part], name), seconds)
        torch._dynamo.reset()
    return found


def test_first_samples_of_some_operators_are_those_of_eager():
    names = list(opinfo.operators())[:: examples(24, 12)]
    found = [sample for name in names for sample in opinfo.samples(name, "float32", stop=1)]
    assert len(found) > examples(25, 50)
    wrong = failures(found)
    assert not wrong, "\n\n".join(wrong)


def test_what_is_wrong_is_told_from_what_is_refused(monkeypatch):
    sample = opinfo.samples("add", "float32", stop=1)[0]

    def compiled_to(run):
        """The verdict if this is what every graph becomes."""
        monkeypatch.setattr(opinfo, "compile_aten", lambda module, options: lambda values: run(module(*values)))
        return opinfo.judge(sample)

    def raises(error):
        raise error

    assert compiled_to(lambda results: results) == opinfo.Verdict("ok")
    assert compiled_to(lambda results: [result + 1 for result in results]).kind == "wrong"
    assert compiled_to(lambda results: raises(CaptureError("no"))).kind == "refused"
    assert compiled_to(lambda results: raises(InvariantError("pass", "what", "no"))).kind == "broken"
    assert compiled_to(lambda results: raises(IndexError("no"))).kind == "crash"


def test_what_aot_eager_gets_wrong_is_not_ours():
    draws = itertools.count()
    sample = opinfo.Sample("add", "function", "float32", 0, lambda x: x + next(draws), (torch.ones(3),), {})
    verdict = opinfo.judge(sample)
    assert verdict.kind == "not ours"
    assert "aot_eager" in verdict.reason


def test_strides_of_a_wrong_fake_kernel_are_not_ours():
    """Of channels-last operands max_unpool2d returns channels-last; its fake kernel says contiguous."""

    def unpooled(x):
        values, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(values.contiguous(memory_format=torch.channels_last), places, 2)

    verdict = opinfo.judge(opinfo.Sample("add", "function", "float32", 1, unpooled, (torch.randn(2, 3, 4, 4),), {}))
    assert verdict.kind == "not ours"
    assert "fake kernel" in verdict.reason


def test_strides_that_are_not_those_of_the_fake_kernel_are_wrong(monkeypatch):
    sample = opinfo.Sample("add", "function", "float32", 0, torch.add, (torch.ones(2, 3), torch.ones(2, 3)), {})
    assert opinfo.judge(sample).kind == "ok"

    def turned(module, options):
        return lambda values: [result.t().contiguous().t() for result in module(*values)]

    monkeypatch.setattr(opinfo, "compile_aten", turned)
    assert opinfo.judge(sample).kind == "wrong"


@pytest.mark.parametrize(
    ("got", "expected", "what"),
    [
        (torch.ones(2), torch.zeros(2), "close"),
        (torch.ones(2), torch.ones(2, dtype=torch.int32), "dtype"),
        (torch.ones(1, 2), torch.ones(2), "shape"),
        (torch.ones(2, 3), torch.ones(3, 2).t(), "strides"),
        (torch.tensor([float("nan")]), torch.ones(1), "close"),
        (1, torch.ones(1), "tensor"),
        (1, 2, "not 2"),
    ],
)
def test_differences_are_found(got, expected, what):
    sample = opinfo.Sample("add", "function", "float32", 0, torch.add, (), {})
    with pytest.raises(opinfo.DiffersError, match=what):
        opinfo.compare(sample, [got], [expected])
    opinfo.compare(sample, [expected], [expected])


def test_every_operator_that_is_left_out_exists():
    assert opinfo.NOT_OURS.keys() | opinfo.ROUNDED.keys() <= opinfo.operators().keys()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("part", ["front", "float32", "float32-more", "float32-rest", "inplace", "dtypes"])
def test_samples_are_those_of_eager(part, shard):
    wrong = of_shard(part, shard, SHARDS)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.slow
@pytest.mark.fuse
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_samples_are_those_of_eager_with_compiled_kernels(shard):
    wrong = of_shard("fuse", shard, SHARDS)
    assert not wrong, "\n\n".join(wrong)
