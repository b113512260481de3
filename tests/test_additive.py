"""The additive model: arithmetic by hand, corrections that are there to be found, true losses against `evaluate`."""

import numpy as np
import pytest
from tiny import LINEARS

from ramp_jax.allocation import from_levels
from ramp_jax.models import Tensor, allocatable
from ramp_jax.models.layout import Weight
from ramp_jax.quantization import fake_quantize
from ramp_jax.scoring.perplexity import evaluate
from ramp_jax.sensitivity import additive

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LEVELS = (4, 5, 8)
MEMBERS = [Tensor(Weight(f"{name}.weight", (4, 4), "matrix", "x"), layer) for layer in range(2) for name in LINEARS]


def test_prediction_and_pairs_by_hand():
    kld = np.zeros((14, 2))
    kld[[LINEARS.index("attn_q"), 7 + LINEARS.index("attn_q")]] = [[4, 1], [9, 16]]
    kld[[LINEARS.index("ffn_up"), 7 + LINEARS.index("ffn_up")]] = [[25, 0], [36, 49]]
    actions = np.zeros((2, 14), int)
    actions[1, 7:] = 1
    np.testing.assert_array_equal(additive.predict(kld, actions), [4 + 9 + 25 + 36, 4 + 16 + 25 + 49])
    terms = additive.pair_terms(kld, MEMBERS, actions)
    assert len(terms) == 21
    np.testing.assert_array_equal(terms["attn_q.weight", "ffn_up.weight"], [2 * 5 + 3 * 6, 2 * 5 + 4 * 7])
    np.testing.assert_array_equal(terms["attn_q.weight", "attn_k.weight"], [0, 0])


def test_random_actions_are_valid_and_of_all_sizes(rng):
    valid = np.ones((14, 3), bool)
    valid[3, 0] = valid[5, 2] = valid[6, 1] = False
    actions = additive.random_actions(rng, valid, 400)
    assert actions.shape == (400, 14)
    assert valid[np.arange(14)[None], actions].all()
    for tensor in range(14):
        assert set(actions[:, tensor]) == set(np.flatnonzero(valid[tensor]))
    mean = actions.mean(axis=1)
    assert mean.min() < 0.4
    assert mean.max() > 1.6


@pytest.fixture
def problem(rng):
    kld = rng.uniform(0.1, 1, (14, 3)) * np.array([1, 0.3, 0.1])
    actions = additive.random_actions(rng, np.ones((14, 3), bool), 64)
    return additive.predict(kld, actions), additive.pair_terms(kld, MEMBERS, actions)


def test_scale_and_pairs_are_found(problem):
    predicted, terms = problem
    gate_up, k_v = ("ffn_gate.weight", "ffn_up.weight"), ("attn_k.weight", "attn_v.weight")
    true = 0.9 * predicted + 0.5 * terms[gate_up] - 0.25 * terms[k_v]
    found = additive.fit(predicted, terms, true, pairs=2)
    assert found.scale == pytest.approx(0.9)
    assert found.pairs == pytest.approx({gate_up: 0.5, k_v: -0.25})
    np.testing.assert_allclose(found(predicted, terms), true)


def test_scale_alone_minimizes_relative_errors(problem):
    predicted, terms = problem
    noise = np.exp(np.random.default_rng(5).normal(0, 0.2, 64))
    found = additive.fit(predicted, terms, predicted * noise, pairs=0)
    errors = [np.mean((scale / noise - 1) ** 2) for scale in (found.scale * 0.99, found.scale, found.scale * 1.01)]
    assert not found.pairs
    assert errors[1] == min(errors)


def test_weights_of_pairs_stay_within_what_correlations_allow(problem):
    predicted, terms = problem
    found = additive.fit(predicted, terms, predicted + 5 * terms["ffn_gate.weight", "ffn_up.weight"], pairs=2)
    assert found.pairs["ffn_gate.weight", "ffn_up.weight"] == pytest.approx(2)
    assert all(abs(weight) <= 2 for weight in found.pairs.values())


def test_true_losses_are_those_of_fake_quantized_models(model, windows):
    actions = additive.random_actions(np.random.default_rng(0), np.ones((len(allocatable(model.spec)), 3), bool), 2)
    kld, delta = additive.true_losses(model, windows, LEVELS, actions)
    before = evaluate(model, windows).mean_nll
    for i, row in enumerate(actions):
        params = fake_quantize(model, from_levels(model, [LEVELS[a] for a in row]))
        scored = evaluate(model, windows, params=params, reference=model)
        assert kld[i] == pytest.approx(scored.mean_kld, rel=1e-6)
        assert delta[i] == pytest.approx(scored.mean_nll - before, abs=1e-7)
