"""Losses and divergences against NumPy over whole logits."""

import dataclasses
import math

import numpy as np
import pytest
import tiny
from scipy.special import log_softmax

from ramp_jax import data, sweep
from ramp_jax.allocation import from_levels
from ramp_jax.models.decoder import Head
from ramp_jax.quantization import fake_quantize
from ramp_jax.scoring import perplexity
from ramp_jax.scoring.perplexity import evaluate, head_scores
from ramp_jax.scoring.scores import Evaluation

FIRST = {"sliding": 0, "llama.cpp": 12}


def log_probabilities(model, windows, start):
    """Log-probabilities f64 of the tokens after positions start..T − 2: `[W, T − 1 − start, V]`."""
    return log_softmax(np.asarray(model.logits(windows), np.float64), axis=-1)[:, start:-1]


def divergence(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


@pytest.fixture(scope="module")
def quantized(untied):
    params = fake_quantize(untied, from_levels(untied, [4] * 23))
    return dataclasses.replace(untied, params=params)


@pytest.mark.parametrize("protocol", FIRST)
def test_losses_equal_numpy(model, windows, protocol):
    start = FIRST[protocol]
    result = evaluate(model, windows, protocol=protocol)
    log_p = log_probabilities(model, windows, start)
    expected = -np.take_along_axis(log_p, windows[:, start + 1 :, None], axis=-1).reshape(-1)
    assert result.nll.shape == (3 * (23 - start),)
    np.testing.assert_allclose(result.nll, expected, atol=2e-5, rtol=0)
    assert result.ppl == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert result.kld is None
    assert math.isnan(result.mean_kld)


def test_losses_of_windows_longer_than_a_chunk_of_the_head(untied, quantized):
    windows = data.windows("builtin", untied.tokenizer, context=200, count=2, split="heldout")
    result = evaluate(quantized, windows, reference=untied, protocol="sliding")
    log_p, log_q = (log_probabilities(m, windows, 0) for m in (untied, quantized))
    expected = -np.take_along_axis(log_q, windows[:, 1:, None], axis=-1).reshape(-1)
    np.testing.assert_allclose(result.nll, expected, atol=2e-5, rtol=0)
    np.testing.assert_allclose(result.kld, divergence(log_p, log_q).reshape(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("module", "limit", "value"),
    [(sweep, "_TOKENS_AT_ONCE", 2 * 24), (perplexity, "_NUMBERS_AT_ONCE", 2 * 24 * 64)],
    ids=["batches", "groups"],
)
def test_windows_in_batches_score_as_they_do_alone(untied, quantized, windows, monkeypatch, module, limit, value):
    """Three windows in batches of two; the fourth of the second batch only fills it. Or two sweep, then one."""
    alone = [evaluate(quantized, window[None], reference=untied) for window in windows]
    monkeypatch.setattr(module, limit, value)
    together = evaluate(quantized, windows, reference=untied)
    for name in ("nll", "kld", "ref_nll"):
        expected = np.concatenate([getattr(found, name) for found in alone])
        np.testing.assert_allclose(getattr(together, name), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("protocol", FIRST)
def test_divergence_from_the_reference_equals_numpy(untied, quantized, windows, protocol):
    result = evaluate(quantized, windows, reference=untied, protocol=protocol)
    log_p, log_q = (log_probabilities(m, windows, FIRST[protocol]) for m in (untied, quantized))
    expected = divergence(log_p, log_q)
    assert expected.mean() > 0.01
    np.testing.assert_allclose(result.kld, expected.reshape(-1), atol=1e-5, rtol=0)
    assert result.mean_kld == pytest.approx(expected.mean(), abs=1e-5)


def test_other_parameters_are_scored_in_place_of_the_model_s(untied, quantized, windows):
    np.testing.assert_array_equal(
        evaluate(untied, windows, params=quantized.params).nll, evaluate(quantized, windows).nll
    )


def test_divergence_from_itself_is_zero(model, windows):
    np.testing.assert_allclose(evaluate(model, windows, reference=model).kld, 0, atol=1e-7)


def test_losses_by_hand():
    head = Head(np.eye(2, dtype=np.float32))
    x = np.log(np.array([[3, 1], [1, 1]], np.float32))  # p = (3/4, 1/4), (1/2, 1/2)
    reference = np.log(np.array([[1, 1], [1, 3]], np.float32))  # p = (1/2, 1/2), (1/4, 3/4)
    nll, kld, *_ = head_scores(x, head, np.array([0, 1], np.int32), reference, head)
    np.testing.assert_allclose(nll, [math.log(4 / 3), math.log(2)], rtol=1e-6)
    expected = [math.log(4 / 3) / 2, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)]
    np.testing.assert_allclose(kld, expected, rtol=1e-5)


def test_means_by_hand():
    result = Evaluation(np.array([1, 2, 3], np.float32), np.array([0.5, 0, 0.25], np.float32))
    assert result.mean_nll == 2
    assert result.ppl == pytest.approx(math.e**2)
    assert result.mean_kld == 0.25


def poisoned(model, windows):
    """The model with an embedding that is not a number for a token that only the second window holds."""
    token = np.setdiff1d(windows[1], windows[[0, 2]])[0]
    return tiny.changed(model, "token_embd.weight", lambda w: w.at[token].set(np.nan))


def test_loss_that_is_not_finite_names_the_window(untied, windows):
    with pytest.raises(ValueError, match="loss of window 1 is not finite"):
        evaluate(untied, windows, params=poisoned(untied, windows).params, protocol="sliding")


def test_reference_that_is_not_finite_names_the_window(untied, windows):
    with pytest.raises(ValueError, match="window 1 is not finite"):
        evaluate(untied, windows, reference=poisoned(untied, windows), protocol="sliding")
