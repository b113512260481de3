"""Tables that agree with measurements: against the regression written out, and on tables that are wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
from tables import random_table

from ramp_jax.policy import table_correction
from ramp_jax.policy.table_correction import Evidence, add_evidence, correct_table, empty_evidence

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def table_and_actions(rng, count):
    loss, cost = random_table(rng, masked=0.0)
    return loss, jnp.asarray(rng.integers(0, cost.shape[1], (count, len(cost))), jnp.int32)


def sums(table, actions):
    return np.asarray(table, np.float64)[np.arange(len(table)), np.asarray(actions)].sum(axis=1)


def test_without_evidence_the_table_stays(rng):
    table, actions = table_and_actions(rng, 4)
    empty = empty_evidence(4, len(table))
    np.testing.assert_array_equal(correct_table(table, empty), table)
    np.testing.assert_array_equal(correct_table(table, Evidence(actions, jnp.zeros(4))), table)


def test_is_ridge_regression_on_the_entries(rng):
    """δ minimizes Σ_e ((true − Σ s (1 + δ + δ₀)) / (σ true))² + Σ (δ / τ)² + (δ₀ / τ₀)², here in f64."""
    table, actions = table_and_actions(rng, 5)
    true = sums(table, actions) * rng.uniform(0.9, 1.1, 5)
    rows = np.zeros((5, table.size))
    for row, action in zip(rows.reshape(5, *table.shape), np.asarray(actions), strict=True):
        row[np.arange(len(table)), action] = np.asarray(table)[np.arange(len(table)), action]
    rows = np.concatenate([rows, rows.sum(axis=1, keepdims=True)], axis=1) / (true[:, None] * table_correction._NOISE)
    aim = (1 - sums(table, actions) / true) / table_correction._NOISE
    prior = np.array([table_correction._DEVIATION] * table.size + [table_correction._COMMON])
    *change, common = np.linalg.solve(rows.T @ rows + np.diag(prior**-2.0), rows.T @ aim)
    found = correct_table(table, Evidence(actions, jnp.asarray(true, jnp.float32)))
    expected = np.asarray(table) * np.maximum(1 + np.reshape(change, table.shape) + common, table_correction._LEAST)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_learns_what_a_table_gets_wrong(rng):
    """One tensor loses half as much again as its entries say: after 20 measurements the sums of others agree better."""
    table, actions = table_and_actions(rng, 40)
    true = sums(table.at[2].multiply(1.5), actions)
    seen = Evidence(actions[:20], jnp.asarray(true[:20], jnp.float32))
    errors = [np.abs(sums(t, actions[20:]) / true[20:] - 1).mean() for t in (table, correct_table(table, seen))]
    assert errors[1] < errors[0] / 3


def test_what_is_measured_twice_counts_once(rng):
    """A policy that has settled hands in the same allocation after every scan."""
    table, actions = table_and_actions(rng, 3)
    true = jnp.asarray(1.3 * sums(table, actions), jnp.float32)
    again = Evidence(jnp.concatenate([actions, actions[:1], actions[:1]]), jnp.concatenate([true, true[:1], true[:1]]))
    np.testing.assert_allclose(
        correct_table(table, again),
        correct_table(table, Evidence(actions, true)),
        rtol=1e-5,
    )


def test_a_table_that_is_small_throughout_grows_throughout(rng):
    """Where the truth is 1.3 times every sum, the whole table grows, not only what was measured."""
    table, actions = table_and_actions(rng, 20)
    true = jnp.asarray(1.3 * sums(table, actions), jnp.float32)
    growth = np.asarray(correct_table(table, Evidence(actions, true)) / table)
    assert np.median(growth) == pytest.approx(1.3, abs=0.1)


def test_notes_go_to_their_places(rng):
    _, actions = table_and_actions(rng, 3)
    evidence = add_evidence(
        empty_evidence(6, actions.shape[1]),
        Evidence(actions, jnp.array([1.0, 2.0, 3.0])),
        jnp.int32(3),
    )
    assert evidence.loss.tolist() == pytest.approx([0, 0, 0, 1, 2, 3])
    np.testing.assert_array_equal(evidence.action[3:], actions)
