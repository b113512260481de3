"""The 11 numbers of a weight matrix: by hand where they can be counted, and what must not move them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import spearmanr

from ramp_jax.formats import round_trip
from ramp_jax.models import allocatable
from ramp_jax.policy import embedding
from ramp_jax.quantization import calibrate, refold
from ramp_jax.quantization.calibrate import Moments

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LAYER = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64


@pytest.fixture(scope="module")
def stats(untied, windows):
    return calibrate(untied, windows)


@pytest.fixture(scope="module")
def embedded(untied, stats):
    return embedding.embed(untied, stats)


def column(values, name):
    """One of the numbers in its own unit, before it was moved to the order of 1."""
    i = embedding.NAMES.index(name)
    return values[:, i] * embedding._WIDTH[i] + embedding._CENTER[i]


def index(model, name):
    return [t.name for t in allocatable(model.spec)].index(name)


def test_eleven_finite_numbers_of_the_order_of_one(model, windows):
    values = embedding.embed(model, calibrate(model, windows))
    assert values.shape == (len(allocatable(model.spec)), 11)
    assert len(embedding.NAMES) == len(set(embedding.NAMES)) == 11
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert np.abs(values).max() < 10


def test_matrices_that_no_block_can_hold_are_not_embedded(odd, windows):
    values = embedding.embed(odd, calibrate(odd, windows), np.ones(len(allocatable(odd.spec))))
    assert values.shape == (len(allocatable(odd.spec)), 11)
    assert np.isfinite(values).all()
    layers = [t.layer for t in allocatable(odd.spec)]
    expected = [float(t.name == "output.weight") if t.layer is None else t.layer / 2 for t in allocatable(odd.spec)]
    assert set(layers) >= {0, 1, 2}
    np.testing.assert_allclose(column(values, "depth"), expected, atol=1e-6)


def test_names_stand_in_the_order_of_the_table():
    rows = [line.split("|")[2].strip() for line in embedding.__doc__.splitlines() if line.startswith("| ")][1:]
    assert tuple(rows) == embedding.NAMES


def test_structure_by_hand(untied, embedded):
    members = allocatable(untied.spec)
    depth = [0.0] + [layer / 2 for layer in range(3) for _ in tiny.LINEARS] + [1.0]
    np.testing.assert_allclose(column(embedded, "depth"), depth, atol=1e-6)
    total = 2 * 320 * 64 + 3 * LAYER
    np.testing.assert_allclose(column(embedded, "share"), np.log10([t.size / total for t in members]), atol=1e-5)
    assert column(embedded, "fan")[index(untied, "blk.1.ffn_gate.weight")] == pytest.approx(np.log10(96 / 64), abs=1e-5)
    assert column(embedded, "fan")[index(untied, "blk.1.attn_q.weight")] == pytest.approx(0, abs=1e-5)
    assert column(embedded, "fan")[index(untied, "blk.1.attn_k.weight")] == pytest.approx(np.log10(0.5), abs=1e-5)
    roles = [1.0, *([i / 7 for i in range(7)] * 3), 1.0]
    np.testing.assert_allclose(column(embedded, "role"), roles, atol=1e-6)


def test_activation_numbers_by_hand(untied, stats, embedded):
    """From the moments of one tap: log₁₀ of max over rms, spread of channels, share written."""
    x = Moments(*(np.asarray(leaf, np.float64) for leaf in stats.moments["blk.1.attn_in"]))
    row = embedded[index(untied, "blk.1.attn_v.weight")][None]
    mean_square = x.square.mean()
    residual, written = (np.asarray(stats.moments[f"blk.1.{tap}"].square).mean() for tap in ("residual", "attn_out"))
    expected = {
        "act_outlier": np.log10(x.abs_max.max() / np.sqrt(mean_square)),
        "act_spread": np.log10(np.sqrt(x.square)).std(),
        "act_written": np.log10(written / residual),
    }
    for name, value in expected.items():
        assert column(row, name)[0] == pytest.approx(value, abs=1e-4), name


def test_weight_numbers_by_hand(untied, embedded):
    w = np.asarray(untied.params["blk"][2]["ffn_down"]["weight"], np.float64)
    row = embedded[index(untied, "blk.2.ffn_down.weight")][None]
    centered = w - w.mean()
    assert column(row, "weight_outlier")[0] == pytest.approx(np.log10(np.abs(w).max() / w.std()), abs=1e-4)
    kurtosis = (centered**4).mean() / w.var() ** 2
    assert column(row, "weight_kurtosis")[0] == pytest.approx(np.log(kurtosis - 2), abs=1e-4)


def test_pieces_of_vocabularies_change_nothing(untied, stats, monkeypatch):
    loss = np.ones(len(allocatable(untied.spec)))
    expected = embedding.embed(untied, stats, loss)
    monkeypatch.setattr(embedding, "_VOCABULARY_ROWS", 100)
    np.testing.assert_allclose(embedding.embed(untied, stats, loss), expected, atol=1e-5)


def test_error_of_three_bits_against_a_plain_loop(untied, stats, embedded):
    w = np.asarray(untied.params["blk"][0]["ffn_down"]["weight"], np.float64)
    square = np.asarray(stats.moments["blk.0.ffn_mid"].square, np.float64)
    rounded = np.empty_like(w)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], 32):
            block = w[row, start : start + 32]
            d = block[np.abs(block).argmax()] / -4
            rounded[row, start : start + 32] = np.clip(np.floor(block / d + 0.5), -4, 3) * d
    expected = np.log10(((rounded - w) ** 2 * square).sum() / (w**2 * square).sum())
    row = embedded[index(untied, "blk.0.ffn_down.weight")][None]
    assert column(row, "weight_error")[0] == pytest.approx(expected, abs=1e-3)


def test_loss_rates_order_tensors_as_their_true_costs_do(untied, stats, embedded):
    """Against the divergence that the same rounding of one tensor truly causes, per weight."""
    windows, costs, members = stats.sample, [], allocatable(untied.spec)
    reference = jax.nn.log_softmax(untied.logits(windows))
    for tensor in members:
        rounded = tiny.changed(untied, tensor.name, lambda w: round_trip(w, "IQ4_NL"))
        new = jax.nn.log_softmax(rounded.logits(windows))
        costs.append(float(jnp.mean(jnp.sum(jnp.exp(reference) * (reference - new), axis=-1))) / tensor.size)
    assert spearmanr(column(embedded, "loss_rate"), costs).statistic > 0.9


def test_statistics_without_text_are_refused(untied, stats):
    with pytest.raises(ValueError, match=r"hold no sample of the text, .*; calibrate the model"):
        embedding.embed(untied, dataclasses.replace(stats, sample=None))


@pytest.mark.parametrize("c", [0.25, 3.0, 100.0])
def test_weights_times_c_and_activations_over_c_change_nothing(untied, stats, embedded, c):
    """The function of the layer is the same, so its embedding is."""
    weights = tiny.stacked(untied.params)
    readers = {module: weights[module] * np.float32(c) for module in ("attn_q", "attn_k", "attn_v")}
    scaled = tiny.with_blocks(untied, attn_norm=weights["attn_norm"] / np.float32(c), **readers)
    inputs = {f"blk.{layer}.attn_in" for layer in range(3)}
    moments = {name: m.scaled(jnp.float32(1 / c)) if name in inputs else m for name, m in stats.moments.items()}
    found = embedding.embed(scaled, dataclasses.replace(stats, moments=moments))
    tolerance = np.where(np.array(embedding.NAMES) == "loss_rate", 0.05, 2e-3)  # rounding to f16 scales moves the loss
    assert (np.abs(found - embedded) <= tolerance).all()


def test_a_uniform_folding_changes_nothing(untied, stats, embedded):
    """As above, through Scale Folding: statistics of the unfolded model serve the folded one."""
    scales = {"attn_in": 4.0, "ffn_in": 0.5}
    folded = refold(untied, {f"blk.{i}.{tap}": np.full(64, s) for i in range(3) for tap, s in scales.items()})
    np.testing.assert_allclose(embedding.embed(folded, stats), embedded, atol=2e-3)


def test_folding_is_seen(untied, stats, embedded, rng):
    folded = refold(untied, {f"blk.{i}.attn_in": np.exp(rng.normal(0, 1, 64)) for i in (0, 2)})
    shares = embedding.NAMES.index("loss_rate")  # what one group loses moves the share of every other
    changed = np.delete(np.abs(embedding.embed(folded, stats) - embedded) > 1e-2, shares, axis=1).any(axis=1)
    readers = [f"blk.{i}.{module}.weight" for i in (0, 2) for module in ("attn_q", "attn_k", "attn_v")]
    expected = [t.name in readers for t in allocatable(untied.spec)]
    assert changed.tolist() == expected


def test_statistics_of_the_folded_model_give_the_same_embedding(untied, stats, windows, rng):
    folded = refold(untied, {f"blk.{i}.ffn_in": np.exp(rng.normal(0, 1, 64)) for i in range(3)})
    found, expected = embedding.embed(folded, calibrate(folded, windows)), embedding.embed(folded, stats)
    share = embedding.NAMES.index("loss_rate")
    np.testing.assert_allclose(np.delete(found, share, axis=1), np.delete(expected, share, axis=1), atol=1e-3)
    # importance that differs in its last bits rounds weights next to a tie another way: 2 % of a loss
    np.testing.assert_allclose(found[:, share], expected[:, share], atol=0.02)


def test_lookup_only_embedding_has_no_activation(untied, tied, windows, embedded):
    """It counts as an average one; a tied embedding is read by the head and has the head's activation."""
    np.testing.assert_array_equal(embedded[0, :3], 0)
    assert (embedded[-1, :3] != 0).all()
    assert (embedding.embed(tied, calibrate(tied, windows))[0, :3] != 0).all()


def test_statistics_without_a_tap_are_refused(untied, stats):
    moments = {name: value for name, value in stats.moments.items() if name != "blk.1.ffn_mid"}
    with pytest.raises(KeyError, match=r"blk\.1\.ffn_mid"):
        embedding.embed(untied, dataclasses.replace(stats, moments=moments))
