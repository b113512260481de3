"""Calibration against transformers' activations, Scale Folding, and fake-quantization against gguf-py."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from ramp_jax.allocation import Allocation, from_levels
from ramp_jax.halo import libggml
from ramp_jax.models import allocatable, lookup
from ramp_jax.quantization import calibrate, fake_quantize, fold
from ramp_jax.quantization.fold import ALPHAS, GROUPS


def ggml_round_trip(w, name):
    return libggml.dequantize(name, libggml.quantize(name, np.asarray(w)))


def with_block(model, **values):
    return dataclasses.replace(model, params={**model.params, "blk": {**model.params["blk"], **values}})


@pytest.fixture(scope="module")
def outliers(untied):
    """The function of the untied model with a few channels of each norm thirty times as loud."""
    loud = jnp.ones((3, 64)).at[:, np.array([5, 40, 41])].set(30.0)
    blk = dict(untied.params["blk"])
    for norm, linears in GROUPS.values():
        blk[norm] *= loud
        blk |= {name: blk[name] / loud[:, None, :] for name in linears}
    return with_block(untied, **blk)


@pytest.fixture(scope="module")
def stats(outliers, windows):
    return calibrate(outliers, windows)


@pytest.fixture(scope="module")
def folded(outliers, stats):
    return fold(outliers, stats, level=4)


def torch_activations(tied, windows):
    """By tap, what transformers computes there: `[L, tokens, C]`, and `[tokens, C]` for head_in."""
    model, seen = tiny.hf_model(tied), collections.defaultdict(list)

    def note(tap, x):
        seen[tap].append(x.reshape(-1, x.shape[-1]).numpy())

    handles = [model.lm_head.register_forward_pre_hook(lambda _, args: note("head_in", args[0]))]
    for layer in model.model.layers:
        handles.append(layer.register_forward_pre_hook(lambda _, args: note("residual", args[0])))
        for module, tap_in, tap_out in (
            (layer.self_attn.q_proj, "attn_in", None),
            (layer.self_attn.o_proj, "attn_mid", "attn_out"),
            (layer.mlp.gate_proj, "ffn_in", None),
            (layer.mlp.down_proj, "ffn_mid", "ffn_out"),
        ):
            handles.append(module.register_forward_pre_hook(lambda _, args, tap=tap_in: note(tap, args[0])))
            if tap_out:
                handles.append(module.register_forward_hook(lambda _, args, out, tap=tap_out: note(tap, out)))
    with torch.no_grad():
        model(torch.from_numpy(windows.astype(np.int64)))
    for handle in handles:
        handle.remove()
    return {tap: np.stack(values) if tap != "head_in" else values[0] for tap, values in seen.items()}


def test_moments_equal_those_of_transformers(model, windows):
    moments = calibrate(model, windows).moments
    activations = torch_activations(model.spec.tied, windows)
    assert set(moments) == set(activations)
    for tap, x in activations.items():
        x = x.astype(np.float64)
        np.testing.assert_allclose(moments[tap].square, (x**2).mean(axis=-2), rtol=1e-4, err_msg=tap)
        np.testing.assert_allclose(moments[tap].fourth, (x**4).mean(axis=-2), rtol=1e-4, err_msg=tap)
        np.testing.assert_allclose(moments[tap].abs_max, np.abs(x).max(axis=-2), rtol=1e-4, err_msg=tap)


def test_order_of_windows_does_not_matter(untied, windows):
    there, back = calibrate(untied, windows), calibrate(untied, windows[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), there.moments, back.moments)


@pytest.mark.parametrize(
    ("key", "tap", "layer"),
    [("attn_norm", "attn_in", 1), ("attn_v", "attn_mid", 0), ("ffn_up", "ffn_mid", 1), ("ffn_down", "ffn_out", 2)],
)
@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_activation_that_is_not_finite_is_named_where_it_arises(untied, windows, key, tap, layer, bad):
    broken = with_block(untied, **{key: untied.params["blk"][key].at[layer].set(bad)})
    with pytest.raises(ValueError, match=f"activation {tap} of layer {layer} is not finite in calibration window 0"):
        calibrate(broken, windows)


def test_activation_that_is_not_finite_names_the_window(untied, windows):
    token = np.setdiff1d(windows[2], windows[:2])[0]
    params = {**untied.params, "token_embd": untied.params["token_embd"].at[token].set(np.nan)}
    with pytest.raises(ValueError, match="activation residual of layer 0 is not finite in calibration window 2"):
        calibrate(dataclasses.replace(untied, params=params), windows)


def test_final_norm_that_is_not_finite(untied, windows):
    params = {**untied.params, "output_norm": untied.params["output_norm"].at[0].set(np.inf)}
    with pytest.raises(ValueError, match="activation head_in of layer last is not finite"):
        calibrate(dataclasses.replace(untied, params=params), windows)


def test_folding_leaves_logits_unchanged(outliers, folded, windows):
    assert np.abs(np.log(folded.folding["attn_in"])).max() > 0.5
    np.testing.assert_allclose(folded.logits(windows), outliers.logits(windows), atol=1e-4, rtol=0)


def test_folding_moves_scales_from_norms_into_weights(outliers, folded):
    before, after = outliers.params["blk"], folded.params["blk"]
    for tap, (norm, linears) in GROUPS.items():
        s = np.asarray(folded.folding[tap])
        np.testing.assert_allclose(after[norm] * s, before[norm], rtol=1e-6)
        for name in linears:
            np.testing.assert_allclose(after[name], before[name] * s[:, None, :], rtol=1e-6)
        np.testing.assert_allclose(np.exp(np.log(s).mean(axis=1)), 1.0, rtol=1e-5)
    for key in ("attn_output", "ffn_down"):
        np.testing.assert_array_equal(after[key], before[key])


def objective(model, stats, tap, layer, s):
    """Activation-weighted squared error of a group's linears quantized under the scales `s`, in NumPy."""
    _, linears = GROUPS[tap]
    square = np.asarray(stats.moments[tap].square[layer])
    weights = [np.asarray(model.params["blk"][name][layer]) for name in linears]
    return sum((((ggml_round_trip(w * s, "IQ4_NL") / s - w) ** 2) * square).sum(dtype=np.float64) for w in weights)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("tap", GROUPS)
def test_folding_takes_the_best_scale_of_the_grid(outliers, stats, folded, tap, layer):
    rms = np.sqrt(np.asarray(stats.moments[tap].square[layer]))
    grid = []
    for alpha in ALPHAS:
        s = rms**alpha
        grid.append(objective(outliers, stats, tap, layer, (s / np.exp(np.log(s).mean())).astype(np.float32)))
    chosen = objective(outliers, stats, tap, layer, np.asarray(folded.folding[tap][layer]))
    assert ALPHAS[0] == 0.0
    assert chosen <= grid[0]
    assert chosen == pytest.approx(min(grid), rel=2e-3)


def test_grid_of_zero_alone_changes_nothing(outliers, stats):
    same = fold(outliers, stats, level=4, alphas=(0.0,))
    jax.tree.map(np.testing.assert_array_equal, same.params, outliers.params)


def test_dead_channel_keeps_folding_finite(outliers, stats):
    dead = {tap: m._replace(square=m.square.at[:, 7].set(0.0)) for tap, m in stats.moments.items() if tap in GROUPS}
    model = fold(outliers, dataclasses.replace(stats, moments=dead), level=4, alphas=(0.7,))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((model.params, model.folding)))


def test_statistics_under_a_folding_are_those_of_the_folded_model(stats, folded, windows):
    predicted, measured = stats.under(folded.folding), calibrate(folded, windows)
    assert predicted.folding is folded.folding is measured.folding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), predicted.moments, measured.moments)


def test_statistics_come_back_from_a_folding(stats, folded):
    back = stats.under(folded.folding).under({})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), back.moments, stats.moments)


def test_folding_again_multiplies_scales(outliers, stats, folded, windows):
    twice = fold(folded, stats, level=8)
    gain = outliers.params["blk"]["attn_norm"]
    np.testing.assert_allclose(twice.params["blk"]["attn_norm"] * twice.folding["attn_in"], gain, rtol=1e-5)
    np.testing.assert_allclose(twice.logits(windows), outliers.logits(windows), atol=1e-4, rtol=0)


def test_folding_bf16_weights_keeps_dtypes(outliers, stats, windows):
    low = outliers.astype("bfloat16")
    folded = fold(low, calibrate(low, windows), level=4)
    assert jax.tree.map(lambda a: a.dtype, folded.params) == jax.tree.map(lambda a: a.dtype, low.params)
    difference = np.abs(folded.logits(windows) - low.logits(windows)).mean()
    assert difference < 0.02 * np.std(low.logits(windows))


def test_folding_at_a_level_that_is_masked(outliers, stats):
    with pytest.raises(ValueError, match="level 7 cannot hold rows of 64 weights; fold at another level"):
        fold(outliers, stats, level=7)


def test_fake_quantized_weights_equal_those_of_ggml(model):
    allocation = from_levels(model, [(4, 5, 8)[i % 3] for i in range(len(allocatable(model.spec)))])
    params = fake_quantize(model, allocation)
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    for tensor in allocatable(model.spec):
        expected = ggml_round_trip(lookup(model.params, tensor), allocation.formats[tensor.name])
        np.testing.assert_array_equal(lookup(params, tensor), expected, err_msg=tensor.name)
    for norm in ("attn_norm", "ffn_norm"):
        np.testing.assert_array_equal(params["blk"][norm], model.params["blk"][norm])
    np.testing.assert_array_equal(params["output_norm"], model.params["output_norm"])


def test_f32_allocation_is_the_identity(model):
    plain = Allocation(model.spec, model.metadata, {t.name: "F32" for t in allocatable(model.spec)})
    jax.tree.map(np.testing.assert_array_equal, fake_quantize(model, plain), model.params)


def test_fake_quantization_keeps_dtypes(untied):
    low = untied.astype("bfloat16")
    params = fake_quantize(low, from_levels(low, [4] * 23))
    assert [leaf.dtype for leaf in jax.tree.leaves(params)] == [leaf.dtype for leaf in jax.tree.leaves(low.params)]
