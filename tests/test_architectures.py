"""Small random models of many architectures: compiled and in chunks, they equal what Dynamo captured.

Masked LMs, bidirectional and causal LMs, encoder-decoders; learned, rotary and relative positions, biases by distance,
sliding windows, mixtures of experts, state spaces.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mosaic_compiler.sampling import DenoisingStep, block_window

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**ENDS, "num_key_value_heads": 2, "is_causal": False}
EXPERTS = {
    **GROUPED, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
MASKED: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "deberta-v2": {},
    "mpnet": ENDS,
    "esm": {"mask_token_id": 3, "position_embedding_type": "rotary", "token_dropout": False},
    "eurobert": GROUPED,
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "fnet": ENDS,
    "layoutlm": {},
    "modernbert": {
        **ENDS,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 16,
        "global_attn_every_n_layers": 2,
    },
}
CAUSAL: dict[str, dict[str, Any]] = {
    "mistral": {**GROUPED, "sliding_window": 8},
    "gemma3_text": {**GROUPED, "head_dim": 8, "sliding_window": 8},
    "gpt_neox": ENDS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48},
    "falcon": {**ENDS, "alibi": True},
    "stablelm": GROUPED,
    "nemotron": GROUPED,
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "gpt_oss": {**EXPERTS, "head_dim": 8},
    "minimax": EXPERTS,
    "smollm3": {**GROUPED, "head_dim": 8},
    "mamba": {},
}


def model(name: str) -> torch.nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    if name == "t5":
        sizes = {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0)).eval()
    given = MASKED[name] if name in MASKED else CAUSAL[name]
    config = hf.AutoConfig.for_model(name, **{**SMALL, **given}, use_cache=False)
    kind = hf.AutoModelForMaskedLM if name in MASKED else hf.AutoModelForCausalLM
    return kind.from_config(config).eval()


def arguments(name: str, tokens: int, batch: int) -> dict[str, torch.Tensor]:
    """Ids; the first three positions of the first sequence are padding."""
    ids = torch.randint(4, 120, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, : tokens // 2]}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("options", [{}, {"chunk_rows": 7, "poison": True}], ids=["default", "chunks"])
@pytest.mark.parametrize("name", [*MASKED, *CAUSAL, "t5"])
def test_logits(name, options):
    plain = model(name)
    compiled = torch.compile(plain, backend="mosaic", dynamic=True, options=options)
    captured = torch.compile(plain, backend="eager", dynamic=True)
    with torch.no_grad():
        for tokens in (24, 37, 9):
            given = arguments(name, tokens, batch=2)
            valid = given.get(
                "attention_mask", torch.ones(2, given.get("decoder_input_ids", given["input_ids"]).shape[1])
            )
            got, expected = compiled(**given).logits, captured(**given).logits
            torch.testing.assert_close(got[valid > 0], expected[valid > 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"chunk_rows": 7, "poison": True}], ids=["default", "chunks"])
@pytest.mark.parametrize("name", [*MASKED, *CAUSAL])
def test_steps(name, options):
    plain = model(name)
    step = DenoisingStep(plain, 3)
    compiled = torch.compile(step, backend="mosaic", dynamic=True, options=options)
    with torch.no_grad():
        for tokens in (24, 37, 9):
            ids = arguments(name, tokens, batch=1)["input_ids"]
            ids[:, ::2] = 3
            given = ids, block_window(tokens, 0, tokens), torch.tensor([tokens // 4])
            assert torch.equal(compiled(*given), step(*given))
