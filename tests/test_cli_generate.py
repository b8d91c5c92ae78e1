"""``mosaic generate``: the text alone on stdout, errors before a model is loaded, models in code of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import remote_models
import torch

import mosaic_compiler

MODELING = """
from transformers import PretrainedConfig, PreTrainedModel

from .remote_models import DreamLike, LLaDALike


class TinyConfig(PretrainedConfig):
    model_type = "tiny_remote"


class Tiny(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = self.kind()
        self.post_init()

    def get_output_embeddings(self):
        return self.inner.head


class TinyLLaDA(Tiny):
    kind = LLaDALike

    def forward(self, input_ids, attention_bias=None):
        return self.inner(input_ids, attention_bias=attention_bias)


class TinyDream(Tiny):
    kind = DreamLike

    def diffusion_generate(self, *args, **kwargs):
        raise NotImplementedError

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.inner(input_ids, attention_mask, position_ids)
"""


@pytest.fixture
def published(tmp_path, tmp_path_factory, monkeypatch):
    """Makes a folder with a model in Python code of its own, as LLaDA's and Dream's are."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.getbasetemp() / "modules")
    )
    folder = tmp_path / "published"

    def make(kind, auto, **more):
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(remote_models.VOCABULARY)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, **more).save_pretrained(folder)
        shutil.copy(Path(__file__).parent / "remote_models.py", folder)
        (folder / "modeling_tiny.py").write_text(MODELING)
        own = {"AutoConfig": "modeling_tiny.TinyConfig", auto: f"modeling_tiny.Tiny{kind}"}
        (folder / "config.json").write_text(json.dumps({"model_type": "tiny_remote", "auto_map": own}))
        weights = getattr(remote_models, f"{kind}Like")().state_dict()
        save_file({f"inner.{name}": t for name, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def test_generate_prints_text_or_json(run, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("In the beginning God created the heaven and the earth. And the earth was")
    arguments = ("generate", "-f", prompt, "--gen-length", "8", "--steps", "4", "--budget", "64MiB")
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    answer = json.loads(out)
    assert len(answer["tokens"]) == 8
    assert answer["steps"] == 4
    assert 0 < answer["workspace"] <= 64 << 20
    code, out, err = run(*arguments)
    assert code == 0
    assert out == answer["text"] + "\n", "the text alone, for a pipe"
    assert "8 tokens behind" in err


def test_masks_of_a_text_are_filled_in(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God ___ the heaven and the <mask>. And the earth was without")
    arguments = ("generate", "--infill", text, "--steps", "2", "--budget", "64MiB")
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    answer = json.loads(out)
    assert len(answer["tokens"]) == 2
    assert answer["steps"] == 2
    assert answer["text"] == "In the beginning God made the heaven and the earth. And the earth was without"
    code, out, err = run(*arguments)
    assert code == 0
    assert out == answer["text"] + "\n"
    assert f"2 tokens among {answer['prompt_tokens']}" in err


@pytest.mark.parametrize("own", [True, False])
def test_a_mask_is_one_token_between_those_of_the_text(own):
    """Also of a tokenizer that has none, and sets tokens around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from mosaic_compiler.report.load import ids_with_masks

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(9)} | {"<s>": 9, "</s>": 10, "?": 11}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 9), ("</s>", 10)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **({"mask_token": "w5"} if own else {}))
    assert ids_with_masks(tokenizer, "w1 ___ w2 <mask><mask> w3", 5) == [9, 1, 5, 2, 5, 5, 3, 10]
    assert ids_with_masks(tokenizer, "______", 5) == [9, 5, 5, 10]
    assert ids_with_masks(tokenizer, "<mask> w1", 5) == [9, 5, 1, 10]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("nothing is missing", (), "write <mask> or ___"),
        ("a ___", ("--gen-length", "8"), "leave out --gen-length"),
        ("a ___", ("--eos", "7"), "leave out --gen-length"),
        ("a ___", ("--prompt", "x"), "or --infill FILE"),
    ],
)
def test_infilling_that_makes_no_sense_is_found_before_a_model_is_loaded(
    run, monkeypatch, tmp_path, text, options, message
):
    monkeypatch.setattr("mosaic_compiler.report.load.load_model", None)
    (tmp_path / "text").write_text(text)
    code, _, err = run("generate", "--infill", tmp_path / "text", *options)
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.parametrize(
    ("kind", "auto", "options"),
    [
        ("LLaDA", "AutoModelForCausalLM", ("--cfg", "0.5", "--remasking", "random", "--block-length", "4")),
        ("Dream", "AutoModel", ("--alg", "entropy", "--top-p", "0.9", "--top-k", "9", "--temperature", "0.4")),
    ],
)
def test_published_checkpoints_run_with_code_of_their_own(run, published, kind, auto, options):
    folder = published(kind, auto)
    more = (
        "--prompt",
        "w9 w11 w12",
        "--gen-length",
        "8",
        "--steps",
        "4",
        "--device",
        "cpu",
        "--mask-id",
        "5",
        "--json",
    )
    arguments = ("generate", "--model", folder, *more, *options)
    code, _, err = run(*arguments)
    assert code == 2
    assert "modeling_tiny.py" in err
    code, out, err = run(*arguments, "--trust-remote-code")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["steps"] == 4
    model, names = getattr(remote_models, f"{kind}Like")(), {"cfg": "cfg_scale"}
    given = {a.removeprefix("--"): b for a, b in zip(options[::2], options[1::2], strict=True)}
    kept = {"remasking", "alg"}
    given = {names.get(a, a.replace("-", "_")): b if a in kept else json.loads(b) for a, b in given.items()}
    expected = mosaic_compiler.generate(
        model, torch.tensor([[9, 11, 12]]), gen_length=8, steps=4, generator=torch.Generator().manual_seed(0), **given
    )
    assert answer["tokens"] == expected.sequences[0, 3:].tolist()


def test_the_mask_of_a_published_checkpoint_may_be_the_tokenizers(run, published):
    arguments = ("generate", "--prompt", "w9", "--gen-length", "4", "--steps", "2", "--trust-remote-code", "--model")
    code, _, err = run(*arguments, published("LLaDA", "AutoModelForCausalLM"))
    assert code == 2
    assert "has no mask token" in err
    code, out, _ = run(*arguments, published("LLaDA", "AutoModelForCausalLM", mask_token="w5"), "--eos", "7")
    assert code == 0
    assert out.startswith("w")


def test_code_that_does_not_load_says_where(run, published):
    folder = published("LLaDA", "AutoModelForCausalLM")
    (folder / "modeling_tiny.py").write_text(MODELING.replace("self.kind()", "self.nothing()"))
    code, _, err = run("generate", "--prompt", "w9", "--trust-remote-code", "--model", folder)
    assert code == 2
    assert "has no attribute 'nothing'" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gen-length", "0"), "gen_length must be"),
        (("--gen-length", "8", "--block-length", "3"), "take 9 tokens"),
        (("--steps", "-1"), "steps must be"),
        (("--alg", "best"), "alg must be one of"),
        (("--remasking", "best"), "remasking must be"),
        (("--top-p", "2"), "top_p must be"),
        (("--cfg", "1", "--alg", "entropy"), "are LLaDA's"),
    ],
)
def test_what_makes_no_sense_is_found_before_a_model_is_loaded(run, monkeypatch, options, message):
    monkeypatch.setattr("mosaic_compiler.report.load.load_model", None)
    code, _, err = run("generate", "--prompt", "x", *options)
    assert code == 2
    assert message in err


def test_what_makes_no_sense_is_found_without_torch():
    script = "import sys; sys.argv = ['mosaic', 'generate', '--prompt', 'x', '--gen-length', '0']\n"
    script += "from mosaic_compiler import cli\ntry: cli.main()\nexcept SystemExit as e: assert e.code == 2\n"
    script += "assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_drafts_show_what_is_still_masked():
    from mosaic_compiler.report.live import HIDDEN, LiveText

    class Words:
        def decode(self, ids, skip_special_tokens):
            return "".join(f"<{i}>" for i in ids)

    text = LiveText(Words(), mask=3, prompt=1).render(torch.tensor([7, 3, 8, 9, 3]))
    assert text.plain == f"<7>{HIDDEN}<8><9>{HIDDEN}"


@pytest.mark.slow
def test_a_model_with_a_canvas(run, tmp_path):
    from test_canvas import CANVAS, model_of

    from mosaic_compiler.report.load import load_model

    made = model_of(vocabulary=8192)
    made.save_pretrained(tmp_path / "canvas")
    _, tokenizer = load_model(None, "float32", device="cpu")
    tokenizer.save_pretrained(tmp_path / "canvas")
    code, out, err = run(
        "generate", "--model", str(tmp_path / "canvas"), "--prompt", "And God said", "--gen-length", str(CANVAS),
        "--steps", "2", "--json",
    )  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    assert len(said["tokens"]) == CANVAS
    assert said["steps"] == 2
    assert not said["approximate"]
