"""Stand-ins with the signatures and the habits of the published code of block-causal models."""

from __future__ import annotations

import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, HEADS, GROUPS, DEPTH = 61, 32, 4, 2, 8
MASK = 5


@dataclass
class Output:
    logits: torch.Tensor
    past_key_values: None = None


def turned(x: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotary positions, of the first dims only where there are fewer angles."""
    depth = 2 * len(inv_freq)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * inv_freq
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    front, rest = x[..., :depth], x[..., depth:]
    half = torch.cat([-front[..., depth // 2 :], front[..., : depth // 2]], -1)
    return torch.cat([front * cos + half * sin, rest], -1)


class Attention(nn.Module):
    """Grouped heads with norms of queries and keys."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * DEPTH, bias=False)
        self.dense = nn.Linear(HEADS * DEPTH, WIDTH, bias=False)
        self.query_layernorm, self.key_layernorm = nn.RMSNorm(DEPTH), nn.RMSNorm(DEPTH)
        depth = int(DEPTH * share)
        self.register_buffer("inv_freq", 1.0 / 1000.0 ** (torch.arange(0, depth, 2) / depth), persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.query_key_value(x).view(*x.shape[:2], -1, DEPTH)
        query, key, value = states.split([HEADS, GROUPS, GROUPS], dim=-2)
        query, key = self.query_layernorm(query).transpose(1, 2), self.key_layernorm(key).transpose(1, 2)
        query, key, value = turned(query, self.inv_freq), turned(key, self.inv_freq), value.transpose(1, 2)
        key, value = (part.repeat_interleave(HEADS // GROUPS, 1) for part in (key, value))
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=False)
        return self.dense(seen.transpose(1, 2).flatten(2))


class Dense(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 48), nn.SiLU(), nn.Linear(48, WIDTH))


class GroupLimited(nn.Module):
    """Experts chosen from the best groups, weighted by sigmoids without the bias that chooses; and one for all rows."""

    experts, groups, each = 8, 4, 2

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, self.experts, bias=False)
        self.expert_bias = nn.Parameter(0.1 * torch.randn(self.experts))
        self.up = nn.Parameter(torch.randn(self.experts, WIDTH, 16) / 6)
        self.down = nn.Parameter(torch.randn(self.experts, 16, WIDTH) / 4)
        self.shared_experts = Dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, WIDTH)
        scores = torch.sigmoid(self.gate(rows).float())
        routed = scores + self.expert_bias
        best = routed.view(len(rows), self.groups, -1).topk(2, -1).values.sum(-1).topk(2).indices
        kept = torch.zeros_like(routed[:, : self.groups]).scatter(1, best, 1.0).repeat_interleave(2, 1)
        chosen = routed.masked_fill(kept == 0, float("-inf")).topk(self.each).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
        numbers, order = torch.sort(chosen.reshape(-1))
        counts = torch.histc(numbers.float(), bins=self.experts, min=0, max=self.experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        hidden = F.silu(torch._grouped_mm(rows.bfloat16()[order // self.each], self.up.bfloat16(), ends))
        made = torch._grouped_mm(hidden, self.down.bfloat16(), ends).to(x.dtype)
        back = made[torch.argsort(order)].view(len(rows), self.each, WIDTH)
        return (back * weights.unsqueeze(-1)).sum(1).view_as(x) + self.shared_experts(x)


class _Layers(nn.Module):
    def __init__(self, seed: int, share: float = 1.0, make=Dense) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = nn.ModuleList(Attention(share) for _ in range(2))
        self.mlp = nn.ModuleList([Dense(), make()])
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(4))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.lm_head.weight, std=1.0)
        self.eval().requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in range(2):
            x = x + self.attention[layer](self.norms[2 * layer](x), mask)
            x = x + self.mlp[layer](self.norms[2 * layer + 1](x))
        return x


class LLaDA2Like(_Layers):
    """LLaDA2MoeModelLM: an additive mask [B, 1, N, N] or nothing, logits in float32, no block length in its config."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, share=0.5, make=GroupLimited)
        self.config = types.SimpleNamespace(model_type="llada2_moe", mask_token_id=MASK, use_cache=False)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, output_router_logits=None,
        return_dict=None, **kwargs,
    ):  # fmt: skip
        batch, length = input_ids.shape
        if attention_mask.size() != (batch, 1, length, length):
            raise ValueError("LLaDA2.0 only support block attention mask with shape: [batch, 1, length, length]")
        if not attention_mask.is_floating_point():
            raise TypeError("an additive mask is wanted")
        return Output(self.lm_head(self.hidden(input_ids, attention_mask)).float())


class SDARLike(_Layers):
    """SDARForCausalLM: a mask [B, N, N] of what is seen, which it needs; ``block_size`` beside the mask token."""

    def __init__(self, seed: int = 0, block: int = 4) -> None:
        super().__init__(seed)
        self.config = types.SimpleNamespace(model_type="sdar", mask_token_id=MASK, block_size=block)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, cache_position=None,
        logits_to_keep=0, store_kv=False,
    ):  # fmt: skip
        if attention_mask.dim() != 3:
            raise ValueError("attention_mask is [batch, queries, keys]")
        return Output(self.lm_head(self.hidden(input_ids, attention_mask.bool().unsqueeze(1))))


class FastLike(_Layers):
    """Fast_dLLM_QwenForCausalLM in eval mode: makes its own mask, whatever it is given; ``bd_size`` in its config."""

    def __init__(self, seed: int = 0, block: int = 8) -> None:
        super().__init__(seed)
        self.block = block
        self.config = types.SimpleNamespace(model_type="Fast_dLLM_Qwen", mask_token_id=MASK, bd_size=block)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, cache_position=None, logits_to_keep=0, update_past_key_values=False,
        use_block_cache=False, block_past_key_values=None, replace_position=None, mask_id=MASK, **kwargs,
    ):  # fmt: skip
        number = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = number[:, None] // self.block >= number[None, :] // self.block
        return Output(self.lm_head(self.hidden(input_ids, mask)))
