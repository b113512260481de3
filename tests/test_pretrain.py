"""Pretraining: the loss and its batches by hand, learning, the same weights from the same seed, resume to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ramp_jax import checkpoint, pretrain
from ramp_jax.models import lookup, tensors
from ramp_jax.models.decoder import logits
from ramp_jax.models.families import FAMILIES
from ramp_jax.models.layout import nest
from ramp_jax.models.spec import make_spec
from ramp_jax.pretrain import OptimizerConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SIZES = {
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_size": 16,
    "d_ff": 64,
    "vocab_size": 11,
    "context_length": 24,
    "rope_theta": 10000.0,
    "norm_eps": 1e-6,
    "tied": True,
}
CONFIG = OptimizerConfig(
    steps=40, batch_size=4, learning_rate=0.01, warmup=2, steps_per_call=10, calls_per_checkpoint=1
)


MORE = {
    "gemma2": {"attention_cap": 50.0, "final_cap": 30.0, "window": 8, "windowed": (True, False)},
    "olmo2": {"tied": False},
}
"""What a spec of a family has to say beyond the sizes."""


def spec_of(family):
    return make_spec(family, **SIZES | MORE.get(family, {}))


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Optax raises a float to an integer power, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def windows():
    """Counting up by 1, 2 or 3: what comes next can be known from what came before."""
    rng = np.random.default_rng(0)
    start, stride = rng.integers(0, 11, (30, 1)), rng.integers(1, 4, (30, 1))
    return ((start + stride * np.arange(17)[None]) % 11).astype(np.int32)


@pytest.fixture(scope="module")
def trained(windows):
    """Parameters after an uninterrupted run of seed 0, and what it logged."""
    rows = []
    return pretrain.run(jax.random.key(0), spec_of("llama"), CONFIG, windows, log=rows.append), rows


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)))


@pytest.mark.parametrize("rows", [1024, 7])  # one chunk of logits, and chunks that do not divide the tokens
def test_loss_is_the_mean_nll_of_all_tokens_but_the_first(windows, monkeypatch, rows):
    monkeypatch.setattr(pretrain, "_LOGIT_ROWS", rows)
    monkeypatch.setattr(pretrain.jnp, "bfloat16", jnp.float32)
    spec = spec_of("llama")
    params = pretrain.init_params(jax.random.key(0), spec)
    ids = windows[:3]
    log_p = jax.nn.log_softmax(logits(spec, params, ids[:, :-1]))
    expected = -np.take_along_axis(np.asarray(log_p), ids[:, 1:, None], axis=-1).mean()
    assert jax.jit(pretrain.loss, static_argnums=0)(spec, params, ids) == pytest.approx(expected, rel=1e-5)


def test_gradient_is_that_of_f32_within_bf16(windows):
    spec = spec_of("qwen3")
    params = pretrain.init_params(jax.random.key(0), spec)

    @jax.jit
    @jax.grad
    def exact(params):
        log_p = jax.nn.log_softmax(logits(spec, params, windows[:4, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_p, windows[:4, 1:, None], axis=-1))

    ours = jax.jit(jax.grad(pretrain.loss, argnums=1), static_argnums=0)(spec, params, windows[:4])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact(params)), strict=True):
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights(family):
    spec = dataclasses.replace(spec_of(family), d_model=128, d_ff=256, vocab_size=1000)
    params = pretrain.init_params(jax.random.key(0), spec)
    assert jax.tree.map(jnp.shape, params) == nest((t, t.shape) for t in tensors(spec))
    blk = tiny.stacked(params)
    q, gate = ("attn_qkv", "ffn_up") if spec.family.fused else ("attn_q", "ffn_gate")
    assert float(blk[q].std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(blk["ffn_up"].std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(blk["attn_output"].std()) == pytest.approx(32**-0.5 / 2, rel=0.05)
    assert float(blk["ffn_down"].std()) == pytest.approx(256**-0.5 / 2, rel=0.05)
    assert float(params["token_embd"]["weight"].std()) == pytest.approx(0.02, rel=0.05)
    wider = pretrain.init_params(jax.random.key(0), dataclasses.replace(spec, tied=False), 0.1)
    assert float(wider["token_embd"]["weight"].std()) == pytest.approx(0.1, rel=0.05)
    assert float(wider["output"]["weight"].std()) == pytest.approx(0.02, rel=0.05)
    for tensor in tensors(spec):
        if "norm" in tensor.name:
            assert (lookup(params, tensor) == 1).all()
    assert not (blk[gate][0] == blk[gate][1]).any()
    halves = np.split(blk["ffn_up"], 2, axis=1) if spec.family.fused else (blk["ffn_gate"], blk["ffn_up"])
    assert not (halves[0] == halves[1]).any()
    k, v = np.split(blk[q][:, -32:], 2, axis=1) if spec.family.fused else (blk["attn_k"], blk["attn_v"])
    assert not (k == v).any()


def test_every_epoch_sees_every_window_once(windows):
    key, size = jax.random.key(3), 5
    epochs = [
        np.concatenate([pretrain.batch(key, jnp.int32(6 * epoch + i), windows, size) for i in range(6)])
        for epoch in range(2)
    ]
    for epoch in epochs:
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, windows))
    assert (epochs[0] != epochs[1]).any()


def test_learns(trained):
    _, rows = trained
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[0]["loss"] == pytest.approx(np.log(11), abs=0.4)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_same_seed_same_weights(windows, trained):
    again = pretrain.run(jax.random.key(0), spec_of("llama"), CONFIG, windows)
    assert same(again, trained[0])
    other = pretrain.run(jax.random.key(1), spec_of("llama"), CONFIG, windows)
    assert not same(other, trained[0])


def test_resume_equals_uninterrupted_bit_for_bit(windows, trained, tmp_path):
    """Stopped by an error after its second call, of which the first was saved."""
    path, seen = tmp_path / "state", []

    def stop(row):
        seen.append(row["step"])
        if row["step"] == 20:
            raise KeyboardInterrupt

    key, spec = jax.random.key(0), spec_of("llama")
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(key, spec, CONFIG, windows, log=stop, checkpoint_path=path)
    params = pretrain.run(key, spec, CONFIG, windows, log=lambda row: seen.append(row["step"]), checkpoint_path=path)
    assert seen == [10, 20, 20, 30, 40]
    assert same(params, trained[0])
    finished = pretrain.run(key, spec, CONFIG, windows, log=seen.append, checkpoint_path=path)
    assert same(finished, params)
    assert len(seen) == 5


def test_checkpoint_of_another_run(windows, tmp_path):
    checkpoint.save(tmp_path / "state", {"x": jnp.zeros(3)})
    with pytest.raises(ValueError, match="not a checkpoint of this run"):
        pretrain.run(jax.random.key(0), spec_of("llama"), CONFIG, windows, checkpoint_path=tmp_path / "state")


@pytest.mark.parametrize("family", FAMILIES)
def test_gains_do_not_decay(family):
    """With no gradient, AdamW only decays: matrices shrink and gains stay."""
    spec = spec_of(family)
    params = pretrain.init_params(jax.random.key(0), spec)
    chain = pretrain.optimizer(spec, dataclasses.replace(CONFIG, warmup=0))
    updates, _ = chain.update(jax.tree.map(jnp.zeros_like, params), chain.init(params), params)
    for tensor in tensors(spec):
        decay = 0.0 if "norm" in tensor.name else 0.01 * 0.1
        expected = -decay * np.asarray(lookup(params, tensor))
        np.testing.assert_allclose(lookup(updates, tensor), expected, rtol=1e-5, err_msg=tensor.name)


def test_learning_rate_rises_and_falls_to_a_tenth():
    rates, spec = [], spec_of("llama")
    params = nest((t, jnp.ones(t.shape)) for t in tensors(spec))
    chain = pretrain.optimizer(spec, dataclasses.replace(CONFIG, weight_decay=1.0))
    state = chain.init(params)
    for _ in range(CONFIG.steps + 1):
        updates, state = chain.update(jax.tree.map(jnp.zeros_like, params), state, params)
        rates.append(-float(updates["blk"][1]["ffn_up"]["weight"][0, 0]))
    assert rates[0] == 0
    assert max(rates) == pytest.approx(0.01)
    assert rates.index(max(rates)) == CONFIG.warmup
    assert rates[-1] == pytest.approx(0.001)


def test_text_that_is_too_short(windows):
    with pytest.raises(ValueError, match="holds 3 windows of 17 tokens, fewer than a batch of 4"):
        pretrain.run(jax.random.key(0), spec_of("llama"), CONFIG, windows[:3])


def test_loss_that_is_not_finite(windows):
    wild = dataclasses.replace(CONFIG, learning_rate=1e30, warmup=0)
    with pytest.raises(ValueError, match=r"not finite after step \d+; lower the learning rate"):
        pretrain.run(jax.random.key(0), spec_of("llama"), wild, windows)
