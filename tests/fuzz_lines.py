"""What the lines of a random program (``tests/fuzz.py``) are made from.

a, b: matrices of numbers; s: a square one; m: a mask; i: whole numbers; q: a as queries; k: a small number; n: rows.
"""

from __future__ import annotations

MADE = """
{a} * 2 + {b}
{a} - {a}.mean(dim=-1, keepdim=True)
torch.relu({a}) * {b}
{a} @ w
({a} @ w).tanh()
{a} @ {b}.t()
torch.softmax({a}, dim=-1)
torch.where({a} > 0, {a}, {b})
{a}.t()
{a}[1:]
{a}[:, 1:]
{a}[::2]
{a}.flatten()
{a}.reshape(-1, 2)
{a}.unsqueeze(0)
{a}.expand(2, -1, -1)
{a}.diagonal()
{a}.clone()
{a}.contiguous()
torch.cat([{a}, {b}], dim=0)
torch.cat(tensors=[{a}, {b}], dim=-1)
torch.add(input={a}, other={b}, alpha=2)
torch.sub({a}, other={b})
{a}.mul(other=3)
torch.as_strided({a}, (3, 2), (2, 1))
torch.as_strided({a}, (3, 2), (1, 2), 1)
torch.as_strided({a}.clone(), (2, 2), (2, 1), 0)
{a}.as_strided(size=(4,), stride=(2,), storage_offset=0)
torch.zeros_like({a})
torch.full_like({a}, fill_value=0.5)
{a}.roll(1, 0)
{a}.flip(0)
{a}.sum(0)
{a}.sum(-1)
{a}.cumsum(0)
{a}.sort(-1).values
{a}.max(-1).values
{a}.split(2, -1)[1]
torch.unsafe_chunk({a}, 2, -1)[0]
torch.unsafe_split({a}, 2, -1)[1]
{a}.unbind(-1)[0]
{a}.chunk(2, 0)[0]
torch.unsafe_split_with_sizes({a}, [1, 3], -1)[1]
torch.ops.fuzz.same({a} + 1)
torch.ops.fuzz.part({a} + 1)
torch.ops.fuzz.twice({a})[0]
torch.ops.fuzz.twice({a})[1]
torch.ops.fuzz.dense({a}.t()).sum(0)
torch.ops.fuzz.sometimes({a} - 0.5)
{a}.index_select(dim=0, index={i} % {a}.shape[0])
{a}[{i} % {a}.shape[0]]
{a}.gather(0, ({i} % {a}.shape[0]).unsqueeze(-1))
{a}.masked_fill(mask={a} > 0, value=-1.0)
F.layer_norm({a}, ({a}.shape[-1],))
{a}.masked_select({a} > 0.1).sum()
torch.tril({s})
{s} @ {a}
{s}.softmax(-1) @ {a}
torch._neg_view({a})
{a}.to(torch.float32).to({a}.dtype)
{a}.index_fill(0, {i} % {a}.shape[0], 0.25)
{a}.scatter(0, ({i} % {a}.shape[0]).unsqueeze(-1), 1.5)
{a}.movedim(0, 1)
{a}.squeeze(0)
{a}.repeat(2, 1)
{a}.view({a}.shape)
torch.lerp({a}, {b}, 0.25)
F.scaled_dot_product_attention({q}, {q}, {q}, attn_mask={m})[0, 0]
F.scaled_dot_product_attention(query={q}, key={q}, value={q}, attn_mask=torch.logical_and({m}, other={m}))[0, 0]
F.scaled_dot_product_attention({q}, {q}, {q}, is_causal=True)[0, 0]
F.scaled_dot_product_attention({q}, {q}, {q})[0, 0]
""".strip().splitlines()
"""Numbers."""

SQUARES = """
{a} @ {a}.t()
{s} * 0.5
{s}.t()
{s} + {s}.t()
{s}.triu()
{s}.clone()
""".strip().splitlines()
"""Matrices [n, n]."""

MASKS = """
torch.ones(n, n, dtype=torch.bool)
torch.full((n, n), fill_value=True)
torch.full(size=(n, n), fill_value=False)
(torch.arange(n) >= 0).expand(n, n)
(torch.arange(start=0, end=n) >= 0).expand(n, n)
torch.ge(torch.arange(n), other=k).expand(n, n)
{m} & {m}
torch.logical_and({m}, other={m})
{m} | {m}
{m}.tril()
{m}.clone()
{m}.t()
torch.ones_like({m})
{i}[:, None] >= {i}[None]
(torch.arange(n, dtype=torch.int8) + 100 >= 0).expand(n, n)
torch.arange(n).add(1).ge(other=0).expand(n, n)
(torch.arange(n) // 2)[:, None] >= (torch.arange(n) // 2)[None]
{m}.view(n, n)
{m}[:, :n]
{m}.expand(n, n)
""".strip().splitlines()
"""Masks, most of them [n, n]."""

WHOLE = """
torch.arange(n)
torch.arange(end=n)
torch.arange(0, n, 1)
{i} * 3 + 1
{i} // 2
{i} % 3
{i}.flip(0)
{i}.to(torch.int8).to(torch.int64)
{i}.clamp(min=1, max=5)
{i}.cumsum(0)
{i} + k
{i}.clone()
({i}.to(torch.uint8) * 100).long()
{i} ^ 3
{i}.sort(descending=True).values
-{i}
""".strip().splitlines()
"""Whole numbers [n]."""

WRITES = """
{a}.add_(1)
{a}.mul_({b})
{a}[1:].add_(2)
{a}[:, 0] = 3
{a}[k:, :k] = {a}.sum()
{a}.t().mul_(2)
{a}.diagonal().fill_(0.5)
{a}.flatten()[::2].zero_()
{a}.view(-1)[1:].mul_(0.5)
{a}.copy_({b})
{a}.masked_fill_({a} > 0, 0.25)
{a}.clamp_(min=-1)
{a}.sub_(other={b}, alpha=2)
torch.mul({a}, 2, out={b})
torch.as_strided({a}, (2, 2), (2, 1)).mul_(2)
{a}.index_add_(0, {i} % {a}.shape[0], torch.ones_like({a}[{i} % {a}.shape[0]]))
{a} += 1
{a} *= {b}
{a}[{i} % {a}.shape[0]] = 0.75
{a}.relu_()
{a}.fill_(0.125)
{s}.tril_()
{m}[:k, k:] = False
{m}.tril_()
{m}.logical_and_({m})
{m} &= {m}
{m}.t()[k:] = True
{m}.fill_(True)
{i} += 2
{i}.mul_(3)
{i}[:k] = 1
{i}.neg_()
{a}.exp_()
{a}.sigmoid_()
{a}.index_fill_(0, {i} % {a}.shape[0], 0.1)
{a}.zero_()
{a}.unsqueeze(0).squeeze(0).add_(1)
{a}.chunk(2, 0)[0].add_(3)
{a}.transpose_(0, 1)
{a}.t_()
""".strip().splitlines()
"""Statements that write in place."""
