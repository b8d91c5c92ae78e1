"""``mosaic`` on the command line: answers, files, and one-line errors with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from mosaic_compiler.ahead import configs, fit
from mosaic_compiler.backend import observing
from mosaic_compiler.planning import Buffer, MemoryPlan, make_plan
from mosaic_compiler.planning.selection import kept_keys
from mosaic_compiler.sampling import DenoisingStep, block_window

SMALL = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 160, "vocab_size": 200, "mask_token_id": 3,
}  # fmt: skip

WITHOUT_EXPERTS_PER_TOKEN = {
    "model_type": "deepseek_v2", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128,
    "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0,
    "vocab_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": None,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


@pytest.fixture
def plans(tmp_path):
    paths = []
    for name, size in (("a", 1 << 20), ("b", 3 << 20)):
        buffers = [
            Buffer("mm", "arena", size, 0, 2, "float32", (size // 4,), "aten.mm.default", "model.mlp", "model.py:3"),
            Buffer("out", "heap", 1 << 10, 1, 2, term="call"),
        ]
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(make_plan(buffers, ["mm", "out"], symbols=[("s0", 8)]).to_json())
    return paths


def test_fit_answers_for_several_lengths_and_remembers_the_trace(run, config, tmp_path):
    plan = tmp_path / "plan.json"
    arguments = ("fit", "--config", config, "--gpu", "100MB", "--reserve", "1MB", "--dtype", "fp32")
    code, out, err = run(*arguments, "--tokens", "64,1k,200k", "-o", plan)
    assert code == 0
    assert "tracing" in err
    assert "longest sequence" in out
    assert out.count("yes") >= 2
    assert "bytes" in out, "the length that does not fit says why"
    written = MemoryPlan.from_json(plan.read_text())
    assert written.workspace > 0
    assert written.title == f"{config.parent.name}, float32"
    assert written.sizes == ("1,024 tokens", "512 masked rows")
    assert written.device in ("cpu", "cuda")
    assert "a step with 204,800 tokens, 102,400 masked rows needs at least" in " ".join(out.split())
    code, out, err = run(*arguments, "--tokens", "2k", "--json")
    assert "tracing" not in err
    answer = json.loads(out)
    assert answer["answers"][0]["fits"]
    assert answer["answers"][0]["tokens"] == 2048
    assert answer["longest"] > answer["longest_eager"] > 0


@pytest.mark.slow
def test_fit_counts_all_keys_where_chosen_ones_are_read(run, config):
    """Beside them their positions: eight bytes for each chosen key, head and layer."""
    states = []
    for more in (("dual",), ("select", "--cache-keep", "0.25", "--no-cache-evict"), ("select", "--cache-keep", "0.25")):
        code, out, _ = run("fit", "--config", config, "--tokens", "1k", "--gpu", "1GB", "--json", "--cache", *more)
        assert code == 0
        states.append(json.loads(out)["answers"][0]["state"])
    every, read, kept = states
    heads = SMALL.get("num_key_value_heads", SMALL["num_attention_heads"])
    positions = 8 * heads * SMALL["num_hidden_layers"] * kept_keys(0.25, 1024, 32)
    assert 0 <= read - every - positions < 512 * SMALL["num_hidden_layers"]
    assert kept < every


def test_fit_says_which_lengths_the_model_was_not_trained_for(run, config):
    config.write_text(json.dumps({**SMALL, "max_position_embeddings": 2048}))
    code, out, _ = run("fit", "--config", config, "--tokens", "1k", "--gpu", "rtx 4090")
    assert code == 0
    assert "of RTX4090 are left" in out
    assert "the config gives the model 2,048 positions" in out
    code, out, _ = run("fit", "--config", config, "--tokens", "1k", "--json")
    assert json.loads(out)["positions"] == 2048 < json.loads(out)["longest"]


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("A100", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("h100", "H100"),
        ("H100 80GB HBM3", "H100"),
    ],
)
def test_cards_have_many_names(name, card):
    from mosaic_compiler.cli_values import parse_card
    from mosaic_compiler.report.known_cards import CARDS

    assert parse_card(name) == (card, CARDS[card] << 20)
    assert parse_card("24GiB") == ("24GiB", 24 << 30)


def test_known_models_are_found_in_any_case():
    assert configs.load_config("llada-8b") == configs.load_config("LLaDA-8B")


def test_a_remembered_trace_is_planned_without_torch(config, tmp_path, run):
    arguments = ["fit", "--config", str(config), "--tokens", "2k"]
    run(*arguments)
    script = f"import sys; sys.argv = ['mosaic', *{arguments}]; from mosaic_compiler import cli\ntry: cli.main()\n"
    script += "except SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_broken_cache_is_made_again(run, config, tmp_path):
    run("fit", "--config", config, "--tokens", "64")
    (cached,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    cached.write_bytes(cached.read_bytes()[:100])
    code, _, err = run("fit", "--config", config, "--tokens", "64")
    assert code == 0
    assert "tracing" in err


@pytest.mark.parametrize("budget", [None, pytest.param("3MiB", marks=pytest.mark.slow)])
def test_the_predicted_peak_is_that_of_the_real_step(config, budget, tmp_path):
    """To the byte: traced at 64 tokens on the meta device, against a compiled step that ran."""
    from mosaic_compiler.planning.budget import parse_budget

    model, mask = configs.build(configs.load_config(str(config)), torch.float32)
    known = fit.traced(configs.load_config(str(config)), "float32", cache=tmp_path)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.model.rotary_emb.inv_freq.copy_(torch.linspace(1, 0.01, model.model.rotary_emb.inv_freq.numel()))
    tokens, steps = 3000, []
    ids = torch.full((1, tokens), 5)
    ids[:, ::2] = mask
    step = torch.compile(DenoisingStep(model, mask), backend="mosaic", dynamic=True, options={"memory_budget": budget})
    with torch.no_grad(), observing(steps.append):
        step(ids, block_window(tokens, 0, tokens), torch.tensor([100]))
    real = steps[0].plan
    ahead = known.outline.plan_for(tokens, 0.5, parse_budget(budget)).plan
    assert (ahead.peak, ahead.height, ahead.workspace) == (real.peak, real.height, real.workspace)


def test_eager_is_predicted_as_the_captured_graph_without_waste(config, tmp_path):
    known = fit.traced(configs.load_config(str(config)), "float32", cache=tmp_path)
    logits = 10_000 * 200 * 4
    assert 2 * logits <= fit.answer(known, 10_000, 1 << 30).eager_peak <= 12 * logits


def test_explain_and_diff(run, plans):
    code, out, _ = run("explain", plans[0])
    assert code == 0
    assert "1.0 MiB" in out
    assert "fallbacks: none" in out
    code, out, _ = run("diff", *plans)
    assert code == 0
    assert "+2.0 MiB" in out
    assert "model.mlp" in out


@pytest.mark.parametrize(
    ("suffix", "needs", "start"),
    [
        (".html", "bokeh", b"<!DOC"),
        (".png", "matplotlib", b"\x89PNG"),
        (".trace.json", "json", b'{"tra'),
        (".pickle", "pickle", b"\x80"),
    ],
)
def test_reports(run, plans, tmp_path, suffix, needs, start):
    pytest.importorskip(needs)
    path = tmp_path / f"plan{suffix}"
    assert run("report", plans[0], "-o", path)[0] == 0
    assert path.read_bytes().startswith(start)


def test_doctor_says_what_is_there_and_what_is_missing(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert torch.__version__ in out
    assert "cpu arena" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate",), "give the text to begin with"),
        (("generate", "--prompt", "x", "-f", "{plan}"), "give the text to begin with"),
        (("generate", "-f", "{missing}"), "No such file"),
        (("generate", "--prompt", "x", "--model", "{missing}"), "no model"),
        (("generate", "--prompt", "x", "--budget", "lots"), "--budget 'lots'"),
        (("generate", "--prompt", "x", "--gen-length", "0"), "gen_length must be"),
        (("generate", "--prompt", "x", "--gen-length", "8", "--budget", "5KB"), "needs at least"),
        (("generate", "--prompt", "x", "--device", "tpu"), "device 'tpu'"),
        (
            ("generate", "--prompt", "x", "--mask-id", "9000"),
            "9000 is no token of the model: it has 8192",
        ),
        (("generate", "--prompt", "x", "--top-k", "5"), "top_p and top_k are Dream's"),
        (("generate", "--prompt", "x", "--model", "{remotes}"), "--trust-remote-code"),
        (("explain", "{missing}"), "No such file"),
        (("explain", "{text}"), "not a plan"),
        (("explain", "{old}"), "schema version 1"),
        (("explain", "{cut}"), "no valid JSON"),
        (("explain", "{binary}"), "not a plan"),
        (("report", "{plan}", "-o", "x.docx"), "the suffix says"),
        (("report", "{plan}", "-o", "/nowhere/at/all.trace.json"), "cannot write"),
        (("diff", "{plan}", "{text}"), "not a plan"),
        (("fit", "--config", "GPT-5"), "no such config"),
        (("fit", "--config", "LLaDA8b"), "did you mean LLaDA-8B?"),
        (("fit", "--config", "LLaDA-8B", "--gpu", "RTX4091"), "such as RTX4090"),
        (("fit", "--config", "{text}"), "no JSON"),
        (("fit", "--config", "{plan}"), "no 'model_type'"),
        (("fit", "--config", "{alien}"), "does not know model_type 'alien'"),
        (("fit", "--config", "{remote}"), "remote code"),
        (("fit", "--config", "{failing}"), "argument 'k' must be int, not NoneType ("),
        (("fit", "--config", "LLaDA-8B", "--gpu", "24 gigs"), "--gpu '24 gigs'"),
        (("fit", "--config", "LLaDA-8B", "--tokens", "many"), "--tokens 'many'"),
        (("fit", "--config", "LLaDA-8B", "--tokens", "0"), "--tokens '0'"),
        (("fit", "--config", "LLaDA-8B", "--cache", "dual", "--no-cache-evict"), "say how many with --cache-keep"),
        (("fit", "--config", "LLaDA-8B", "--dtype", "int3"), "dtype 'int3'"),
        (("fit", "--config", "LLaDA-8B", "--device", "tpu"), "device 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, plans, tmp_path, arguments, message):
    files = {
        "plan": plans[0].read_text(), "text": "hello", "old": '{"schema": "mosaic.plan", "version": 1}',
        "cut": plans[0].read_text()[:200], "alien": '{"model_type": "alien"}',
        "remote": '{"model_type": "llada", "auto_map": {}}', "failing": json.dumps(WITHOUT_EXPERTS_PER_TOKEN),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "remotes").mkdir()
    (tmp_path / "remotes" / "config.json").write_text(
        '{"model_type": "llada", "auto_map": {"AutoModel": "modeling.M"}}'
    )
    names = {name: tmp_path / name for name in (*files, "binary", "missing", "remotes")}
    code, _, err = run(*(argument.format(**names) for argument in arguments))
    assert code == 2
    assert message in err
    assert len(err.replace("mosaic: tracing the model; the next time it is remembered\n", "").splitlines()) == 1


@pytest.mark.slow
def test_fit_shows_each_rung_that_auto_would_go_down(run, config):
    arguments = ("fit", "--config", config, "--tokens", "1k,64k", "--cache", "auto", "--dtype", "fp32")
    code, out, _ = run(*arguments, "--gpu", "RTX4090", "--json")
    assert code == 0
    found = json.loads(out)
    kept = [rung["kept"] for rung in found["rungs"]]
    assert len(kept) == 6
    assert found["taken"] == dict.fromkeys(("1024", "65536"), kept[0])
    states = [rung["answers"][1]["state"] for rung in found["rungs"]]
    assert states == sorted(states, reverse=True)
    assert states[-1] == 0
    between = found["weights"] + (600 << 20) + (states[0] + states[1]) // 2
    code, out, _ = run(*arguments, "--gpu", str(between), "--json")
    found = json.loads(out)
    fits = [rung["answers"][1]["fits"] for rung in found["rungs"]]
    first = fits.index(True)
    assert first > 0
    assert found["taken"]["65536"] == kept[first]
    code, out, _ = run(*arguments, "--gpu", str(between))
    assert code == 0
    lines = [line for line in out.splitlines() if line.split()[:1] == ["65,536"]]
    assert ["taken" in line for line in lines[:6]] == [number == first for number in range(6)]
    assert "name the card" in out
    code, _, err = run(*arguments, "--gpu", "here")
    assert code == 2
    assert "no GPU" in err


@pytest.mark.slow
def test_fit_counts_what_is_kept_in_fewer_bits(run, config):
    arguments = ("fit", "--config", config, "--tokens", "1k", "--cache", "dual", "--dtype", "fp32", "--gpu", "RTX4090")
    states = []
    for more in ((), ("--cache-dtype", "int8")):
        code, out, _ = run(*arguments, *more, "--json")
        assert code == 0
        found = json.loads(out)["answers"][0]
        assert found["fits"]
        assert found["peaks"]["reuse"] >= found["state"]
        assert min(found["seconds"].values()) > 0
        states.append(found["state"])
    heads, depth = SMALL["num_key_value_heads"], SMALL["hidden_size"] // SMALL["num_attention_heads"]
    assert states[0] == 2 * SMALL["num_hidden_layers"] * 1024 * heads * depth * 4
    assert states[1] == 2 * SMALL["num_hidden_layers"] * 1024 * heads * (depth + 4)
    for more, message in (
        (("--cache-dtype", "int3"), "int3"),
        (("--cache", "none", "--cache-dtype", "int8"), "choose --cache"),
    ):
        code, _, err = run(*arguments, *more)
        assert code == 2
        assert message in err
