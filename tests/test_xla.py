"""Sums that XLA must not get wrong, and the flags that see to it."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ramp_jax.models.decoder import rms_norm
from ramp_jax.xla import set_flags

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
OTHER = "--xla_gpu_enable_triton_gemm=false"


def test_gradients_of_a_norm_are_right_in_large_batches(rng):
    """16 × 2 × 128 × 256 elements under vmap, against NumPy in f64; jaxlib 0.10.2 is 8 % off without the flag."""
    x = rng.normal(size=(2, 128, 256))
    g = rng.normal(size=(16, *x.shape))

    def norm(x):
        return rms_norm(x, jnp.ones(x.shape[-1]), 1e-5)

    @jax.jit
    def pulled(x, g):
        return jax.vmap(jax.vjp(norm, x)[1])(g)[0]

    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    expected = g * r - x * r**3 * np.mean(g * x, axis=-1, keepdims=True)
    found = pulled(jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("version", "before", "after"),
    [
        ((0, 10, 2), "", f"{FLAG}=-reduce {OTHER}"),
        ((0, 11, 0), "--xla_other=1", f"--xla_other=1 {FLAG}=-reduce {OTHER}"),
        ((0, 10, 2), f"{FLAG}=", f"{FLAG}= {OTHER}"),  # who asks for another treatment gets it
        ((0, 10, 2), f"{FLAG}= {OTHER}", f"{FLAG}= {OTHER}"),
        ((0, 11, 0), f"{FLAG}_other=1", f"{FLAG}_other=1 {FLAG}=-reduce {OTHER}"),
        ((0, 10, 1), "", ""),  # does not know the first flag's values
        ((0, 12, 0), "", ""),  # may not know a flag
    ],
)
def test_flags_are_set_where_they_are_known(monkeypatch, version, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    set_flags(version)
    assert os.environ["XLA_FLAGS"] == after
