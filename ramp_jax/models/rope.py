"""Rotary positions: which angles the dimensions of a head turn by, with the ways to stretch them over long contexts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Rotation = tuple[Float[Array, "T R"], Float[Array, "T R"]]
"""Cosines and sines of R rotated pairs of dimensions at T positions."""


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023): fast dimensions extrapolate, slow ones interpolate, a ramp lies between.

    The ramp runs between the dimensions that turn `beta_fast` and `beta_slow` times in `original_context` positions.
    """

    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def extrapolated(self, theta: float, size: int) -> Float[np.ndarray, " R"]:
        """Per rotated pair of `size` dimensions: 1 where the frequency stays, 0 where it is divided by the factor."""
        first, last = (
            size * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
        ramp = (np.arange(size // 2, dtype=np.float32) - first) / max(last - first, 0.001)
        return 1 - np.clip(ramp, 0, 1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of the first `size` dimensions of every head, base frequency `theta`.

    Frequencies are divided by `factor` (linear scaling; with `yarn`, the slow ones only), and one by one by `factors`
    where there are any: those of Llama 3, or LongRoPE's for short contexts, which `long_factors` replace in sequences
    of more than `original_context` tokens. `magnitude` multiplies cosines and sines.
    """

    theta: float
    size: int
    factor: float = 1.0
    yarn: Yarn | None = None
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    original_context: int = 0
    magnitude: float = 1.0

    def frequencies(self, time: int) -> Float[np.ndarray, " R"]:
        """Radians per position of every rotated pair in a sequence of `time` tokens, f32."""
        plain = _plain(self.theta, self.size)
        long = bool(self.long_factors) and time > self.original_context
        divisors = np.asarray((self.long_factors if long else self.factors) or (1.0,), np.float32)
        stretched = plain / divisors / np.float32(self.factor)
        if self.yarn is None:
            return stretched
        kept = self.yarn.extrapolated(self.theta, self.size)
        return stretched * (1 - kept) + plain / divisors * kept

    def rotation(self, time: int) -> Rotation:
        """Cosines and sines of positions 0..time − 1.

        They are constants of compiled functions: XLA would fuse them into every head's rotation and compute them there
        again, which costs a forward pass on a CPU a fifth of its time.
        """
        with jax.ensure_compile_time_eval():
            angle = jnp.arange(time, dtype=jnp.float32)[:, None] * jnp.asarray(self.frequencies(time))[None, :]
            return jnp.cos(angle) * self.magnitude, jnp.sin(angle) * self.magnitude


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotary positions: of the R rotated pairs, dimension i turns with dimension i + R (HF order); the rest stay."""
    cos, sin = (table[None, :, None, :] for table in rotation)
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _plain(theta: float, size: int) -> Float[np.ndarray, " R"]:
    """Radians per position of every pair of `size` dimensions without any scaling, f32."""
    half = size // 2
    return (theta ** (-np.arange(half) / half)).astype(np.float32)


def llama3_factors(
    theta: float, size: int, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> tuple[float, ...]:
    """What divides the frequencies of `size` rotated dimensions in Llama 3.1 and later.

    Wavelengths above `original_context / low_freq_factor` are divided by `factor`, those below `original_context /
    high_freq_factor` stay, and between them the frequency is interpolated.
    """
    turns = original_context * _plain(theta, size) / np.float32(2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return tuple(float(f) for f in (1 / ((1 - kept) / factor + kept)).astype(np.float32))


def permute_rope(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[O, ...]` from HF order (halves rotate together) to GGUF llama order (neighbours rotate together)."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute_rope(w: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of `permute_rope`."""
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
