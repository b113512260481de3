"""What sets families apart, what their configs may not ask for, and every step of the way on Qwen3 and Gemma."""

import dataclasses
import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ramp_jax import data
from ramp_jax.allocation import Allocation, from_levels
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.models import allocatable, load_model, tensors
from ramp_jax.models.metadata import plain
from ramp_jax.models.spec import spec_from_hf
from ramp_jax.policy.embedding import embed
from ramp_jax.quantization import calibrate, fake_quantize, fold
from ramp_jax.scoring.perplexity import evaluate
from ramp_jax.sensitivity.exact import exact_sensitivity
from ramp_jax.sensitivity.fisher import fisher_sensitivity

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FAMILIES = ("qwen3", "gemma")
ARCHITECTURES = {"qwen3": gguf.MODEL_ARCH.QWEN3, "gemma": gguf.MODEL_ARCH.GEMMA}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, tmp_path_factory):
    """A tiny random model of the family, f32."""
    return load_model(str(tiny.save(tiny.family_model(family), tmp_path_factory.mktemp("hf") / family)))


@pytest.fixture(scope="module")
def windows(model):
    return data.windows("builtin", model.tokenizer, context=24, count=3)


@pytest.fixture(scope="module")
def stats(model, windows):
    return calibrate(model, windows)


def test_what_sets_the_families_apart(family, model):
    attention, mlp = model.spec.blocks[0].sub_blocks
    switches = (attention.qk_norm, mlp.activation, model.spec.embedding_scale, model.spec.tied)
    assert switches == {"qwen3": ("heads", "silu", 1.0, False), "gemma": (None, "gelu_tanh", 96.0**0.5, True)}[family]
    assert (model.spec.architecture, model.spec.head_size) == (family, 32)


def test_llama_cpp_agrees(model, windows, tmp_path):
    export_gguf(model, Allocation.uniform(model, "F32"), tmp_path / "out.gguf")
    ours = evaluate(model, windows, protocol="sliding")
    theirs = evaluate_gguf(tmp_path / "out.gguf", windows, reference=model, protocol="sliding")
    assert theirs.ppl == pytest.approx(ours.ppl, rel=1e-3)
    np.testing.assert_allclose(theirs.nll, ours.nll, atol=0.05)
    assert theirs.mean_kld < 1e-4


def test_llama_cpp_agrees_on_a_folded_mixture(model, stats, windows, tmp_path, rng):
    folded = fold(model, stats, 4)
    allocation = from_levels(folded, rng.choice((5, 8), len(allocatable(model.spec))))
    export_gguf(model, allocation, tmp_path / "out.gguf")
    ours = evaluate(folded, windows, params=fake_quantize(folded, allocation), protocol="sliding")
    theirs = evaluate_gguf(tmp_path / "out.gguf", windows, protocol="sliding")
    assert theirs.ppl == pytest.approx(ours.ppl, rel=0.02)


def test_folding_keeps_the_function(model, stats, windows):
    folded = fold(model, stats, 4, alphas=(0.3, 0.5), betas=(0.0,))  # without the candidate that leaves all as it is
    assert all(float(jnp.ptp(s)) > 0 for s in folded.folding.values())
    np.testing.assert_allclose(folded.logits(windows), model.logits(windows), atol=1e-3, rtol=0)


def test_policy_s_view_is_finite_and_every_tensor_differs(model, stats):
    seen = embed(model, stats)
    assert seen.shape == (len(allocatable(model.spec)), 11)
    assert np.isfinite(seen).all()
    assert len(np.unique(seen.round(4), axis=0)) == len(seen)


def test_sensitivity_is_what_quantizing_one_tensor_costs(model, windows):
    chosen = [t.name for t in allocatable(model.spec)][:3]
    assert chosen[0] == "token_embd.weight"
    table = exact_sensitivity(model, windows, (4,), "sliding", tensors=chosen)
    for name, (cost,) in zip(table.tensors, table.kld, strict=True):
        allocation = Allocation.uniform(model, "F32")
        allocation = dataclasses.replace(allocation, formats={**allocation.formats, name: "IQ4_NL"})
        changed = fake_quantize(model, allocation)
        expected = evaluate(model, windows, params=changed, reference=model, protocol="sliding").mean_kld
        assert cost == pytest.approx(expected, rel=1e-3), name


def test_fisher_is_near_the_exact_table(model, windows):
    """At level 8, where the second order is all there is; embeddings and their scale included."""
    exact = exact_sensitivity(model, windows, (8,), "sliding").kld[:, 0]
    estimate = fisher_sensitivity(model, windows, (8,), "sliding", probes=16).kld[:, 0]
    ratio = estimate / exact
    assert np.median(ratio) == pytest.approx(1.0, abs=0.3)
    assert 0.4 < ratio[0] < 2.5


def test_gains_are_stored_without_one_by_gemma_only(model, family):
    offsets = {t.name: model.spec.family.hf_offset(t) for t in tensors(model.spec)}
    inside = ["attn_norm", "ffn_norm"] + ["attn_q_norm", "attn_k_norm"] * (family == "qwen3")
    norms = {"output_norm.weight"} | {f"blk.{layer}.{norm}.weight" for layer in range(3) for norm in inside}
    assert {name for name in offsets if "norm" in name} == norms
    assert {name: offset for name, offset in offsets.items() if offset} == (
        dict.fromkeys(norms, 1.0) if family == "gemma" else {}
    )


def test_only_llama_permutes_rows_and_only_those_that_turn(model, untied):
    assert not any(model.spec.family.permuted_heads(t) for t in tensors(model.spec))
    heads = {t.name: n for t in tensors(untied.spec) if (n := untied.spec.family.permuted_heads(t))}
    assert heads == {f"blk.{i}.attn_{kind}.weight": n for i in range(3) for kind, n in (("q", 4), ("k", 2))}


def test_untied_gemma_is_refused(tmp_path):
    config = tiny.family_model("gemma").config.to_dict() | {"architectures": ["GemmaForCausalLM"]}
    with pytest.raises(ValueError, match="cannot run a gemma model with a head of its own"):
        spec_from_hf(config | {"tie_word_embeddings": False})


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3", {"use_sliding_window": True}, "attention in sliding windows"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma", {"hidden_activation": "gelu"}, "activation 'gelu'"),
    ],
)
def test_config_asks_for_what_the_decoder_does_not_compute(tmp_path, family, change, message):
    tiny.family_model(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        spec_from_hf(config | change)


def test_defaults_that_older_configs_leave_out():
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
    shared = sizes | {"vocab_size": 10, "max_position_embeddings": 8, "num_key_value_heads": 1}
    gemma = spec_from_hf(shared | {"architectures": ["GemmaForCausalLM"]})
    assert (gemma.head_size, gemma.tied) == (256, True)
    qwen3 = spec_from_hf(shared | {"architectures": ["Qwen3ForCausalLM"]})
    assert (qwen3.head_size, qwen3.tied) == (128, False)


def test_metadata_is_of_the_architecture(model, family):
    assert plain(model.metadata)["general.architecture"] == family
    assert not any(name.startswith("llama.") for name in model.metadata)
