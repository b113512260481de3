"""A family that nobody knows, defined here alone, through every stage: biases, a norm after the sub-block, another
order of matrices, two kinds of layers in turn."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from ramp_jax import data
from ramp_jax.allocation import Allocation, costs, from_levels
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import allocatable, load_model, lookup, tensors
from ramp_jax.models.attention import Attention
from ramp_jax.models.families import FAMILIES, HF_NAMES, Family
from ramp_jax.models.layers import gain, linear, linear_weights, norm
from ramp_jax.models.layout import Activation, Block, SubBlock, foldable, pass_on
from ramp_jax.models.spec import spec_from_hf
from ramp_jax.policy.embedding import embed
from ramp_jax.policy.inference import allocate, find_allocator, load_policy
from ramp_jax.quantization import (
    Encoder,
    calibrate,
    calibrate_and_fold,
    fake_quantize,
    importance_of,
    make_encoder,
    refold,
)
from ramp_jax.scoring import variants
from ramp_jax.scoring.perplexity import evaluate
from ramp_jax.sensitivity.exact import exact_sensitivity
from ramp_jax.sensitivity.fisher import fisher_sensitivity

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LEVELS = (4.0, 5.0, 8.0)


# ---- the family --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class PlainMlp(SubBlock):
    """down(relu(up(x)) + bias) + bias, down stored before up, a norm after it and none before."""

    name: ClassVar[str] = "ffn"
    d_model: int
    d_ff: int
    eps: float

    @property
    def weights(self):
        d, f = self.d_model, self.d_ff
        return (
            *linear_weights("ffn_down", (d, f), "ffn_mid", 6 / 7, biased=True, writes=True),
            *linear_weights("ffn_up", (f, d), "ffn_in", 5 / 7, biased=True),
            *gain("post_ffw_norm", d),
        )

    @property
    def activations(self):  # relu(s · x) = s · relu(x) for s > 0, so the rows of up do scale what down reads
        return Activation("ffn_in", self.d_model), Activation("ffn_mid", self.d_ff, "ffn_up")

    @property
    def inner(self):
        return self.d_ff

    def __call__(self, w, x, tap=pass_on):
        h = tap("ffn_mid", jax.nn.relu(linear(tap("ffn_in", x), w["ffn_up"])))
        return x + tap("ffn_out", norm(linear(h, w["ffn_down"]), w, "post_ffw_norm", self.eps))


def toy_blocks(spec):
    sizes = (spec.d_model, spec.n_heads, spec.n_kv_heads, spec.head_size, spec.norm_eps)
    mlp = PlainMlp(spec.d_model, spec.d_ff, spec.norm_eps)
    turning = Attention(*sizes, spec.rope, biased=("attn_q", "attn_k", "attn_v"))
    still = Attention(*sizes, None, norm=None, post_norm="post_attention_norm")
    return tuple(Block((still if layer % 2 else turning, mlp)) for layer in range(spec.n_layers))


NAMES = {"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2", "post_ffw_norm": "mlp_norm", "post_attention_norm": "attn_norm"}
TOY = Family("ToyForCausalLM", blocks=toy_blocks, hf_names={**HF_NAMES, **NAMES}, permuted_rope=True)
# ---- the end of the family ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Loaded from a Hugging Face directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "toy", TOY)
        path = tmp_path_factory.mktemp("hf") / "toy"
        tiny.builtin_tokenizer().save_pretrained(path)
        config = dict.fromkeys(("hidden_size", "intermediate_size"), 64) | {"num_hidden_layers": 4, "head_dim": 16}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "rms_norm_eps": 1e-6}
        config |= {"max_position_embeddings": 256, "tie_word_embeddings": False, "architectures": ["ToyForCausalLM"]}
        (path / "config.json").write_text(json.dumps(config))
        spec = spec_from_hf(config)
        rng = np.random.default_rng(3)
        values = {
            TOY.hf_name(t): rng.normal(float(t.weight.kind == "gain"), 0.2, t.shape).astype(np.float32)
            for t in tensors(spec)
        }
        save_file(values, path / "model.safetensors")
        yield load_model(str(path))


@pytest.fixture(scope="module")
def windows(toy):
    return data.windows("builtin", toy.tokenizer, context=24, count=4)


@pytest.fixture(scope="module")
def stats(toy, windows):
    return calibrate(toy, windows)


@pytest.fixture(scope="module")
def folded(toy, windows):
    return calibrate_and_fold(toy, windows, 4)[0]


def by_hand(model, ids):
    """The logits of one window in NumPy, f64."""
    f64 = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)
    x = f64["token_embd"]["weight"][ids]

    def rms(x, module):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * module["weight"]

    def project(x, module):
        return x @ module["weight"].T + module.get("bias", 0.0)

    angle = np.arange(len(ids))[:, None] * 10000.0 ** (-np.arange(8) / 8)

    def turn(x):
        a, b = x[..., :8], x[..., 8:]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    for layer in range(4):
        w = f64["blk"][layer]
        h = x if layer % 2 else rms(x, w["attn_norm"])
        q, k, v = (project(h, w[f"attn_{n}"]).reshape(len(ids), -1, 16) for n in "qkv")
        if not layer % 2:
            q, k = turn(q), turn(k)
        k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
        scores = np.einsum("tnh,snh->nts", q, k) / 4
        scores = np.where(np.tril(np.ones(scores.shape[1:])), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", p / p.sum(-1, keepdims=True), v).reshape(len(ids), -1)
        y = project(mixed, w["attn_output"])
        x = x + (rms(y, w["post_attention_norm"]) if layer % 2 else y)
        x = x + rms(project(np.maximum(project(x, w["ffn_up"]), 0), w["ffn_down"]), w["post_ffw_norm"])
    return rms(x, f64["output_norm"]) @ f64["output"]["weight"].T


def test_the_decoder_computes_it(toy, windows):
    np.testing.assert_allclose(toy.logits(windows[:1])[0], by_hand(toy, windows[0]), atol=2e-4)


def test_the_family_is_shorter_than_sixty_lines():
    text = Path(__file__).read_text(encoding="utf-8").split("# ----")
    assert 20 < text[1].count("\n") < 60


def test_folding_keeps_the_function(toy, folded, windows):
    assert set(folded.folding) == set(foldable(toy.spec))
    assert {name.split(".")[2] for name in folded.folding} == {"attn_in", "attn_mid", "ffn_mid"}
    assert "blk.1.attn_in" not in folded.folding  # no norm before it that could make up for scales
    np.testing.assert_allclose(folded.logits(windows), toy.logits(windows), atol=2e-4)


def test_scales_move_through_norms_rows_and_biases(toy, windows):
    rng = np.random.default_rng(4)
    scales = {name: np.exp(rng.normal(0, 1, a.width)) for name, a in foldable(toy.spec).items()}
    scales = {n: np.asarray(foldable(toy.spec)[n].share(jnp.asarray(s, jnp.float32))) for n, s in scales.items()}
    other = refold(toy, scales)
    np.testing.assert_allclose(other.logits(windows), toy.logits(windows), atol=1e-3)
    for bias in ("attn_v", "ffn_up"):
        assert np.abs(np.asarray(other.params["blk"][0][bias]["bias"] / toy.params["blk"][0][bias]["bias"])).max() > 2


def test_the_estimate_sees_what_is_measured(folded, windows):
    estimate = fisher_sensitivity(folded, windows, LEVELS, "sliding", probes=64)
    exact = exact_sensitivity(folded, windows, LEVELS, "sliding")
    ratio = estimate.kld[:, 2] / exact.kld[:, 2]  # where changes are small, the second order is all
    assert 0.8 < np.median(ratio) < 1.25
    assert np.corrcoef(np.log(estimate.kld[:, 2]), np.log(exact.kld[:, 2]))[0, 1] > 0.9


def test_embeddings_are_finite_and_tell_its_matrices_apart(folded, stats):
    rows = embed(folded, stats, np.full(len(allocatable(folded.spec)), 0.01))
    assert rows.shape == (4 * 6 + 2, 11)
    assert np.isfinite(rows).all()
    assert len(np.unique(rows.round(5), axis=0)) == len(rows)


@pytest.fixture(scope="module")
def allocation(folded, stats):
    """What the estimate of single matrices and of pairs chooses."""
    table = costs(folded, LEVELS)
    budget = (table.smallest + table.largest) // 2
    found = allocate(find_allocator("fisher", levels=LEVELS), folded, stats, budget_bytes=budget)
    assert 0.9 * budget < found.file_bytes <= budget
    return found


def test_a_policy_of_other_models_allocates_for_it(folded, stats):
    budget = Allocation.uniform(folded, "Q5_0").file_bytes
    found = allocate(load_policy("pretrained"), folded, stats, budget_bytes=budget)
    assert 0.9 * budget < found.file_bytes <= budget
    assert len(set(found.formats.values())) > 1


@pytest.mark.parametrize("rounding", ["reference", "best", "compensated"])
def test_what_is_evaluated_is_what_is_exported(toy, folded, stats, windows, allocation, tmp_path, rounding):
    encoder = Encoder(rounding, importance_of(toy.spec, stats))
    if rounding == "compensated":
        encoder = make_encoder(rounding, windows, importance=encoder.importance)
    size = export_gguf(folded, allocation, tmp_path / "toy.gguf", encoder)
    assert size == allocation.file_bytes == (tmp_path / "toy.gguf").stat().st_size
    assert len(set(allocation.formats.values())) > 1
    params, read = fake_quantize(folded, allocation, encoder), load_model(str(tmp_path / "toy.gguf"))
    for tensor in tensors(toy.spec):
        np.testing.assert_array_equal(lookup(params, tensor), lookup(read.params, tensor), err_msg=tensor.name)
    scored = evaluate(read, windows, reference=toy)
    assert 0 < scored.mean_kld < 0.5


def test_variants_agree_with_the_forward_pass(toy, folded, windows):
    choices = variants.prepare(folded, toy, windows, costs(folded, LEVELS))
    actions = np.arange(len(allocatable(toy.spec))) % 3
    params = fake_quantize(folded, from_levels(folded, [LEVELS[a] for a in actions]))
    found = evaluate(folded, windows, params=params, reference=toy).mean_kld
    np.testing.assert_allclose(variants.mean_kld(choices, jnp.asarray(actions)), found, rtol=1e-3)
