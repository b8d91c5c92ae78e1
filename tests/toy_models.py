"""Random toy transformers in float64, small enough to trace and run by the hundred."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

WIDTH, VOCABULARY, HEAD = 16, 23, 4


@dataclass(frozen=True)
class Toy:
    """One architecture; ``weights`` makes its parameters, calling it runs it on token ids [B, N]."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    parallel: bool = False  # attention and MLP read the same norm
    post_norm: bool = False
    tied: bool = False  # the head is the embedding
    rotary: bool = True
    bias: bool = False
    window: int | None = None  # sliding window, as a computed mask
    gated: bool = True
    layer_norm: bool = False
    result: str = "tokens"

    def weights(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

        wide, narrow = self.heads * HEAD, self.kv_heads * HEAD
        found = [make(VOCABULARY, WIDTH) * 4]
        for _ in range(self.layers):
            found += [make(wide, WIDTH), make(narrow, WIDTH), make(narrow, WIDTH), make(WIDTH, wide)]
            found += [make(24, WIDTH), make(24, WIDTH), make(WIDTH, 24), make(WIDTH), make(WIDTH)]
        return [*found, make(VOCABULARY, WIDTH)]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.layer_norm:
            return F.layer_norm(x, (WIDTH,), weight, weight)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    def __call__(self, ids: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        table, *rest, head = weights
        x = F.embedding(ids, table)  # [B, N, D]
        states = [x]
        for layer in range(self.layers):
            x = self.block(x, *rest[9 * layer : 9 * layer + 9])
            states.append(x)
        logits = x @ (table if self.tied else head).t()  # [B, N, V]
        if self.result == "logits":
            return (logits,)
        if self.result == "states":
            return (logits.argmax(-1), *states)
        token = logits.argmax(-1)
        return token, torch.softmax(logits, -1).gather(-1, token.unsqueeze(-1)).squeeze(-1)

    def block(self, x: Tensor, *weights: Tensor) -> Tensor:
        q, k, v, o, up, gate, down, first, second = weights
        h = x if self.post_norm else self.norm(x, first)
        a = self.attention(h, q, k, v, o)
        if self.parallel:
            return x + a + self.mlp(h, up, gate, down)
        x = self.norm(x + a, first) if self.post_norm else x + a
        m = self.mlp(x if self.post_norm else self.norm(x, second), up, gate, down)
        return self.norm(x + m, second) if self.post_norm else x + m

    def mlp(self, h: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
        inner = F.silu(h @ gate.t()) * (h @ up.t()) if self.gated else F.gelu(h @ up.t())
        return inner @ down.t()

    def attention(self, h: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
        batch, length, _ = h.shape
        queries, keys, values = (
            F.linear(h, w, w[:, 0] if self.bias else None).view(batch, length, -1, HEAD).transpose(1, 2)
            for w in (q, k, v)
        )
        if self.rotary:
            positions = torch.arange(length, device=h.device)
            angles = positions[:, None].double() * torch.tensor([1.0, 0.1], dtype=torch.float64)
            angles = torch.cat((angles, angles), -1)
            queries, keys = (t * angles.cos() + rotated(t) * angles.sin() for t in (queries, keys))
        repeats = self.heads // self.kv_heads
        if repeats > 1:
            keys, values = (t.repeat_interleave(repeats, 1) for t in (keys, values))
        mask = None
        if self.window is not None:
            positions = torch.arange(length, device=h.device)
            mask = (positions[:, None] - positions[None, :]).abs() <= self.window
            mask = mask[None, None].expand(batch, 1, length, length)
        a = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return a.transpose(1, 2).reshape(batch, length, -1) @ o.t()


def rotated(t: Tensor) -> Tensor:
    half = t.shape[-1] // 2
    return torch.cat((-t[..., half:], t[..., :half]), -1)


toys = st.builds(
    Toy,
    layers=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    parallel=st.booleans(),
    post_norm=st.booleans(),
    tied=st.booleans(),
    rotary=st.booleans(),
    bias=st.booleans(),
    window=st.sampled_from([None, None, 3]),
    gated=st.booleans(),
    layer_norm=st.booleans(),
    result=st.sampled_from(["tokens", "logits", "states"]),
)


def ids(batch: int, length: int, seed: int) -> Tensor:
    """int64 [batch, length]."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
