"""True losses inside jit against fake-quantized models, one allocation after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ramp_jax.allocation import costs, from_levels
from ramp_jax.formats import format_for
from ramp_jax.models import allocatable
from ramp_jax.quantization import fake_quantize
from ramp_jax.scoring import variants
from ramp_jax.scoring.perplexity import evaluate

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LEVELS = (3, 4, 5, 8)


def test_matrices_that_no_block_can_hold_are_rounded_to_f16(odd, windows, rng):
    test_true_losses_are_those_of_fake_quantized_models(odd, windows, rng, "sliding")


@pytest.mark.parametrize("protocol", ["llama.cpp", "sliding"])
def test_true_losses_are_those_of_fake_quantized_models(model, windows, rng, protocol):
    """Every tensor at its own level, in two models, of which one has a head of its own."""
    other = dataclasses.replace(model, params=jax.tree.map(lambda w: 1.01 * w, model.params))
    prepared = variants.prepare(model, other, windows, costs(model, LEVELS), protocol)
    members = allocatable(model.spec)
    valid = [[i for i, level in enumerate(LEVELS) if format_for(level, t.shape[-1])] for t in members]
    actions = np.array([[rng.choice(row) for row in valid] for _ in range(4)], np.int32)
    together = jax.lax.map(lambda action: variants.mean_kld(prepared, action), jnp.asarray(actions))
    for action, found in zip(actions, together, strict=True):
        params = fake_quantize(model, from_levels(model, [LEVELS[a] for a in action]))
        expected = evaluate(model, windows, params=params, reference=other, protocol=protocol).mean_kld
        assert float(found) == pytest.approx(expected, rel=1e-3)
        assert variants.measuring(prepared)(action) == pytest.approx(expected, rel=1e-3)


def test_what_is_not_a_number_is_infinite(model, windows):
    prepared = variants.prepare(model, model, windows, costs(model, LEVELS))
    action = jnp.full(len(allocatable(model.spec)), 3, jnp.int32)
    assert np.isfinite(variants.mean_kld(prepared, action))
    for name in ("runs", "others", "top", "output_norm"):
        spoiled = jax.tree.map(lambda a: a * jnp.nan if a.dtype == jnp.float32 else a, getattr(prepared, name))
        assert np.isinf(variants.mean_kld(prepared.replace(**{name: spoiled}), action)), name
