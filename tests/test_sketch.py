"""What tells a model's weights from another's: rounding does not, tuning does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ramp_jax.allocation import Allocation
from ramp_jax.models.sketch import same, sketch
from ramp_jax.quantization import fake_quantize


def changed(model, change):
    """The model with every matrix changed."""
    params = jax.tree.map(lambda w: change(w) if w.ndim == 2 else w, model.params)
    return dataclasses.replace(model, params=params)


def test_rounding_leaves_it_and_tuning_does_not(model, rng):
    known = sketch(model)
    assert len(known) == 8
    rounded = dataclasses.replace(model, params=fake_quantize(model, Allocation.uniform(model, "Q8_0")))
    for other in (model.astype(jnp.bfloat16), model.astype(jnp.float16), rounded):
        assert same(known, sketch(other))
    tuned = changed(model, lambda w: w + 0.1 * w.std() * rng.standard_normal(w.shape, dtype=np.float32))
    assert not same(known, sketch(tuned))
    assert not same(known, known[:-1])


def test_an_allocation_for_other_weights_is_refused(untied, tmp_path):
    path = tmp_path / "alloc.json"
    Allocation.uniform(untied, "Q5_0").save(path, weights=sketch(untied))
    assert Allocation.load(path, untied.astype(jnp.bfloat16)).formats
    with pytest.raises(ValueError, match=r"alloc\.json is not an allocation of .* other weights of the same shapes"):
        Allocation.load(path, changed(untied, lambda w: w[::-1]))
