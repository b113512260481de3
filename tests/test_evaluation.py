"""Losses and divergences against NumPy over whole logits, and the sensitivity table against the plain loop."""

import dataclasses
import math

import gguf
import numpy as np
import pytest
from scipy.special import log_softmax

from ramp_jax import data
from ramp_jax.allocation import from_levels
from ramp_jax.evaluation.perplexity import evaluate, head_losses
from ramp_jax.evaluation.scores import Evaluation
from ramp_jax.evaluation.sensitivity import Sensitivity, exact_sensitivity
from ramp_jax.formats import format_for
from ramp_jax.models import allocatable, lookup
from ramp_jax.quantization import fake_quantize

LEVELS = (4, 5, 8)
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
    assert result.mean_kld is None


def test_losses_of_windows_longer_than_a_chunk_of_the_head(untied, quantized):
    windows = data.windows("builtin", untied.tokenizer, context=200, count=2, split="heldout")
    result = evaluate(quantized, windows, reference=untied, protocol="sliding")
    log_p, log_q = (log_probabilities(m, windows, 0) for m in (untied, quantized))
    expected = -np.take_along_axis(log_q, windows[:, 1:, None], axis=-1).reshape(-1)
    np.testing.assert_allclose(result.nll, expected, atol=2e-5, rtol=0)
    np.testing.assert_allclose(result.kld, divergence(log_p, log_q).reshape(-1), atol=1e-5, rtol=0)


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
    head = np.eye(2, dtype=np.float32)
    x = np.log(np.array([[3, 1], [1, 1]], np.float32))  # p = (3/4, 1/4), (1/2, 1/2)
    reference = np.log(np.array([[1, 1], [1, 3]], np.float32))  # p = (1/2, 1/2), (1/4, 3/4)
    nll, kld = head_losses(x, head, np.array([0, 1], np.int32), reference, head)
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
    return {**model.params, "token_embd": model.params["token_embd"].at[token].set(np.nan)}


def test_loss_that_is_not_finite_names_the_window(untied, windows):
    with pytest.raises(ValueError, match="loss of window 1 is not finite"):
        evaluate(untied, windows, params=poisoned(untied, windows), protocol="sliding")


def test_reference_that_is_not_finite_names_the_window(untied, windows):
    reference = dataclasses.replace(untied, params=poisoned(untied, windows))
    with pytest.raises(ValueError, match="window 1 is not finite"):
        evaluate(untied, windows, reference=reference, protocol="sliding")


def replaced(model, tensor, level):
    """The model with one tensor quantized by gguf-py."""
    w = lookup(model.params, tensor)
    ggml_type = format_for(level, tensor.shape[-1]).ggml_type
    new = gguf.quants.dequantize(gguf.quants.quantize(np.asarray(w), ggml_type), ggml_type)
    if tensor.layer is None:
        params = {**model.params, tensor.key: new}
    else:
        stacked = model.params["blk"][tensor.key].at[tensor.layer].set(new)
        params = {**model.params, "blk": {**model.params["blk"], tensor.key: stacked}}
    return dataclasses.replace(model, params=params)


def test_sensitivity_equals_the_plain_loop(model, windows):
    table = exact_sensitivity(model, windows, LEVELS)
    members = allocatable(model.spec)
    assert table.tensors == tuple(t.name for t in members)
    assert table.levels == LEVELS
    log_p = log_probabilities(model, windows, FIRST["llama.cpp"])
    expected = np.array(
        [
            [divergence(log_p, log_probabilities(replaced(model, t, level), windows, 12)).mean() for level in LEVELS]
            for t in members
        ]
    )
    assert expected.min() > 1e-6
    np.testing.assert_allclose(table.kld, expected, rtol=1e-4, atol=1e-7)
    assert (expected[:, 0] > expected[:, 2]).all()


def test_sensitivity_of_bf16_weights_is_near(untied, windows):
    table, expected = (exact_sensitivity(m, windows, (4, 5)) for m in (untied.astype("bfloat16"), untied))
    np.testing.assert_allclose(table.kld, expected.kld, rtol=0.5)


def test_masked_levels_have_no_cost(untied, windows):
    table = exact_sensitivity(untied, windows[:1], (7, 8))
    np.testing.assert_array_equal(table.kld[:, 0], 0)
    assert (table.kld[:, 1] > 0).all()


def test_table_saved_and_loaded(tmp_path):
    table = Sensitivity(("a.weight", "blk.0.b.weight"), (4, 8), np.array([[0.5, 0.25], [1e-9, 0.0]]))
    table.save(tmp_path / "table.npz")
    loaded = Sensitivity.load(tmp_path / "table.npz")
    assert (loaded.tensors, loaded.levels) == (table.tensors, table.levels)
    assert all(isinstance(level, int) for level in loaded.levels)
    np.testing.assert_array_equal(loaded.kld, table.kld)
