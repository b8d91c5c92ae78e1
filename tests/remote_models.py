"""Stand-ins for LLaDA's and Dream's remote code: the same call signatures and habits, in a few lines.

Log lines in forward, rotary tables that are kept in a dict and grow, buffers that forward replaces.
"""

from __future__ import annotations

import logging
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput

log = logging.getLogger(__name__)

WIDTH, HEADS, VOCABULARY = 32, 4, 61


class Rotary(nn.Module):
    """Tables in a dict that all layers share; they grow when a sequence is longer than all before."""

    def __init__(self, cache: dict, length: int, rope_theta: float = 10000.0) -> None:
        super().__init__()
        self.cache, self.rope_theta = cache, rope_theta
        self.tables(length, torch.device("cpu"))

    def tables(self, length, device):
        if "sin" not in self.cache or self.cache["sin"].shape[0] < length:
            steps = torch.arange(length, dtype=torch.float32, device=device)
            width = WIDTH // HEADS
            angles = steps[:, None] * (1.0 / self.rope_theta ** (torch.arange(0, width, 2, device=device) / width))
            angles = torch.cat([angles, angles], -1)
            self.cache["sin"], self.cache["cos"] = angles.sin(), angles.cos()
        if self.cache["sin"].device != device:
            self.cache["sin"], self.cache["cos"] = self.cache["sin"].to(device), self.cache["cos"].to(device)
        return self.cache["sin"][:length], self.cache["cos"][:length]


def turned(x, sin, cos):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.is_causal = False
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.SiLU(), nn.Linear(64, WIDTH))

    def forward(self, x, sin, cos, bias):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(turned(q, sin, cos), turned(k, sin, cos), v, attn_mask=bias)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class _Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.head.weight, std=0.6)
        self.eval().requires_grad_(False)

    def get_output_embeddings(self):
        return self.head


@dataclass
class Output:
    logits: torch.Tensor
    hidden_states: None = None


class LLaDALike(_Model):
    """``model(ids).logits``; masks as ``attention_bias``; no positions."""

    def __init__(self, seed: int = 0, rope_theta: float = 10000.0) -> None:
        super().__init__(seed)
        self.config = types.SimpleNamespace(mask_token_id=5, eos_token_id=7, max_sequence_length=64)
        self.cache: dict = {}
        self.rotary = Rotary(self.cache, 16, rope_theta)

    def forward(self, input_ids, inputs_embeds=None, attention_mask=None, attention_bias=None, use_cache=None):
        log.info("forward of %d tokens", input_ids.shape[1])
        if attention_bias is not None:
            attention_bias = attention_bias.to(self.embed.weight.dtype)
        sin, cos = self.rotary.tables(input_ids.shape[1], input_ids.device)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, sin, cos, attention_bias)
        log.warning("the logits come")
        return Output(self.head(x))


class TidyLike(_Model):
    """LLaDA's without such habits: one graph, traced by running it; for tests of what does not depend on them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = types.SimpleNamespace(mask_token_id=5, eos_token_id=7, max_sequence_length=4096)
        sin, cos = Rotary({}, 4096).tables(4096, torch.device("cpu"))
        self.register_buffer("sin", sin)
        self.register_buffer("cos", cos)

    def forward(self, input_ids, attention_mask=None, attention_bias=None):
        sin, cos = self.sin[: input_ids.shape[1]], self.cos[: input_ids.shape[1]]
        if attention_bias is not None:
            attention_bias = attention_bias.to(self.embed.weight.dtype)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, sin, cos, attention_bias)
        return MaskedLMOutput(logits=self.head(x))


class DreamLike(_Model):
    """``model(ids, "full" | mask, positions).logits``; has a ``diffusion_generate`` of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = types.SimpleNamespace(mask_token_id=5, eos_token_id=7, max_position_embeddings=4096)

    def diffusion_generate(self, *args, **kwargs):
        raise NotImplementedError

    def forward(self, input_ids, attention_mask=None, position_ids=None, return_dict=None, num_logits_to_keep=0):
        if return_dict is None:
            log.warning("`use_return_dict` is deprecated")  # what looking it up in a config of transformers 5 does
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        print("forward of", input_ids.shape[1], "tokens")
        angles = position_ids[..., None] * (10000.0 ** -torch.linspace(0, 1, WIDTH // HEADS // 2))
        angles = torch.cat([angles, angles], -1)[:, None]
        x = self.embed(input_ids)
        for layer in self.layers:
            mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
            x = layer(x, angles.sin(), angles.cos(), mask)
        return Output(self.head(x[:, -num_logits_to_keep:]))


class BreaksLike(LLaDALike):
    """LLaDA's, with a call in the middle of forward that Dynamo cannot trace, and another behind the logits."""

    def forward(self, input_ids, attention_bias=None):
        torch._dynamo.graph_break()
        output = super().forward(input_ids, attention_bias=attention_bias)
        torch._dynamo.graph_break()
        return output
