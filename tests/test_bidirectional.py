"""generate() refuses models that it cannot prove bidirectional, and padding that a model does not look at."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from remote_models import DreamLike, LLaDALike, _Model
from torch import nn

import mosaic_compiler
from mosaic_compiler.sampling.bidirectional import check_bidirectional

MASK = 5
PROMPT = torch.randint(6, 61, (1, 20), generator=torch.Generator().manual_seed(0))


class Attends(_Model):
    """Attends under the mask that ``allowed(queries, keys)`` makes."""

    def __init__(self, allowed=None, **config):
        super().__init__(0)
        self.config = types.SimpleNamespace(mask_token_id=MASK, eos_token_id=7, **config)
        self.allowed = allowed

    def forward(self, input_ids):
        n = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = None if self.allowed is None else self.allowed(n[:, None], n[None])
        x = self.embed(input_ids)
        zero, one = torch.zeros(1), torch.ones(1)
        for layer in self.layers:
            x = layer(x, zero, one, mask)
        return self.head(x)


class SaysBlocks(Attends):
    def generate(self, inputs, block_length=32):
        raise NotImplementedError


def _prepare_4d_causal_mask(ids):
    return None


class MakesCausalMasks(Attends):
    def forward(self, input_ids):
        _prepare_4d_causal_mask(input_ids)
        return super().forward(input_ids)


class Raises(Attends):
    def forward(self, input_ids, attention_mask=None):
        assert attention_mask is not None, "an attention_mask is needed"
        return super().forward(input_ids)


class Rows(nn.Module):
    """Each row for itself."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(mask_token_id=MASK)
        self.embed, self.head = nn.Embedding(61, 16), nn.Linear(16, 61)

    def forward(self, input_ids):
        return self.head(F.relu(self.embed(input_ids)))


def transformers_model(kind, **config):
    import transformers

    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
        "pad_token_id": 0, "max_position_embeddings": 512,
    }  # fmt: skip
    made = getattr(transformers, f"{kind}Config")(**sizes, **config)
    made.mask_token_id = MASK
    cls = getattr(transformers, f"{kind}ForMaskedLM", None) or getattr(transformers, f"{kind}ForCausalLM")
    return cls(made).eval()


GOOD = {
    "LLaDA's code": LLaDALike,
    "Dream's code": DreamLike,
    "no mask": Attends,
    "all true": lambda: Attends(lambda q, k: q + k >= 0),
    "rows": Rows,
    "Llama": lambda: transformers_model("Llama", is_causal=False, num_key_value_heads=2),
    "Qwen2": lambda: transformers_model("Qwen2", is_causal=False, num_key_value_heads=2),
    "Bert": lambda: transformers_model("Bert"),
}

BAD = {
    "causal": (lambda: Attends(lambda q, k: q >= k), "the last one does not change the first row"),
    "block-causal": (lambda: Attends(lambda q, k: q // 32 >= k // 32), "the last one does not change the first row"),
    "block_size": (lambda: Attends(block_size=4), "its config has block_size=4"),
    "bd_size": (lambda: Attends(bd_size=32), "its config has bd_size=32"),
    "method": (SaysBlocks, r"SaysBlocks.generate\(\) takes block_length"),
    "makes masks": (MakesCausalMasks, "calls _prepare_4d_causal_mask"),
    "wants a mask": (Raises, "AssertionError: an attention_mask is needed"),
    "Llama": (lambda: transformers_model("Llama", num_key_value_heads=2), "attends causally"),
    "Bert as decoder": (lambda: transformers_model("Bert", is_decoder=True), "attends causally"),
}


@pytest.mark.parametrize("name", GOOD)
def test_proven(name):
    check_bidirectional(GOOD[name]().eval(), PROMPT, MASK, 100)


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    make, reason = BAD[name]
    with pytest.raises(ValueError, match=reason):
        mosaic_compiler.generate(make(), PROMPT, gen_length=64, steps=2, compile=False)


def test_a_longer_sequence_is_tried_again():
    model = Attends(lambda q, k: q // 32 >= k // 32)
    assert mosaic_compiler.generate(model, PROMPT, gen_length=4, steps=2, compile=False).steps == 2  # within one block
    with pytest.raises(ValueError, match="not proven to be bidirectional"):
        mosaic_compiler.generate(model, PROMPT, gen_length=64, steps=2, compile=False)


def test_whoever_knows_better_says_so():
    result = mosaic_compiler.generate(
        Attends(block_size=4), PROMPT, gen_length=4, steps=2, compile=False, bidirectional=True
    )
    assert result.sequences.shape == (1, 24)


def test_a_model_that_ignores_the_mask_of_padding_is_refused():
    padded = torch.ones_like(PROMPT)
    padded[0, :3] = 0

    class Ignores(LLaDALike):
        def forward(self, input_ids, attention_bias=None):
            return super().forward(input_ids)

    with pytest.raises(ValueError, match="does not look at the mask of padding"):
        mosaic_compiler.generate(Ignores(), PROMPT, attention_mask=padded, gen_length=4, steps=2, compile=False)
    more = {"attention_mask": padded, "gen_length": 4, "steps": 2, "compile": False}
    assert mosaic_compiler.generate(LLaDALike(), PROMPT, **more).steps == 2
