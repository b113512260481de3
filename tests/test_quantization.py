"""Calibration against transformers' activations, Scale Folding, and fake-quantization against gguf-py."""

import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from tiny import GROUPS, changed, stacked, with_blocks

from ramp_jax import sweep
from ramp_jax.allocation import Allocation, from_levels
from ramp_jax.formats import format_for, get_format
from ramp_jax.halo import libggml
from ramp_jax.models import allocatable, lookup, tensors
from ramp_jax.models.decoder import embed
from ramp_jax.models.layout import foldable
from ramp_jax.quantization import calibrate, calibrate_and_fold, fake_quantize, fold, refold
from ramp_jax.quantization.calibrate import Moments
from ramp_jax.quantization.compensate import inputs_of, read_by
from ramp_jax.quantization.fold import ALPHAS, BETAS

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def ggml_round_trip(w, name):
    return libggml.dequantize(name, libggml.quantize(name, np.asarray(w)))


READ = {"attn_in": 64, "attn_mid": (2, 2, 16), "ffn_in": 64, "ffn_mid": 96}
"""Channels that are read: with two query heads per key/value head, those of attention are read twice."""


@pytest.fixture(scope="module")
def outliers(untied):
    """The function of the untied model with a few channels of every folded activation thirty times as loud."""
    loud = {"attn_in": np.ones(64), "attn_mid": np.ones((2, 1, 16)), "ffn_in": np.ones(64), "ffn_mid": np.ones(96)}
    for channels in loud.values():
        channels[..., [5, 11, 14]] = 30.0
    blk = stacked(untied.params)
    for tap, (producer, readers) in GROUPS.items():
        written, read = np.float32(loud[tap].reshape(-1)), np.float32(np.broadcast_to(loud[tap], READ[tap]).reshape(-1))
        blk[producer] = blk[producer] * (written if blk[producer].ndim == 2 else written[:, None])
        blk |= {name: blk[name] / read for name in readers}
    return with_blocks(untied, **{name: jnp.asarray(w) for name, w in blk.items()})


def per_layer(values):
    """`[3, ...]` by what can be folded, from a mapping by full name."""
    return {tap: np.stack([np.asarray(values[f"blk.{layer}.{tap}"]) for layer in range(3)]) for tap in GROUPS}


@pytest.fixture(scope="module")
def stats(outliers, windows):
    return calibrate(outliers, windows)


@pytest.fixture(scope="module")
def folded(outliers, stats):
    return fold(outliers, stats, level=4)


def torch_activations(tied, windows):
    """By full name, what transformers computes there: `[tokens, C]`."""
    model, seen = tiny.hf_model(tied), {}

    def note(name, x):
        assert name not in seen
        seen[name] = x.reshape(-1, x.shape[-1]).numpy()

    handles = [model.lm_head.register_forward_pre_hook(lambda _, args: note("head_in", args[0]))]
    for index, layer in enumerate(model.model.layers):
        at = f"blk.{index}."
        handles.append(layer.register_forward_pre_hook(lambda _, args, at=at: note(at + "residual", args[0])))
        for module, tap_in, tap_out in (
            (layer.self_attn.q_proj, "attn_in", None),
            (layer.self_attn.o_proj, "attn_mid", "attn_out"),
            (layer.mlp.gate_proj, "ffn_in", None),
            (layer.mlp.down_proj, "ffn_mid", "ffn_out"),
        ):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=at + tap_in: note(name, args[0])))
            if tap_out:
                handles.append(module.register_forward_hook(lambda _, args, out, name=at + tap_out: note(name, out)))
    with torch.no_grad():
        model(torch.from_numpy(windows.astype(np.int64)))
    for handle in handles:
        handle.remove()
    return seen


def test_moments_equal_those_of_transformers(model, windows):
    moments = calibrate(model, windows).moments
    activations = torch_activations(model.spec.tied, windows)
    assert set(moments) == set(activations)
    assert len(moments) == 3 * 7 + 1
    for name, x in activations.items():
        x = x.astype(np.float64)
        np.testing.assert_allclose(moments[name].square, (x**2).mean(axis=0), rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(moments[name].fourth, (x**4).mean(axis=0), rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(moments[name].abs_max, np.abs(x).max(axis=0), rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(moments[name].mean, x.mean(axis=0), rtol=1e-4, atol=1e-5, err_msg=name)


def test_statistics_keep_a_sample_of_the_text_and_know_their_folding(untied, folded, windows):
    long = np.tile(windows, (1, 3))
    np.testing.assert_array_equal(calibrate(untied, long).sample, long[:2, :64])
    assert calibrate(untied, windows).folding == {}
    assert calibrate(folded, windows).folding is folded.folding


def test_scaled_moments_are_those_of_scaled_activations(rng):
    x, s = rng.normal(size=(50, 8)), np.exp(rng.normal(size=8)) * np.where(np.arange(8) % 2, 1, -1)

    def moments(x):
        return Moments((x**2).mean(0), (x**4).mean(0), np.abs(x).max(0), x.mean(0))

    found = Moments(*(jnp.asarray(a, jnp.float32) for a in moments(x))).scaled(jnp.asarray(s, jnp.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, moments(x * s))


def test_order_of_windows_does_not_matter(untied, windows):
    there, back = calibrate(untied, windows), calibrate(untied, windows[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), there.moments, back.moments)


@pytest.mark.parametrize(
    ("module", "tap", "layer"),
    [("attn_norm", "attn_in", 1), ("attn_v", "attn_mid", 0), ("ffn_up", "ffn_mid", 1), ("ffn_down", "ffn_out", 2)],
)
@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_activation_that_is_not_finite_is_named_where_it_arises(untied, windows, module, tap, layer, bad):
    broken = changed(untied, f"blk.{layer}.{module}.weight", lambda w: jnp.full_like(w, bad))
    with pytest.raises(ValueError, match=f"activation {tap} of layer {layer} is not finite in calibration window 0"):
        calibrate(broken, windows)


def test_activation_that_is_not_finite_names_the_window(untied, windows):
    token = np.setdiff1d(windows[2], windows[:2])[0]
    broken = changed(untied, "token_embd.weight", lambda w: w.at[token].set(np.nan))
    with pytest.raises(ValueError, match="activation residual of layer 0 is not finite in calibration window 2"):
        calibrate(broken, windows)


def test_final_norm_that_is_not_finite(untied, windows):
    broken = changed(untied, "output_norm.weight", lambda w: w.at[0].set(np.inf))
    with pytest.raises(ValueError, match="activation head_in of the last layer is not finite"):
        calibrate(broken, windows)


def test_folding_leaves_logits_unchanged(outliers, folded, windows):
    assert list(folded.folding) == [f"blk.{layer}.{tap}" for layer in range(3) for tap in GROUPS]
    assert all(np.abs(np.log(folded.folding[f"blk.{layer}.attn_in"])).max() > 0.5 for layer in range(3))
    np.testing.assert_allclose(folded.logits(windows), outliers.logits(windows), atol=1e-4, rtol=0)


def test_folding_moves_scales_from_producers_into_readers(outliers, folded):
    """v and up are both: their columns follow their norm, their rows what reads them."""
    before, after, s = stacked(outliers.params), stacked(folded.params), per_layer(folded.folding)
    heads = s["attn_mid"].reshape(3, 2, 2, 16)
    np.testing.assert_array_equal(heads[:, :, 0], heads[:, :, 1])
    rows = {"attn_v": heads[:, :, 0].reshape(3, 32), "ffn_up": s["ffn_mid"]}
    for tap, (producer, readers) in GROUPS.items():
        if producer not in rows:
            np.testing.assert_allclose(after[producer] * s[tap], before[producer], rtol=1e-6)
        for name in readers:
            expected = before[name] * s[tap][:, None, :] / (rows[name][..., None] if name in rows else 1)
            np.testing.assert_allclose(after[name], expected, rtol=1e-6)
        np.testing.assert_allclose(np.exp(np.log(s[tap]).mean(axis=1)), 1.0, rtol=1e-5)


def objective(model, stats, tap, layer, s):
    """Activation-weighted squared error of a group's linears quantized under the scales `s`, by ggml and NumPy."""
    square = np.asarray(stats.moments[f"blk.{layer}.{tap}"].square)
    total = 0.0
    for name in GROUPS[tap][1]:
        w = np.asarray(model.params["blk"][layer][name]["weight"])
        rounded = libggml.dequantize("IQ4_NL", libggml.quantize("IQ4_NL", w * s, square / s**2))
        total += (((rounded / s - w) ** 2) * square).sum(dtype=np.float64)
    return total


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("tap", GROUPS)
def test_folding_takes_the_best_scale_of_the_grid(outliers, stats, folded, tap, layer):
    rms = np.sqrt(np.asarray(stats.moments[f"blk.{layer}.{tap}"].square))
    weights = np.concatenate([outliers.params["blk"][layer][name]["weight"] for name in GROUPS[tap][1]])
    magnitude = np.sqrt(np.square(weights).mean(axis=0))
    if tap == "attn_mid":
        rms, magnitude = (
            np.broadcast_to(np.sqrt(np.square(a.reshape(2, 2, 16)).mean(1, keepdims=True)), (2, 2, 16)).reshape(-1)
            for a in (rms, magnitude)
        )
    grid = []
    for alpha, beta in itertools.product(ALPHAS, BETAS):
        s = rms**alpha / magnitude**beta
        grid.append(objective(outliers, stats, tap, layer, (s / np.exp(np.log(s).mean())).astype(np.float32)))
    chosen = objective(outliers, stats, tap, layer, np.asarray(folded.folding[f"blk.{layer}.{tap}"]))
    assert ALPHAS[0] == BETAS[0] == 0.0
    assert chosen <= grid[0]
    assert chosen == pytest.approx(min(grid), rel=2e-3)


def test_grid_of_zero_alone_changes_nothing(outliers, stats):
    same = fold(outliers, stats, level=4, alphas=(0.0,), betas=(0.0,))
    jax.tree.map(np.testing.assert_array_equal, same.params, outliers.params)


def test_dead_channel_keeps_folding_finite(outliers, stats):
    names = [f"blk.{layer}.{tap}" for layer in range(3) for tap in GROUPS]
    dead = {name: (m := stats.moments[name])._replace(square=m.square.at[7].set(0.0)) for name in names}
    model = fold(outliers, dataclasses.replace(stats, moments=dead), level=4, alphas=(0.7,), betas=(0.3,))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((model.params, model.folding)))


def test_statistics_under_a_folding_are_those_of_the_folded_model(stats, folded, windows):
    predicted, measured = stats.under(folded.folding), calibrate(folded, windows)
    assert predicted.folding is folded.folding is measured.folding

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())  # means are sums that cancel

    jax.tree.map(close, predicted.moments, measured.moments)


def test_statistics_come_back_from_a_folding(stats, folded):
    back = stats.under(folded.folding).under({})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), back.moments, stats.moments)


def test_folding_again_multiplies_scales(outliers, stats, folded, windows):
    twice = fold(folded, stats, level=8)
    gains, scales = stacked(twice.params)["attn_norm"], per_layer(twice.folding)["attn_in"]
    np.testing.assert_allclose(gains * scales, stacked(outliers.params)["attn_norm"], rtol=1e-5)
    np.testing.assert_allclose(twice.logits(windows), outliers.logits(windows), atol=1e-4, rtol=0)


def test_folding_bf16_weights_keeps_dtypes(outliers, stats, windows):
    low = outliers.astype("bfloat16")
    folded = fold(low, calibrate(low, windows), level=4)
    assert jax.tree.map(lambda a: a.dtype, folded.params) == jax.tree.map(lambda a: a.dtype, low.params)
    difference = np.abs(folded.logits(windows) - low.logits(windows)).mean()
    assert difference < 0.02 * np.std(low.logits(windows))


def test_folding_at_a_level_that_is_masked(outliers, stats):
    with pytest.raises(ValueError, match="no level up to 3 can hold rows of 64 weights; fold at another level"):
        fold(outliers, stats, level=3)


def test_folding_takes_the_next_level_that_rows_can_hold(outliers, stats):
    """Rows of 64 have no level 4.5."""
    expected = fold(outliers, stats, level=4)
    found = fold(outliers, stats, level=4.5)
    jax.tree.map(np.testing.assert_array_equal, found.folding, expected.folding)


def test_folding_for_formats_by_row_length(outliers, stats):
    """As at the level that means them; without a format an activation stays as it is, and integers are folded for."""
    expected = fold(outliers, stats, level=4)
    found = fold(outliers, stats, lambda n_in: format_for(4, n_in) if n_in == 64 else None)
    assert {name.rpartition(".")[2] for name in found.folding} == {"attn_in", "attn_mid", "ffn_in"}
    for name, scales in found.folding.items():
        np.testing.assert_array_equal(scales, expected.folding[name])
    integers = fold(outliers, stats, lambda n_in: get_format("INT3_G32"))
    assert integers.folding.keys() == expected.folding.keys()
    formats = dict.fromkeys((tensor.name for tensor in allocatable(outliers.spec)), "INT3_G32")
    losses = []
    for model in (integers, outliers):
        w = fake_quantize(model, Allocation.of(model, formats))["blk"][0]["attn_q"]["weight"]
        off = w - model.params["blk"][0]["attn_q"]["weight"]
        square = stats.under(model.folding).moments["blk.0.attn_in"].square
        losses.append(float(jnp.sum(jnp.square(off) * square[None])))
    assert losses[0] < 0.7 * losses[1]


def test_activations_that_only_float_matrices_read_are_not_folded(odd, windows):
    """What nothing reads in blocks stays as it is, also where that is all there is."""
    found = fold(odd, calibrate(odd, windows), 4, alphas=(0.0, 0.5), betas=(0.0,))
    widths = {activation.width for name, activation in foldable(odd.spec).items() if name in found.folding}
    assert widths
    assert all(width % 32 == 0 for width in widths)
    np.testing.assert_allclose(found.logits(windows), odd.logits(windows), atol=2e-4)


def test_fake_quantized_weights_equal_those_of_ggml(model):
    allocation = from_levels(model, [(4, 5, 8)[i % 3] for i in range(len(allocatable(model.spec)))])
    params = fake_quantize(model, allocation)
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    for tensor in allocatable(model.spec):
        expected = ggml_round_trip(lookup(model.params, tensor), allocation.formats[tensor.name])
        np.testing.assert_array_equal(lookup(params, tensor), expected, err_msg=tensor.name)
    gains = [tensor for tensor in tensors(model.spec) if not tensor.allocatable]
    assert len(gains) == 2 * 3 + 1
    for tensor in gains:
        np.testing.assert_array_equal(lookup(params, tensor), lookup(model.params, tensor))


def test_f32_allocation_is_the_identity(model):
    plain = Allocation(model.spec, model.metadata, {t.name: "F32" for t in allocatable(model.spec)})
    jax.tree.map(np.testing.assert_array_equal, fake_quantize(model, plain), model.params)


def test_fake_quantization_keeps_dtypes(untied):
    low = untied.astype("bfloat16")
    params = fake_quantize(low, from_levels(low, [4] * 23))
    assert [leaf.dtype for leaf in jax.tree.leaves(params)] == [leaf.dtype for leaf in jax.tree.leaves(low.params)]


def second_moments(model, windows):
    """E[x xᵀ] `[L, C, C]` by tap, from transformers' activations."""
    return {tap: x.mT @ x / x.shape[1] for tap, x in per_layer(torch_activations(model.spec.tied, windows)).items()}


def test_full_second_moments_decide_by_the_error_of_the_outputs(untied, windows):
    """What is chosen loses no more than what the diagonal chooses, by the outputs' own error."""
    second, stats = second_moments(untied, windows), calibrate(untied, windows)
    lost = []
    for chosen in (calibrate_and_fold(untied, windows, 4)[0], fold(untied, stats, 4), untied):
        total, blk = 0.0, stacked(chosen.params)
        ones = {f"blk.{layer}.{tap}": np.ones(second[tap].shape[-1]) for layer in range(3) for tap in GROUPS}
        scales = per_layer({**ones, **chosen.folding})
        rows = {"attn_v": scales["attn_mid"].reshape(3, 2, 2, 16)[:, :, 0].reshape(3, 32), "ffn_up": scales["ffn_mid"]}
        for tap, (_, readers) in GROUPS.items():
            for name, layer in itertools.product(readers, range(3)):
                w, s = blk[name][layer], scales[tap][layer]
                square = np.asarray(stats.moments[f"blk.{layer}.{tap}"].square) / s**2
                off = (libggml.dequantize("IQ4_NL", libggml.quantize("IQ4_NL", w, square)) - w) / s
                off *= rows[name][layer][:, None] if name in rows else 1
                total += np.einsum("oi,ij,oj->", off, second[tap][layer], off)
        lost.append(total)
    assert lost[0] <= lost[1] * 1.001
    assert lost[0] < lost[2]


def test_scales_that_are_clipped_are_reported(outliers, stats, caplog):
    fold(outliers, stats, 4, alphas=(3.0,), betas=(0.0,))
    assert "scales of folding went beyond 64 and were clipped" in caplog.text


def test_folding_again_takes_what_was_folded_into_account(outliers, stats, folded, windows):
    """α and β of 0 are always there: a second search keeps or lowers the objective."""
    again = fold(folded, stats, 4, alphas=(0.0,), betas=(0.0,))
    jax.tree.map(np.testing.assert_array_equal, again.params, folded.params)


def test_folding_of_an_unknown_activation(untied):
    for name in ("head_in", "blk.3.attn_in", "blk.0.attn_out", "attn_in"):
        with pytest.raises(ValueError, match=f"the folding names {name}, which the model has not; make the allocation"):
            refold(untied, {"blk.0.attn_in": np.ones(64), name: np.ones(64)})


def test_folding_of_another_shape(untied):
    sentence = r"the folding of blk\.1\.ffn_mid has shape \(64,\), this model needs \(96,\); make the allocation again"
    with pytest.raises(ValueError, match=sentence):
        refold(untied, {"blk.1.ffn_mid": np.ones(64)})


def test_second_moments_equal_those_of_transformers(untied, windows, rng):
    expected = second_moments(untied, windows)
    x = embed(untied.spec, untied.params, windows)
    for at in sweep.forward(untied.spec, untied.params):
        for tap in GROUPS:
            found = inputs_of(at, x, at, x, tap)
            np.testing.assert_allclose(found.second, expected[tap][at.index], rtol=1e-3, atol=1e-4, err_msg=tap)
            np.testing.assert_array_equal(found.missed, 0)
            off = x + jnp.std(x) * rng.standard_normal(x.shape).astype(np.float32)
            read, wanted = (np.asarray(read_by(at, states, tap)).reshape(-1, len(found.second)) for states in (off, x))
            missed = inputs_of(at, off, at, x, tap).missed
            np.testing.assert_allclose(missed, (wanted - read).T @ read / len(read), rtol=1e-3, atol=1e-4, err_msg=tap)
            assert np.abs(missed - missed.T).max() > 0.01 * np.abs(missed).max()
        x = sweep.advance(at, x)


@pytest.mark.parametrize(("careful", "chosen"), [([1.0, 0.9], 2), ([1.0, 1.1], 0)])
def test_whether_to_fold_at_all_is_decided_as_files_are_rounded(monkeypatch, careful, chosen):
    """Coarse rounding prefers the third candidate; that it beats no folding must hold with `best` as well."""
    module = importlib.import_module("ramp_jax.quantization.fold")
    coarse = np.array([1.0, 0.8, 0.7, 0.9, 1.2])
    asked = []

    def errors(w, scales, square, sketch, fmt, effort="coarse"):
        asked.append((effort, len(w)))
        return np.asarray(careful) if effort == "best" else coarse[np.asarray(scales[:, 0], int)]

    monkeypatch.setattr(module, "_errors", errors)
    candidates = jnp.arange(5.0)[:, None] * jnp.ones((1, 32))
    assert module._best(jnp.zeros((512, 32)), candidates, jnp.ones(32), None, "Q4_0") == chosen
    assert asked == [("coarse", 64), ("coarse", 256), ("best", 128)]
