"""Pairs of rounded tensors: products that are real are kept, noise is not, and the model agrees."""

import numpy as np
import pytest
import tiny

from ramp_jax.models import allocatable, lookup
from ramp_jax.models.layout import replaced
from ramp_jax.quantization import REFERENCE, calibrate
from ramp_jax.scoring.perplexity import evaluate
from ramp_jax.sensitivity import fisher, pairs
from ramp_jax.sensitivity.exact import cells
from ramp_jax.sensitivity.fisher import Change, fisher_moves, fisher_sensitivity, rounding_errors
from ramp_jax.sensitivity.pairs import estimate, shrunk_products

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LEVELS = (4, 5, 8)


def test_noise_is_shrunk_to_nothing_and_what_is_real_is_kept(rng):
    m = rng.normal(size=(20, 400))
    m[1] = m[0] + 0.1 * rng.normal(size=400)
    found = shrunk_products(m.astype(np.float32))
    real = m[0] @ m[1]
    assert found[0, 1] == found[1, 0] == pytest.approx(real, rel=0.06)
    assert found[0, 1] < real
    noise = found[np.triu_indices(20, 1)][1:]
    assert (noise == 0).mean() > 0.95


def test_losses_are_those_of_the_fisher_table(model, windows):
    found = estimate(model, windows, LEVELS, REFERENCE)
    expected = fisher_sensitivity(model, windows, LEVELS, "sliding", probes=pairs._PROBES).kld
    np.testing.assert_allclose(found.loss, expected, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(found.pairs, found.pairs.transpose(2, 3, 0, 1), rtol=1e-3, atol=1e-9)
    assert found.pairs.any()
    for row in range(len(expected)):
        assert not found.pairs[row, :, row].any()
        assert not found.pairs[row, expected[row] == 0].any()


def test_states_that_are_known_are_not_found_again(untied, windows, monkeypatch):
    stats = calibrate(untied, windows)
    expected = estimate(untied, stats.sample, LEVELS, REFERENCE)
    monkeypatch.setattr(fisher, "_states", lambda *_: pytest.fail("swept again"))
    found = estimate(untied, stats.sample, LEVELS, REFERENCE, stats.states)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)


def test_a_loss_that_is_no_number_is_named(untied, windows):
    broken = tiny.changed(untied, "blk.1.ffn_norm.weight", lambda w: w * np.nan)
    with pytest.raises(ValueError, match=r"what \S+ loses is not finite"):
        estimate(broken, windows, LEVELS, REFERENCE)


def test_pairs_stand_at_their_tensors_and_levels(untied, windows, monkeypatch):
    """Unshrunk, an entry is the product of the moves of its two tensors at its two levels."""
    monkeypatch.setattr(pairs, "_DOUBT", 0.0)
    found, members = estimate(untied, windows, LEVELS, REFERENCE), allocatable(untied.spec)
    changes = rounding_errors(untied, cells(members, LEVELS), REFERENCE)
    moves = fisher_moves(untied, windows, changes, "sliding", probes=pairs._PROBES)
    for i, j, a, b in [(0, 3, 1, 2), (5, 2, 0, 1)]:
        expected = moves[members[i].name][a] @ moves[members[j].name][b]
        assert found.pairs[i, a, j, b] == pytest.approx(expected, rel=1e-3)


def test_products_are_what_two_changes_cost_together(untied, windows):
    """Values and attention's output scaled by a hundredth move the stream alike: together they cost more than alone,
    by the product of their moves."""
    members = {t.name: t for t in allocatable(untied.spec)}
    pair = [members["blk.0.attn_v.weight"], members["blk.0.attn_output.weight"]]

    def changes(tensor, w):
        return [Change(lambda w, _: (0.02 if tensor in pair else 0.0) * w)]

    first, second = (fisher_moves(untied, windows, changes, "sliding", probes=64)[t.name][0] for t in pair)

    def divergence(chosen):
        params = replaced(untied.params, [(t, 1.02 * lookup(untied.params, t)) for t in chosen])
        return evaluate(untied, windows, params=params, reference=untied, protocol="sliding").mean_kld

    together = divergence(pair) - divergence(pair[:1]) - divergence(pair[1:])
    assert together > 0
    assert float(first @ second) == pytest.approx(together, rel=0.25)
