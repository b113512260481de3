"""Error-compensated rounding: against GPTQ written out in NumPy, and never above what it starts from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ramp_jax import data, scratch, sweep
from ramp_jax.allocation import from_levels
from ramp_jax.formats import decode, encode, get_format
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import allocatable, load_model, lookup
from ramp_jax.models.decoder import embed, hidden_states
from ramp_jax.quantization import (
    calibrate,
    compensate,
    descent,
    fake_quantize,
    fold,
    importance_of,
    make_encoder,
    refold,
)
from ramp_jax.quantization.compensate import (
    MADE_UP,
    SHRINKAGE,
    curvature,
    factor,
    in_chunks,
    losses,
    making_up,
    read_by,
)
from ramp_jax.quantization.compensate import compensated as one_look_ahead

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def inputs(rng, channels, tokens=2000):
    """Correlated activations with channels of very different loudness, and their second moment."""
    mix = np.eye(channels) + rng.standard_normal((channels, channels)) / np.sqrt(channels)
    x = rng.standard_normal((tokens, channels)) @ mix * np.exp(rng.standard_normal(channels))
    return x, (x.T @ x / tokens).astype(np.float32)


def test_curvature_is_shrunk_and_its_factor_that_of_the_inverse(rng):
    _, second = inputs(rng, 96)
    found = curvature(second.copy())
    upper = np.asarray(found.upper, np.float64)
    added = SHRINKAGE * np.sqrt(np.diag(second).mean() * np.diag(second))
    np.testing.assert_allclose(found.second, second + np.diag(added), rtol=1e-6)
    np.testing.assert_array_equal(np.tril(upper, -1), 0)
    np.testing.assert_allclose(upper.T @ upper @ np.asarray(found.second), np.eye(96), atol=1e-4)


def gptq(w, upper, d, values):
    """The published loop on Q4_0 or IQ4_NL blocks whose scales `d` `[O, blocks]` are known."""
    w, q = w.astype(np.float64).copy(), np.zeros(w.shape)
    for j in range(w.shape[1]):
        scale = d[:, j // 32]
        code = values[np.argmin(np.abs(w[:, j, None] / scale[:, None] - values[None]), axis=1)]
        q[:, j] = code
        error = (w[:, j] - scale * code) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, None, j + 1 :]
    return q


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_codes_are_those_of_gptq(rng, name):
    """Given the scales that were chosen, the codes follow; a rounding tie in f32 may fall the other way."""
    _, second = inputs(rng, 128)
    w = rng.standard_normal((24, 128)).astype(np.float32)
    upper = factor(second)
    codes = one_look_ahead(jnp.asarray(w), upper, name)
    half = 8 if name == "Q4_0" else 16
    expected = gptq(w, np.asarray(upper, np.float64), np.asarray(codes.d, np.float64), np.arange(-half, half))
    assert np.mean(np.asarray(codes.q).reshape(24, 128) == expected) > 0.995


def gptq_in_groups(w, upper, bits, group):
    """The published loop where scale and zero point of a group are those of its weights when its turn comes."""
    w, q, top = w.astype(np.float64).copy(), np.zeros(w.shape), 2**bits - 1
    scale, zero = np.zeros((2, len(w), w.shape[1] // group))
    for j in range(w.shape[1]):
        g = j // group
        if j % group == 0:
            ends = np.minimum(w[:, j : j + group].min(1), 0), np.maximum(w[:, j : j + group].max(1), 0)
            scale[:, g] = np.float16((ends[1] - ends[0]) / top)
            zero[:, g] = np.clip(np.round(-ends[0] / scale[:, g]), 0, top)
        q[:, j] = np.clip(np.round(w[:, j] / scale[:, g] + zero[:, g]), 0, top)
        error = (w[:, j] - scale[:, g] * (q[:, j] - zero[:, g])) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, None, j + 1 :]
    return scale, zero, q


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 64), (4, 128)])
def test_groups_of_integers_are_those_of_gptq(rng, bits, group):
    """Scales differ where f32 rounds their ends to the other side, and codes of such groups with them."""
    _, second = inputs(rng, 256)
    w = rng.standard_normal((24, 256)).astype(np.float32)
    upper = factor(second)
    codes = one_look_ahead(jnp.asarray(w), upper, f"INT{bits}_G{group}")
    scale, zero, q = gptq_in_groups(w, np.asarray(upper, np.float64), bits, group)
    np.testing.assert_allclose(codes.scale, scale, rtol=0.01)
    assert np.mean(np.asarray(codes.zero) == zero) > 0.95
    assert np.mean(np.asarray(codes.q).reshape(24, 256) == q) > 0.98


def test_descent_leaves_scales_of_integer_groups(rng):
    """Only codes move, and outputs lose less: than after one look ahead, and a third less than rounded as they are."""
    x, second = inputs(rng, 256)
    w, name = rng.standard_normal((40, 256)).astype(np.float32), "INT3_G128"
    loss_of = curvature(second.copy())
    before = one_look_ahead(jnp.asarray(w), loss_of.upper, name)
    after, plain = in_chunks(w, loss_of, name), encode(w, name)
    np.testing.assert_array_equal(after.scale, before.scale)
    np.testing.assert_array_equal(after.zero, before.zero)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), plain)
    found, ahead, as_is = (np.square(x @ (np.asarray(decode(c, name)) - w).T).sum() for c in (after, before, plain))
    assert found < 0.98 * ahead
    assert found < 0.7 * as_is


@pytest.mark.parametrize(
    "name", ["IQ4_NL", "MXFP4", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_S"]
)
def test_outputs_lose_less(rng, name):
    """Mean squared error of the outputs themselves beside the importance-weighted search; a fifth less at level 3."""
    channels = 2 * get_format(name).block_size
    x, second = inputs(rng, channels)
    w = rng.standard_normal((40, channels)).astype(np.float32)
    codes, plain = in_chunks(w, curvature(second.copy()), name), encode(w, name, np.diag(second), "best")
    assert jax.tree.map(lambda a: (a.shape, a.dtype), codes) == jax.tree.map(lambda a: (a.shape, a.dtype), plain)
    fmt = get_format(name)
    stored = fmt.from_bytes(fmt.to_bytes(jax.tree.map(np.asarray, codes)))
    np.testing.assert_array_equal(decode(stored, name), decode(codes, name))
    new, old = (np.square(x @ (np.asarray(decode(c, name)) - w).T).sum() for c in (codes, plain))
    assert new < 0.8 * old
    by_window, decoded = x.reshape(4, -1, channels).astype(np.float32), tuple(decode(c, name) for c in (codes, plain))
    for found, lost in zip(losses(decoded, by_window, w, by_window), (new, old), strict=True):
        np.testing.assert_allclose(found.sum(), lost / len(x), rtol=1e-3)


@pytest.mark.parametrize("name", ["IQ4_NL", "Q5_1", "Q2_K", "Q3_K", "Q4_K"])
def test_descent_ends_where_no_number_can_do_better(rng, name, monkeypatch):
    """It never loses more; after enough passes no code, sub-scale or minimum next to the one that was found is better,
    nor a superscale a little larger or smaller."""
    fmt = get_format(name)
    _, second = inputs(rng, 2 * fmt.block_size)
    second, w = second + 0.1 * np.diag(np.diag(second)), rng.standard_normal((6, 2 * fmt.block_size), np.float32)
    before = encode(w, name, np.diag(second), "best")

    def lost(codes):
        off = (np.asarray(decode(codes, name)) - w).astype(np.float64)
        return np.einsum("oi,ij,oj->o", off, second, off)

    once = descent.descended(w, before, second, name)
    assert (lost(once) <= lost(before) * (1 + 1e-5)).all()
    assert lost(once).sum() < 0.9 * lost(before).sum()
    monkeypatch.setattr(descent, "PASSES", 30)
    found = jax.tree.map(np.asarray, descent.descended(w, before, second, name))
    least = lost(found)
    for field in found._fields:
        values = getattr(found, field)
        steps = (1,) if values.dtype == np.float16 else values.shape[2:]
        for place in [(0, *at) for at in np.ndindex(*steps)][:: max(1, int(np.prod(steps)) // 24)]:
            at = (slice(None), *place)[: values.ndim]
            for step in (-1, 1):
                moved = values.copy()
                if values.dtype == np.float16:
                    moved[at] *= 1 + step / 64
                else:
                    ends = fmt.grid.scales if field == "scales" else fmt.grid.mins if field == "mins" else None
                    wanted = values[at].astype(np.float32) + step
                    moved[at] = np.clip(wanted, *ends) if ends else np.asarray(fmt.grid.round(wanted, wanted))
                    if ends is None and name.startswith("IQ4"):
                        continue  # whose values do not lie side by side
                assert (lost(found._replace(**{field: moved})) >= least * (1 - 1e-4)).all(), (field, place, step)


def test_target_is_what_least_squares_make_of_rounded_inputs(rng):
    """Half the way to the ridge regression of W x on x̂, whose ridge is what H is shrunk by and pulls towards W."""
    exact, _ = inputs(rng, 64)
    read = exact + 0.3 * inputs(rng, 64)[0]
    w = rng.standard_normal((8, 64))
    second, missed = (a.T @ read / len(read) for a in (read, exact - read))
    ridge = np.diag(SHRINKAGE * np.sqrt(np.diag(second).mean() * np.diag(second)))
    whole = np.linalg.solve(second + ridge, read.T @ exact @ w.T / len(read) + ridge @ w.T).T
    expected = w + MADE_UP * (whole - w)
    found = making_up(*(a.astype(np.float32) for a in (w, w @ missed)), curvature(second.astype(np.float32)))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    off, off_before = (np.square(exact @ w.T - read @ np.asarray(a).T).sum() for a in (found, w))
    assert off < 0.8 * off_before


def test_what_earlier_blocks_lost_is_made_up_for(untied, windows, monkeypatch):
    """The last hidden states are nearer to the model's own than where inputs count as exact."""
    allocation = from_levels(untied, [4] * len(allocatable(untied.spec)))

    def off():
        params = fake_quantize(untied, allocation, make_encoder("compensated", windows))
        exact, rounded = (hidden_states(untied.spec, p, windows) for p in (untied.params, params))
        return float(jnp.sum(jnp.square(exact - rounded)))

    with_it = off()
    monkeypatch.setattr(compensate, "making_up", lambda w, missed, loss_of: w)
    assert with_it < 0.97 * off()


def test_hidden_states_in_files_change_nothing(untied, allocation, monkeypatch):
    """Nor does who finds importance; a quarter of five windows decides, the others are fitted on."""
    windows = data.windows("builtin", untied.tokenizer, context=24, count=5)
    importance = importance_of(untied.spec, calibrate(untied, windows))
    found = fake_quantize(untied, allocation, make_encoder("compensated", windows))
    monkeypatch.setattr(scratch, "LARGEST", 0)
    for given in ({}, {"importance": importance}):
        again = fake_quantize(untied, allocation, make_encoder("compensated", windows, **given))
        jax.tree.map(np.testing.assert_array_equal, found, again)


def test_rows_do_not_depend_on_each_other(rng):
    _, second = inputs(rng, 64)
    w = rng.standard_normal((9, 64)).astype(np.float32)
    whole, part = (in_chunks(rows, curvature(second.copy()), "IQ4_NL") for rows in (w, w[4:6]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[4:6], b), whole, part)


def test_dead_channels_are_rounded_as_they_are(rng):
    _, second = inputs(rng, 64)
    second[:, 40] = second[40] = 0
    w = rng.standard_normal((8, 64)).astype(np.float32)
    off = np.asarray(decode(in_chunks(w, curvature(second.copy()), "Q5_0"), "Q5_0")) - w
    assert np.isfinite(off).all()
    assert np.abs(off[:, 40]).max() < 0.2


@pytest.fixture(scope="module")
def allocation(untied):
    return from_levels(untied, [4, 5] * 11 + [4])


@pytest.fixture(scope="module")
def compensated(untied, windows, allocation):
    return make_encoder("compensated", windows)


def test_file_holds_exactly_what_was_evaluated(untied, allocation, compensated, tmp_path):
    export_gguf(untied, allocation, tmp_path / "out.gguf", compensated)
    params = fake_quantize(untied, allocation, compensated)
    jax.tree.map(np.testing.assert_array_equal, load_model(str(tmp_path / "out.gguf")).params, params)


def test_file_holds_what_was_evaluated_where_no_block_can_hold_some(odd, windows, tmp_path):
    allocation = from_levels(odd, [4] * len(allocatable(odd.spec)))
    encoder = make_encoder("compensated", windows)
    export_gguf(odd, allocation, tmp_path / "out.gguf", encoder)
    params = fake_quantize(odd, allocation, encoder)
    jax.tree.map(np.testing.assert_array_equal, load_model(str(tmp_path / "out.gguf")).params, params)


def test_first_layer_loses_less_and_no_row_more(untied, windows, allocation, compensated):
    """Of the first linears, whose inputs no other tensor but the embedding changes."""
    best = make_encoder("best", windows)
    before, after = (fake_quantize(untied, allocation, encoder) for encoder in (best, compensated))
    again = tiny.changed(untied, "token_embd.weight", lambda _: before["token_embd"]["weight"])
    x = embed(again.spec, again.params, windows)
    seen = read_by(next(sweep.forward(again.spec, again.params)), x, "attn_in")
    x = embed(untied.spec, untied.params, windows)
    exact = read_by(next(sweep.forward(untied.spec, untied.params)), x, "attn_in")
    for module in ("attn_q", "attn_k", "attn_v"):
        w = untied.params["blk"][0][module]["weight"]
        new, old = losses(tuple(p["blk"][0][module]["weight"] for p in (after, before)), seen, w, exact)
        assert (np.asarray(new) <= np.asarray(old) * (1 + 1e-5)).all()
        assert new.sum() < 0.9 * old.sum()


def test_singular_inputs_are_rounded_plainly(untied, windows, allocation, caplog):
    """A norm that puts out nothing: one message, and the rounding of `best`."""
    dead = tiny.changed(untied, "blk.1.ffn_norm.weight", jnp.zeros_like)
    found = fake_quantize(dead, allocation, make_encoder("compensated", windows))
    messages = [r.getMessage() for r in caplog.records if "no usable second moment" in r.getMessage()]
    assert len(messages) == 1
    assert "first blk.1.ffn_gate.weight" in messages[0]
    tensor = tiny.tensor_of(dead, "blk.1.ffn_up.weight")
    fmt = allocation.formats[tensor.name]
    expected = decode(encode(lookup(dead.params, tensor), fmt, None, "best"), fmt)
    np.testing.assert_array_equal(lookup(found, tensor), expected)


def test_file_holds_what_was_evaluated_under_another_folding(untied, windows, allocation, compensated, tmp_path):
    """One encoder serves every folding; taken back, a folding is no other one."""
    folded = fold(untied, calibrate(untied, windows), 4)
    other = dataclasses.replace(allocation, folding=folded.folding)
    params = fake_quantize(untied, other, compensated)
    export_gguf(untied, other, tmp_path / "out.gguf", compensated)
    jax.tree.map(np.testing.assert_array_equal, load_model(str(tmp_path / "out.gguf")).params, params)
    back = refold(untied, {name: np.ones(s.shape) for name, s in folded.folding.items()})
    jax.tree.map(
        np.testing.assert_array_equal,
        fake_quantize(back, allocation, compensated),
        fake_quantize(untied, allocation, compensated),
    )
