"""Small tables of losses and sizes, by hand and random."""

import jax.numpy as jnp
import numpy as np

TENSORS, LEVELS = 6, 3
# one trade per tensor: 3 nats for 2 units, 1.5 nats for 3 units
LOSS = jnp.array([[4.0, 1.0], [2.0, 0.5]], jnp.float32)
COST = jnp.array([[2, 4], [3, 6]], jnp.int32)


def random_table(rng, masked=0.2):
    """Losses that fall with the level, over four orders of magnitude; masked cells hold 0 in both tables."""
    loss = np.sort(np.exp(rng.normal(-4, 2, (TENSORS, LEVELS))), axis=1)[:, ::-1]
    cost = np.sort(rng.integers(1, 300, (TENSORS, LEVELS)) * 4 + np.arange(LEVELS), axis=1)
    valid = rng.random(loss.shape) >= masked
    valid[:, -1] = True
    return jnp.asarray(loss * valid, jnp.float32), jnp.asarray(cost * valid, jnp.int32)
