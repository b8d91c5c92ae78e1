"""Code of a model's folder, written for transformers 4, loads in transformers 5 with the numbers that it made."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch

from mosaic_compiler.report import remote_code

CONFIG = """
from transformers import PretrainedConfig

class OldConfig(PretrainedConfig):
    model_type = "old-diffusion"

    def __init__(self, hidden_size=32, num_attention_heads=1, vocab_size=61, mask_token_id=5, rope_theta=500.0, **more):
        self.hidden_size, self.num_attention_heads, self.vocab_size = hidden_size, num_attention_heads, vocab_size
        self.mask_token_id, self.rope_theta = mask_token_id, rope_theta
        super().__init__(**more)
"""

MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from .configuration_old import OldConfig

class Rotary(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.rope_init_fn = config, ROPE_INIT_FUNCTIONS["default"]
        inv_freq, self.attention_scaling = self.rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

class OldModel(PreTrainedModel):
    config_class = OldConfig

    def __init__(self, config):
        super().__init__(config)  # and no post_init()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.rotary = Rotary(config)
        EXTRA

    def tie_weights(self):
        pass

    def _init_weights(self, module):
        pass

    def forward(self, input_ids):
        angles = torch.arange(input_ids.shape[1])[:, None] * self.rotary.inv_freq
        x = self.embed(input_ids)
        x = x * torch.cat([angles.sin(), angles.cos()], -1)
        return self.head(x + x.mean(1, keepdim=True))
"""


def folder(path, extra="pass"):
    from safetensors.torch import save_file

    (path / "configuration_old.py").write_text(CONFIG)
    (path / "modeling_old.py").write_text(MODEL.replace("EXTRA", extra))
    auto_map = {"AutoConfig": "configuration_old.OldConfig", "AutoModelForCausalLM": "modeling_old.OldModel"}
    (path / "config.json").write_text(
        json.dumps({"model_type": "old-diffusion", "auto_map": auto_map, "rope_theta": 500.0})
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (61, 32), "head.weight": (61, 32), "head.bias": (61,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def _own_modules(tmp_path_factory):
    import transformers.dynamic_module_utils as utils

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)  # of other tests' folders
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


def test_rotary_frequencies_are_those_that_the_code_made(tmp_path):
    made = tmp_path / "model-a"
    made.mkdir()
    model = remote_code.load("AutoModelForCausalLM", folder(made), dtype=torch.float32)
    expected = 500.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(model.rotary.inv_freq, expected)
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_other_buffers_that_no_checkpoint_has_are_named(tmp_path, caplog):
    made = tmp_path / "model-b"
    made.mkdir()
    extra = 'self.register_buffer("table", torch.ones(4), persistent=False)'
    with caplog.at_level(logging.WARNING, "mosaic_compiler"):
        remote_code.load("AutoModelForCausalLM", folder(made, extra), dtype=torch.float32)
    assert "table are in no checkpoint" in caplog.text
