"""Models of transformers as they are, causal ones too: equal to eager; no mask is in a plan for 16,384 tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_compiler import Session
from mosaic_compiler.backend import observing
from mosaic_compiler.planning.plan import Buffer

TOKENS = 16384
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 2 * TOKENS, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
GIVEN = {
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "qwen3_moe": {"num_key_value_heads": 1, "head_dim": 16, **EXPERTS, "moe_intermediate_size": 16},
    "olmoe": EXPERTS,
    "gemma3_text": {
        "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "modernbert": {
        "local_attention": 64, "global_attn_every_n_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "deepseek_v2": {
        "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip


def model_of(name, **more):
    import transformers as hf

    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(name, **SMALL, **GIVEN[name], **more)
    kind = hf.AutoModelForMaskedLM if name == "modernbert" else hf.AutoModelForCausalLM
    return kind.from_config(config).eval().requires_grad_(False)


def pairs(buffer: Buffer) -> bool:
    """It has an element for each pair of tokens."""
    return math.prod(buffer.shape) >= TOKENS**2


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "deepseek_v2" else pytest.mark.slow) for name in GIVEN]
)
def test_no_mask_is_planned_for_a_long_text(name):
    model, steps = model_of(name), []
    more = {} if name == "modernbert" else {"use_cache": False}
    compiled = torch.compile(model, backend="mosaic", dynamic=True)
    with torch.no_grad(), observing(steps.append):
        for length in (150, 33):
            ids = torch.randint(4, 64, (1, length), generator=torch.Generator().manual_seed(length))
            got, expected = compiled(input_ids=ids, **more).logits, model(input_ids=ids, **more).logits
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    plan = steps[-1].outline.plan_for(TOKENS, 1.0, None).plan
    assert not [buffer.describe() for buffer in plan.buffers if pairs(buffer)]
    assert plan.workspace <= TOKENS**2 // 4  # of a mask of one byte per pair


@pytest.mark.parametrize("is_causal", [pytest.param(given, marks=pytest.mark.slow) for given in (False, True)])
def test_values_of_another_depth_are_kept(is_causal):
    """DeepSeek's keys have 16 entries and its values 8; its experts are row by row."""
    from kept import Kept

    model = model_of("deepseek_v2", is_causal=is_causal)
    ids = torch.randint(4, 64, (1, 21), generator=torch.Generator().manual_seed(1))
    oracle = Kept(lambda given: model(given, use_cache=False).logits)
    with torch.no_grad(), Session(model) as session:
        torch.testing.assert_close(session.full(ids, use_cache=False).logits, oracle.full(ids), atol=1e-4, rtol=1e-4)
        ids = ids.clone()
        ids[0, 5] = 7
        rows = torch.tensor([5, 11, 20])
        got = session.reuse(ids, rows, use_cache=False).logits
        torch.testing.assert_close(got[:, rows], oracle.reuse(rows[None], ids)[:, rows], atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([None, 0.3]),
    st.booleans(),
    st.integers(0, 99),
)
def test_attention_with_two_depths(of_key, of_value, is_causal, scale, is_grouped, seed):
    generator = torch.Generator().manual_seed(seed)
    heads = 4 if is_grouped else 2
    query = torch.randn(2, heads, 7, of_key, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 7, of_key, generator=generator, dtype=torch.float64)
    value = torch.randn(2, 2, 7, of_value, generator=generator, dtype=torch.float64)

    def attend(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
        )

    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(attend, backend="mosaic")(query, key, value)
    torch.testing.assert_close(got, attend(query, key, value), atol=1e-12, rtol=1e-12)
    assert got.shape == (2, heads, 7, of_value)


def test_a_view_of_a_result_that_was_padded():
    def attend(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).view(1, 2, -1)

    given = torch.randn(1, 2, 5, 24), torch.randn(1, 2, 5, 24), torch.randn(1, 2, 5, 16)
    with torch.no_grad():
        got = torch.compile(attend, backend="mosaic")(*given)
    torch.testing.assert_close(got, attend(*given), atol=1e-5, rtol=1e-5)
    assert got.stride() == attend(*given).stride()
