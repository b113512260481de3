"""Tables that agree with measurements: against the regression written out, and on tables that are wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
from tables import random_table

from ramp_jax.policy import anchor
from ramp_jax.policy.anchor import Evidence


def table_and_actions(rng, count):
    loss, cost = random_table(rng, masked=0.0)
    return loss, jnp.asarray(rng.integers(0, cost.shape[1], (count, len(cost))), jnp.int32)


def sums(table, actions):
    return np.asarray(table, np.float64)[np.arange(len(table)), np.asarray(actions)].sum(axis=1)


def test_without_evidence_the_table_stays(rng):
    table, actions = table_and_actions(rng, 4)
    empty = anchor.no_evidence(4, len(table))
    np.testing.assert_array_equal(anchor.anchored(table, empty), table)
    np.testing.assert_array_equal(anchor.anchored(table, Evidence(actions, jnp.zeros(4))), table)


def test_is_ridge_regression_on_the_entries(rng):
    """δ minimizes Σ_e ((true − Σ s (1 + δ)) / (σ true))² + Σ (δ / τ)², here solved entry by entry in f64."""
    table, actions = table_and_actions(rng, 5)
    true = sums(table, actions) * rng.uniform(0.9, 1.1, 5)
    rows = np.zeros((5, table.size))
    for row, action in zip(rows.reshape(5, *table.shape), np.asarray(actions), strict=True):
        row[np.arange(len(table)), action] = np.asarray(table)[np.arange(len(table)), action]
    rows /= true[:, None] * anchor._NOISE
    aim = (1 - sums(table, actions) / true) / anchor._NOISE
    change = np.linalg.solve(rows.T @ rows + np.eye(table.size) / anchor._DEVIATION**2, rows.T @ aim)
    found = anchor.anchored(table, Evidence(actions, jnp.asarray(true, jnp.float32)))
    expected = np.asarray(table) * np.maximum(1 + change.reshape(table.shape), anchor._LEAST)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_learns_what_a_table_gets_wrong(rng):
    """One tensor loses half as much again as its entries say: after 20 measurements the sums of others agree better."""
    table, actions = table_and_actions(rng, 40)
    true = sums(table.at[2].multiply(1.5), actions)
    seen = Evidence(actions[:20], jnp.asarray(true[:20], jnp.float32))
    errors = [np.abs(sums(t, actions[20:]) / true[20:] - 1).mean() for t in (table, anchor.anchored(table, seen))]
    assert errors[1] < errors[0] / 3


def test_notes_go_to_their_places(rng):
    _, actions = table_and_actions(rng, 3)
    evidence = anchor.noted(
        anchor.no_evidence(6, actions.shape[1]), Evidence(actions, jnp.array([1.0, 2.0, 3.0])), jnp.int32(3)
    )
    assert evidence.loss.tolist() == pytest.approx([0, 0, 0, 1, 2, 3])
    np.testing.assert_array_equal(evidence.action[3:], actions)
