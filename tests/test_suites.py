"""Suites of launch/benchmark.py on the tiny model, and the oracle in transformers that they measure against."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
import torch

from ramp_jax import workflow
from ramp_jax.config import RunConfig, as_dict
from ramp_jax.halo import llama_quantize
from ramp_jax.halo.llama_quantize import mix_types
from ramp_jax.halo.torch_model import token_losses, torch_model
from ramp_jax.models import load_model, lookup, tensors
from ramp_jax.models.rope import Rope
from ramp_jax.models.spec import spec_from_hf
from ramp_jax.policy import embedding, networks
from ramp_jax.policy.env import CONTEXT
from ramp_jax.policy.inference import Policy
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig
from ramp_jax.scoring.perplexity import evaluate
from ramp_jax.scoring.scores import Evaluation

sys.path.append(str(Path(__file__).parent.parent / "launch"))
from benchmarks import accelerator as accelerator_suite
from benchmarks import devices as devices_suite
from benchmarks import encoder as encoder_suite
from benchmarks import end_to_end as end_to_end_suite
from benchmarks import forward as forward_suite
from benchmarks import guard as guard_suite
from benchmarks import measuring, synthetic, watched
from benchmarks import memory as memory_suite
from benchmarks import paper as paper_suite
from benchmarks import parity as parity_suite
from benchmarks import policy as policy_suite
from benchmarks import reward as reward_suite
from benchmarks import sac as sac_suite
from benchmarks import transfer as transfer_suite
from benchmarks.sizes import Published

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture
def on_tiny(monkeypatch, untied):
    """Run a suite with the tiny model in place of the real one: suite → numbers."""

    def run(module, name):
        known = {"smollm2-135m": untied}
        monkeypatch.setattr(module, "load_model", lambda ref: known.get(ref) or load_model(ref))
        with jax.numpy_dtype_promotion("standard"):
            return getattr(module, name)(1)

    return run


def figures_of(monkeypatch, suite):
    """What the suite draws, by name."""
    drawn = {}
    monkeypatch.setattr(suite, "save_plots", lambda figures: drawn.update({k: f() for k, f in figures.items()}))
    return drawn


def test_the_oracle_holds_the_model_s_weights(model, windows):
    ids = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        expected = tiny.hf_model(model.spec.tied)(ids).logits
        torch.testing.assert_close(torch_model(model)(ids).logits, expected, atol=1e-6, rtol=0)


def test_losses_of_the_oracle(untied, windows):
    found = token_losses(torch_model(untied), windows, 12)
    assert found.shape == (3, 11)
    np.testing.assert_allclose(found.reshape(-1), evaluate(untied, windows).nll, atol=2e-5, rtol=0)


def test_oracle_without_torch(untied, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match=r"torch is not installed .*; run `pip install 'ramp-jax\[test\]'`"):
        torch_model(untied)


def test_contestants_take_turns(monkeypatch):
    """Medians of the turns after the first, on a clock that each call advances."""
    clock, calls, durations = [0.0], [], {"a": iter([9, 1, 5, 2]), "b": iter([9, 4, 4, 7])}
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def run(name):
        calls.append(name)
        clock[0] += next(durations[name])

    contestants = {name: lambda name=name: run(name) for name in "ab"}
    assert measuring.medians(contestants, 3) == {"a": 2, "b": 4}
    assert calls == list("abababab")
    durations |= {"a": iter([3, 1]), "b": iter([2, 5])}
    assert measuring.turns(contestants, 1) == {"a": [3, 1], "b": [2, 5]}


def test_forward_suite_scores_the_same_text_everywhere(on_tiny, monkeypatch):
    monkeypatch.setattr(forward_suite, "_WINDOWS", {"context": 24, "count": 2, "split": "heldout"})
    numbers = on_tiny(forward_suite, "forward")
    assert numbers["jax_f32_ppl"] == pytest.approx(numbers["torch_bf16_ppl"], rel=0.02)
    assert numbers["jax_bf16_ppl"] == pytest.approx(numbers["jax_f32_ppl"], rel=0.02)
    assert abs(numbers["jax_bf16_quantized_ppl"] / numbers["jax_bf16_ppl"] - 1) > 0.02
    speed = {name: numbers[f"{name}_tokens_per_second"] for name in ("jax_bf16", "jax_bf16_quantized", "torch_bf16")}
    assert numbers["jax_over_torch_bf16"] == pytest.approx(speed["jax_bf16"] / speed["torch_bf16"])
    assert numbers["quantized_over_plain"] == pytest.approx(speed["jax_bf16_quantized"] / speed["jax_bf16"])


def test_parity_suite(on_tiny, monkeypatch):
    """Losses of all three agree, continuations too, and the plot shows every window of both protocols."""
    drawn = figures_of(monkeypatch, parity_suite)
    short = {"llama.cpp": {"context": 24, "count": 3}, "sliding": {"context": 48, "count": 2}}
    monkeypatch.setattr(parity_suite, "_PROTOCOLS", short)
    monkeypatch.setattr(parity_suite, "_PAIRS", 4)
    numbers = on_tiny(parity_suite, "parity")
    assert (numbers["llama.cpp_tokens"], numbers["sliding_tokens"]) == (33, 94)
    for protocol in short:
        assert numbers[f"{protocol}_largest_difference_of_a_window_transformers"] < 1e-5
        assert numbers[f"{protocol}_largest_difference_of_a_window_llama.cpp"] < 5e-3
        assert numbers[f"{protocol}_ppl_JAX"] > 5
    assert numbers["largest_difference_of_a_log_likelihood"] < 1e-3
    assert numbers["mean_log_likelihood"] < -5
    points = [len(line.get_ydata()) for axes in drawn["parity"].axes for line in axes.get_lines()]
    assert points == [3, 3, 3, 2, 2, 2, 3, 3, 2, 2]


def test_policy_suite_gives_every_method_the_bytes_of_the_mix(monkeypatch, untied_directory, tmp_path):
    """On the tiny model, whose rows hold only blocks of 32: rows fit their budget, and the plot shows every method."""
    hidden, levels = (8,), (4, 5, 8)
    actor = networks.actor(hidden).init(jax.random.key(0), len(embedding.NAMES) + CONTEXT)
    folder = tmp_path / "learned"
    folder.mkdir()
    Policy(actor, hidden, levels, 4, ("tiny",)).save(folder)
    drawn = figures_of(monkeypatch, policy_suite)
    for name, value in {
        "_CALIBRATION": {"context": 24, "count": 2},
        "_HELDOUT": {"context": 24, "count": 2},
        "_RANDOM_SEEDS": 1,
        "_MIXES": SimpleNamespace(value=["IQ4_NL", "Q5_0", "Q8_0"]),
        "_TARGET": SimpleNamespace(value=str(untied_directory)),
        "_POLICIES": SimpleNamespace(value=[str(folder)]),
        "_LEVELS": SimpleNamespace(value=["4", "5", "8"]),
        "_TABLE": SimpleNamespace(value=None),
        "_EVOLUTION": SimpleNamespace(value=6),
    }.items():
        monkeypatch.setattr(policy_suite, name, value)
    rows = policy_suite.policy(1)["rows"]
    methods = {row["method"] for row in rows if not row["method"].startswith("llama.cpp")}
    mine = {f"policy {folder.name}", f"policy {folder.name}, no repair", f"policy {folder.name}, refined"} | {
        "evolution"
    }
    assert methods == {"uniform", "random 0", "estimate, greedy", "estimate, knapsack", "estimate, pairs"} | mine
    assert all(row["bytes"] <= row["budget"] for row in rows)
    assert all(np.isfinite(row["kld"]) and row["kld"] > 0 for row in rows)
    by = {(row["budget_of"], row["method"]): row["kld"] for row in rows}
    assert by["Q5_0", "estimate, knapsack"] < by["Q5_0", "random 0"]
    shown = methods - {"random 0"} | {"random", "llama.cpp's mixes"}
    assert {line.get_label() for line in drawn["policy"].axes[0].get_lines()} == shown


def test_guard_suite_has_a_row_per_budget_and_counts_regressions(monkeypatch, untied_directory):
    """A choice at random loses against llama.cpp's mixes, and that is said."""
    for name, value in {
        "_CALIBRATION": {"context": 24, "count": 2},
        "_HELDOUT": {"context": 24, "count": 2},
        "_MODELS": SimpleNamespace(value=[str(untied_directory)]),
        "_TEXTS": SimpleNamespace(value=["builtin"]),
        "_POLICY": SimpleNamespace(value="random"),
        "_ENCODER": SimpleNamespace(value="best"),
    }.items():
        monkeypatch.setattr(guard_suite, name, value)
    known = llama_quantize.MIXES
    monkeypatch.setattr(llama_quantize, "MIXES", {name: known[name] for name in ("IQ4_NL", "Q5_0", "Q8_0")})
    found = guard_suite.guard(1)
    assert found["pairs"] == len(found["rows"]) >= 2
    for row in found["rows"]:
        assert row["bytes"] <= row["budget"]
        assert row["beyond"] == pytest.approx(row["kld"] - row["mix_kld"], abs=1e-6)
    assert found["regressions"] == sum(row["beyond"] > row["stderr"] for row in found["rows"]) > 0
    assert found["ratio"] == pytest.approx(np.mean([row["kld"] / row["mix_kld"] for row in found["rows"]]))


def test_paper_suite_says_whether_the_claim_holds(monkeypatch, untied_directory):
    """At the bytes of four bits, which is as small as the tiny model gets; of two seeds."""
    for name, value in {
        "_MODELS": [str(untied_directory)],
        "_CALIBRATED_ON": "builtin",
        "_POLICY": "uniform",
        "_TEXTS": ["builtin", "code"],
        "_SEEDS": 2,
        "_CALIBRATION": 2,
        "_HELDOUT": 2,
        "_CONTEXT": 24,
        "_SHARE": 1.0,
        "_QUESTIONS": 4,
    }.items():
        monkeypatch.setattr(paper_suite, name, SimpleNamespace(value=value))
    found = paper_suite.paper(1)
    assert len(found["rows"]) == 2 * 2 * 5
    assert len(found["means"]) == 2 * 5
    by = {(row["text"], row["method"]): row for row in found["means"]}
    awq, gptq, three, mine, free = (by["code", name] for name in ("AWQ", "GPTQ", "GPTQ, 3 bits", "RAMP", "RAMP, free"))
    assert three["linear_bytes"] < awq["linear_bytes"] == gptq["linear_bytes"] >= mine["linear_bytes"]
    assert mine["bytes"] - mine["linear_bytes"] == awq["bytes"] - awq["linear_bytes"]
    assert free["bytes"] <= awq["bytes"]
    assert free["linear_bytes"] > awq["linear_bytes"]
    assert free["kld"] < gptq["kld"] < three["kld"]
    for row in found["means"]:
        seeds = [one for one in found["rows"] if all(one[key] == row[key] for key in ("text", "method"))]
        assert row["kld"] == pytest.approx(np.mean([one["kld"] for one in seeds]))
        assert row["delta_nll"] == pytest.approx(np.mean([one["delta_nll"] for one in seeds]), abs=1e-6)
        assert row["kept"] == pytest.approx(np.mean([one["kept"] for one in seeds]))
    for row in found["claims"]:
        one, other = by[row["text"], row["method"]], by[row["text"], "AWQ"]
        assert row["ppl_over_AWQ"] == pytest.approx(np.exp(one["delta_nll"] - other["delta_nll"]))
        assert row["bytes_over_4_bits"] == pytest.approx(one["bytes"] / other["bytes"])
        assert paper_suite.verdict(row).endswith("holds." if row["holds"] else "does not hold.")
    assert len(paper_suite.table(found["means"]).splitlines()) == 11


@pytest.mark.parametrize(
    ("gain", "noise", "share", "holds"),
    [(0.03, 0.1, 0.94, True), (0.005, 0.1, 0.94, False), (0.03, 1.0, 0.94, False), (0.03, 0.1, 0.95, False)],
)
def test_paper_suite_wants_a_gain_beyond_noise_and_fewer_bytes(monkeypatch, rng, gain, noise, share, holds):
    """Of 400 tokens, whose losses are lower by `gain` and differ by `noise`."""
    monkeypatch.setattr(paper_suite, "_SHARE", SimpleNamespace(value=0.94))
    nll = rng.standard_normal(400) ** 2
    change = rng.standard_normal(400)
    ours = nll - gain + noise * (change - change.mean()) / change.std()
    plain = {"kld": nll, "ref_nll": nll, "same_top": nll > 0}
    scored = {("a", name): Evaluation(nll, **plain) for name in ("AWQ", "GPTQ")} | {
        ("a", "RAMP"): Evaluation(ours, **plain)
    }
    sizes = {"AWQ": 1000, "RAMP": round(1000 * share)}
    means = [{"model": "m", "text": "a", "method": name, "bytes": n, "linear_bytes": n} for name, n in sizes.items()]
    row = paper_suite.claim(means, scored, "a", "RAMP")
    assert row["holds"] == holds
    assert row["ppl_over_GPTQ"] == pytest.approx(np.exp(-gain))
    assert row["ppl_over_AWQ_stderr"] == pytest.approx(np.exp(-gain) * noise / 20, rel=0.01)


def test_paper_suite_takes_the_groups_and_levels_that_it_names(untied):
    names = [paper_suite.group_format(4, n_in).name for n_in in (768, 576, 96)]
    assert names == ["INT4_G128", "INT4_G64", "INT4_G32"]
    budget = paper_suite.budget_of(untied, 1.0)
    kept = paper_suite.in_f16(untied.spec)
    assert [override["pattern"] for override in kept] == ["token_embd.weight", "output.weight"]
    assert paper_suite.file_bytes(untied, paper_suite.uniform(untied.spec, 4)) == budget


def test_encoder_suite_scores_every_text(monkeypatch, untied_directory):
    """A level and a mix, rounded in every way: lower than llama-quantize where errors are compensated."""
    drawn = figures_of(monkeypatch, encoder_suite)
    for name, value in {
        "_MODEL": str(untied_directory),
        "_CASES": ["4", "Q4_0"],
        "_CALIBRATED_ON": "code",
        "_TEXTS": ["builtin", "code"],
        "_CALIBRATION": 4,
        "_HELDOUT": 2,
    }.items():
        monkeypatch.setattr(encoder_suite, name, SimpleNamespace(value=value))
    monkeypatch.setattr(encoder_suite, "_CONTEXT", 24)
    found = encoder_suite.encoder(1)
    columns = ["llama-quantize", "plain", "best", "best, folded", "compensated, folded"]
    wanted = [(text, case, column) for case in ("4", "Q4_0") for column in columns for text in ("builtin", "code")]
    rows = {(row["text"], row["case"], row["column"]): row["kld"] for row in found["rows"]}
    assert list(rows) == wanted
    assert min(rows.values()) > 0
    for row in found["ratios"]:
        text, case = row["text"], row["case"]
        assert row["best"] == pytest.approx(rows[text, case, "best"] / rows[text, case, "llama-quantize"])
    assert np.mean([row["compensated, folded"] for row in found["ratios"]]) < 0.95
    labels = [label.get_text() for label in drawn["encoder"].axes[0].get_xticklabels()]
    assert labels == ["4\nbuiltin", "4\ncode", "Q4_0\nbuiltin", "Q4_0\ncode"]


def test_sac_suite_ends_near_the_optimum(monkeypatch):
    """On two layers: speeds are positive, and a short run loses hardly more than the estimate's exact optimum."""
    monkeypatch.setattr(sac_suite, "_LAYERS", 2)
    monkeypatch.setattr(sac_suite, "_EPISODES", 4)
    short = TrainConfig(iterations=30, updates=8, log_every=10, sac=SacConfig(hidden=(32,), batch_size=128))
    monkeypatch.setattr(sac_suite, "TrainConfig", lambda **changed: dataclasses.replace(short, **changed))
    with jax.numpy_dtype_promotion("standard"):
        numbers = sac_suite.sac(1)
    assert numbers["steps_per_second"] > 0
    assert numbers["seeds_8_over_1"] > 0
    assert 1 - 1e-5 < numbers["policy_over_optimum"] < numbers["estimate_over_optimum"] + 0.02
    assert numbers["estimate_over_optimum"] < numbers["uniform_over_optimum"]


def test_transfer_suite_judges_every_training_on_every_model(monkeypatch, tmp_path):
    """Two models of synthetic tables, one of them held: optimum 1, uniform no part of the way."""
    monkeypatch.setattr(sac_suite, "_LAYERS", 1)
    tasks = {"a": sac_suite.synthetic(0), "b": sac_suite.synthetic(1)}
    monkeypatch.setattr(transfer_suite, "_task", lambda name, config: tasks[name])
    monkeypatch.setattr(transfer_suite.embedding, "NAMES", ("one",))
    for name, value in {"_RUN": str(tmp_path), "_HELD": "b", "_BLANKED": ["one"]}.items():
        monkeypatch.setattr(transfer_suite, name, SimpleNamespace(value=value))
    monkeypatch.setattr(transfer_suite, "SEEDS", 2)
    drawn = figures_of(monkeypatch, transfer_suite)
    sac = SacConfig(hidden=(8,), batch_size=8)
    config = RunConfig(
        models=("a",),
        levels=("IQ2_XXS", 2, 3, 4, 4.5, 5, 6),
        train=TrainConfig(iterations=2, episodes=4, updates=2, replay_iterations=2, sac=sac),
    )
    (tmp_path / workflow.CONFIG).write_text(json.dumps(as_dict(config)))
    with jax.numpy_dtype_promotion("standard"):
        rows = transfer_suite.transfer(1)["rows"]
    by = {(row["method"], row["model"], row["how"], row["seed"]): row for row in rows}
    assert len(by) == len(rows)
    assert by["exact table, knapsack", "b", "", 0]["over_optimum"] == pytest.approx(1)
    assert by["exact table, knapsack", "b", "", 0]["way"] == pytest.approx(1)
    assert by["uniform", "a", "", 0]["way"] == pytest.approx(0)
    assert all(row["over_optimum"] > 1 - 1e-5 for row in rows)
    for method in (
        "trained on a",
        "all, without formats by name",
        "all, rewards without potential",
        "all, without one",
    ):
        assert {key[1:] for key in by if key[0] == method} == {
            (name, how, seed) for name in "ab" for how in ("rollout", "repaired") for seed in (0, 1)
        }
    assert [axes.get_title() for axes in drawn["transfer"].axes] == ["a", "b"]
    assert "policy that never saw it" in {line.get_label() for line in drawn["transfer"].axes[1].get_lines()}


def test_reward_suite_judges_every_variant_as_it_learns(monkeypatch):
    """Two scans of two rewards: allocations fit, and before training both are alike."""
    monkeypatch.setattr(sac_suite, "_LAYERS", 1)
    sac = SacConfig(hidden=(8,), batch_size=8)
    learning = TrainConfig(iterations=20, episodes=4, updates=2, replay_iterations=2, sac=sac)
    run = RunConfig(models=("a",), train=learning), {"a": sac_suite.synthetic(0)}
    variants = {"masks, regrets", "soft, plain losses"}
    two = {name: how for name, how in reward_suite._variants(learning).items() if name in variants}
    monkeypatch.setattr(reward_suite, "_variants", lambda config: two)
    monkeypatch.setattr(reward_suite, "read_run", lambda: run)
    drawn = figures_of(monkeypatch, reward_suite)
    with jax.numpy_dtype_promotion("standard"):
        rows = reward_suite.reward(1)["rows"]
    assert {(row["variant"], row["iteration"]) for row in rows} == {(v, i) for v in variants for i in (0, 10, 20)}
    assert len({tuple(row["over_optimum"]) for row in rows if row["iteration"] == 0}) == 1
    assert all(min(row["over_optimum"]) > 1 - 1e-5 for row in rows)
    assert {line.get_label() for line in drawn["reward"].axes[0].get_lines()} == variants


def test_accelerator_suite_compares_with_the_bytes_of_ggml(monkeypatch):
    """Not with those that the same program makes on the same device: rounding that is off by a little is seen."""
    monkeypatch.setattr(accelerator_suite, "_SAME_BYTES", ("Q8_0", "Q4_K"))
    found = accelerator_suite._bytes(None, 1)
    assert found == {"bytes_compared_with": "ggml", "bytes_equal_Q8_0": 1, "bytes_equal_Q4_K": 1}
    right = accelerator_suite.encode
    monkeypatch.setattr(accelerator_suite, "encode", lambda w, name: right(np.where(w > 0, w * 1.01, w), name))
    found = accelerator_suite._bytes(None, 1)
    assert found["bytes_equal_Q8_0"] < 0.1
    assert found["bytes_equal_Q4_K"] < 0.9


def test_recorded_tables_say_what_made_them(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(measuring.sys, "argv", ["launch/benchmark.py", "--suite=quantize", "--record"])
    rows = [{"format": "Q4_K", "ratio": 1.23456}, {"format": "Q8_0", "worst": 2}]
    text = measuring.record("quantize", "quantize", {"weights": 7, "rows": rows}).read_text()
    assert "    python launch/benchmark.py --suite=quantize --record" in text
    assert f"jax {jax.__version__}" in text
    assert "- weights: 7" in text
    page = tmp_path / "results" / "quantize.md"
    page.write_text(f"{text}\n## Reading\n\nMore is better.\n")
    assert text.splitlines()[-4:] == [
        "| format | ratio | worst |",
        "|---|---|---|",
        "| Q4_K | 1.235 |  |",
        "| Q8_0 |  | 2 |",
    ]
    measuring.record("quantize", "quantize", {"weights": 8})
    assert page.read_text().endswith("- weights: 8\n\n## Reading\n\nMore is better.\n")


def test_accelerator_suite_measures_what_is_asked_for(monkeypatch):
    """On the CPU, with small shapes: every number is there."""
    small = {
        "n_layers": 3,
        "d_model": 256,
        "n_heads": 4,
        "n_kv_heads": 4,
        "head_size": 64,
        "rope": Rope(10000.0, 64),
        "d_ff": 256,
        "vocab_size": 64,
    }
    monkeypatch.setattr(accelerator_suite, "SPEC", dataclasses.replace(accelerator_suite.SPEC, **small))
    for name, value in {"_CONTEXT": 16, "_WINDOWS": 2, "_PRODUCT": 64, "_LEVELS": (8,), "_FORMAT": "Q8_0"}.items():
        monkeypatch.setattr(accelerator_suite, name, value)
    monkeypatch.setattr(accelerator_suite, "_SAME_BYTES", ("Q8_0",))
    rows = ["matmul", "forward", "encode", "sensitivity", "bytes"]
    monkeypatch.setattr(accelerator_suite, "_ROWS", SimpleNamespace(value=rows))
    found = accelerator_suite.accelerator(1)
    assert {name.split("_")[0] for name in found} == {"device", "weights", *rows}
    assert found["bytes_equal_Q8_0"] == 1
    assert found["sensitivity_seconds"] == pytest.approx(found["sensitivity_seconds_of_three_layers"])
    monkeypatch.setattr(accelerator_suite, "_ROWS", SimpleNamespace(value=["speed"]))
    with pytest.raises(ValueError, match="--accelerator_rows names 'speed'; choose from matmul, forward"):
        accelerator_suite.accelerator(1)


@pytest.fixture
def scripts(monkeypatch, untied_directory):
    """Both suites of whole scripts on the tiny model and short windows, in front of what runs the scripts."""
    for name in ("CONTEXT", "COUNT"):
        monkeypatch.setattr(memory_suite, name, {"CONTEXT": 24, "COUNT": 2}[name])
    for suite in (memory_suite, end_to_end_suite):
        monkeypatch.setattr(suite, "_MODELS", SimpleNamespace(value=[str(untied_directory)]))
        monkeypatch.setattr(suite, "_POLICY", SimpleNamespace(value="uniform"))
    monkeypatch.setattr(memory_suite, "_ENCODERS", SimpleNamespace(value=["best", "compensated"]))
    monkeypatch.setattr(synthetic, "_FOLDER", SimpleNamespace(value=None))
    return lambda run: monkeypatch.setattr(watched, "run", run)


TOOK = watched.Took(7_000_000_000, 2.0, 3, 0.5, {"forward": 1.0}, {"forward": 1.5})


def test_memory_suite_runs_every_script(scripts, call, untied_directory):
    """But the second export, which differs by a flag and takes longest."""

    def run(name, *arguments, settings=None):
        assert "--encoder=compensated" in arguments or call(name, *arguments)[0] == 0
        return TOOK

    scripts(run)
    rows = memory_suite.memory(1)["rows"]
    assert [row["command"].split()[0] for row in rows] == ["allocate", "export", "export", "evaluate"]
    size = sum(file.stat().st_size for file in untied_directory.iterdir())
    for row in rows:
        assert (row["peak_gb"], row["sweeps"]) == (7.0, {"forward": 1.0})
        assert row["peak_over_checkpoint"] == pytest.approx(7e9 / size)


def test_end_to_end_suite_takes_turns_with_llama_cpp(scripts, monkeypatch):
    """From nothing compiled on: scripts in one new cache, llama.cpp on the tokens of their calibration."""
    runs, passes = [], []

    def run(name, *arguments, settings):
        cache = Path(settings["JAX_COMPILATION_CACHE_DIR"])
        runs.append((name, [argument for argument in arguments if "encoder" in argument], cache.exists()))
        cache.mkdir(exist_ok=True)
        return TOOK

    scripts(run)
    forward, quantize = end_to_end_suite._forward, end_to_end_suite.quantize
    types = []

    def mixed(source, output, mix, importance):
        types.append(mix_types(source, mix, importance))
        return quantize(source, output, mix, importance)

    monkeypatch.setattr(end_to_end_suite, "_forward", lambda source, ids: passes.append(ids) or forward(source, ids))
    monkeypatch.setattr(end_to_end_suite, "quantize", mixed)
    (row,) = end_to_end_suite.end_to_end(1)["rows"]
    turn = [("allocate", [])] + [("export_gguf", [f"--encoder={encoder}"]) for encoder in ("best", "compensated")]
    assert runs == [(*step, i > 0) for i, step in enumerate(turn * 2)]
    assert [ids.shape for ids in passes] == [(2, 24)] * 2
    assert set(types[0].values()) >= {"Q5_0", "Q8_0"}
    theirs = row["llama.cpp forward"] + row["llama.cpp quantize"]
    for how in ("best", "compensated"):
        assert row[f"{how} over llama.cpp"] == pytest.approx((row["allocate"] + row[how]) / theirs)


def test_devices_suite_compares_every_mesh_with_the_first(scripts, monkeypatch):
    """The scripts write what the mesh says: here the second one's file and loss differ."""
    forced = []

    def run(name, *arguments, settings):
        flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        forced.append((flags["mesh"], settings["XLA_FLAGS"].split("=")[-1]))
        other = flags["mesh"] == "4x2"
        if name == "allocate":
            sizes = {"file_bytes": 100, "linear_bpw": 8.5, "file_bpw": 9.0, "code_bits": 8.0}
            Path(flags["output"]).write_text(json.dumps(sizes | {"formats": {"a": "Q8_0"}, "folding": {}}))
        elif name == "export_gguf":
            Path(flags["output"]).write_bytes(b"other" if other else b"one")
        else:
            assert Path(flags["model"]).name == "model.gguf"
            Path(flags["json"]).write_text(json.dumps({"nll": 2.5 if other else 2.0, "kld": 1.0}))
        return TOOK

    scripts(run)
    monkeypatch.setattr(devices_suite, "_MODEL", SimpleNamespace(value="ref-llama"))
    monkeypatch.setattr(devices_suite, "_MESHES", SimpleNamespace(value=["1x1", "4x2"]))
    first, second = devices_suite.devices(1)["rows"]
    assert forced == [("1x1", "1")] * 3 + [("4x2", "8")] * 3
    assert [first[f"{name} equal"] for name in ("formats", "folding", "file")] == [True] * 3
    assert [second[f"{name} equal"] for name in ("formats", "folding", "file")] == [True, True, False]
    assert (first["nll difference"], second["nll difference"], second["kld difference"]) == (0, 0.5, 0)


def test_scripts_are_watched_in_processes_of_their_own(untied_directory):
    """What they hold, not what this process does; sweeps by what they are called; and why one fails."""
    took = watched.run("evaluate", f"--model={untied_directory}", "--context=24", "--count=2")
    assert 10**8 < took.peak_bytes < 10**9
    assert took.sweeps == {"forward": pytest.approx(1.0)}
    assert took.sweep_seconds["forward"] > 0
    assert took.compile_seconds > 0
    assert took.programs > 0
    with pytest.raises(RuntimeError, match=r"launch/nothing\.py --a=1 failed: (.|\n)*No such file"):
        watched.run("nothing", "--a=1")


def test_made_checkpoint_has_the_shapes_that_are_published(monkeypatch, tmp_path):
    """In shards, with as many layers as are asked for, gains 1 whatever the family stores, and text is read."""
    config = tiny.family_model("gemma3").config.to_dict()
    monkeypatch.setattr(synthetic, "MODELS", {"owner/Made": Published(0, config)})
    monkeypatch.setattr(synthetic, "KNOWN", {"made": "owner/Made"})
    monkeypatch.setattr(synthetic, "_FOLDER", SimpleNamespace(value=None))
    monkeypatch.setattr(synthetic, "_LAYERS", SimpleNamespace(value=2))
    path = synthetic.checkpoint("made", tmp_path)
    model, published = load_model(path), spec_from_hf(config)
    assert model.spec == dataclasses.replace(published, n_layers=2, windowed=published.windowed[:2])
    assert len(list(Path(path).glob("*.safetensors"))) == 4
    assert model.tokenizer.decode(model.tokenizer.encode("A text.")) == "A text."
    for tensor in tensors(model.spec):
        values = np.asarray(lookup(model.params, tensor))
        if tensor.weight.kind == "gain":
            np.testing.assert_array_equal(values, 1)
        else:
            assert values.std() == pytest.approx(0.02, rel=0.05)
    monkeypatch.setattr(synthetic, "write_checkpoint", None)
    assert synthetic.checkpoint("made", tmp_path) == path
    assert synthetic.checkpoint("ref-llama", tmp_path) == "ref-llama"
