"""Encoders make ggml's bytes, or blocks with exactly its error; decoders its weights."""

import functools

import jax
import numpy as np
import pytest

from ramp_jax.formats import encode, get_format
from ramp_jax.halo import libggml
from ramp_jax.models import load_model
from ramp_jax.models.layout import Params

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
SUPER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
LATTICE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
EVERY = LEGACY + SUPER + LATTICE
PLAIN = tuple(name for name in EVERY if not get_format(name).needs_importance)


def _inputs(n_in: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n_in)
    gauss = rng.standard_normal((16, n_in)).astype(np.float32)
    outlier = gauss[:4] * np.float32(0.01)
    outlier[:, 37 % n_in] = 5
    holes = gauss[:4].copy()
    holes[:, : n_in // 3] = 0
    return {
        "gaussian": gauss,
        "student_t": (rng.standard_t(3, (16, n_in)) * 0.02).astype(np.float32),
        "zero": np.zeros((2, n_in), np.float32),
        "constant": np.full((2, n_in), 0.7, np.float32),
        "negative constant": np.full((2, n_in), -0.3, np.float32),
        "outlier": outlier,
        "holes": holes,
        "f16 subnormal scales": gauss[:4] * np.float32(1e-4),
        "alternating": np.tile(np.float32([1, -1]), (2, n_in // 2)) * np.abs(gauss[:2, :1]),
        "signed zeros": _signed_zeros(n_in),
    }


def _signed_zeros(n_in: int) -> np.ndarray:
    """Rows of +0 and −0, then the same with every third weight positive or negative.

    The first zero of a block decides its minimum's sign, none that of its largest magnitude.
    """
    rng, column = np.random.default_rng(0), np.arange(n_in)
    negative = [
        *(column < 0, column >= 0, column % 2 == 0, column % 2 == 1),
        *(column % 32 == 0, column % 32 != 0, column % 32 == 31, column % 32 != 31, column % 256 == 0),
        *(rng.random((4, n_in)) < 0.5),
    ]
    zeros = np.where(negative, np.float32(-0.0), np.float32(0.0))
    mixed = np.where(column % 3 == 1, np.abs(rng.standard_normal(n_in)).astype(np.float32), zeros)
    return np.concatenate([zeros, mixed, np.where(column % 3 == 1, -mixed, zeros)])


def _weighted_error(name: str, raw: np.ndarray, w: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    off = np.square(libggml.dequantize(name, raw).astype(np.float64) - w)
    return (off if importance is None else off * importance).reshape(-1, get_format(name).block_size).sum(-1)


def _zeros_before_others(w: np.ndarray) -> np.ndarray:
    """Superblocks in which a sub-block of 32 zeros stands before one of others."""
    some = w.reshape(-1, 8, 32).any(-1)
    return (~some & np.flip(np.maximum.accumulate(np.flip(some, 1), axis=1), 1)).any(1)


def _assert_parity(name: str, w: np.ndarray, importance: np.ndarray | None, least: float) -> None:
    fmt = get_format(name)
    ours = fmt.to_bytes(encode(w, name, importance))
    theirs = libggml.quantize(name, w, importance)
    same = (ours.reshape(-1, fmt.block_bytes) == theirs.reshape(-1, fmt.block_bytes)).all(-1)
    a, b = (_weighted_error(name, raw, w, importance) for raw in (ours, theirs))
    gap = np.where(same, 0, np.abs(a - b) / np.maximum(b, 1e-30))
    if name == "IQ3_S":  # ggml misplaces what follows a sub-block of zeros
        misplaced = _zeros_before_others(w)
        assert (a[misplaced] <= b[misplaced]).all()
        same, gap = same | misplaced, np.where(misplaced, 0, gap)
    worst = int(np.argmax(gap))
    report = f"{name}: {same.mean():.5f} of {same.size} blocks equal; worst block {worst}: errors {a[worst]} {b[worst]}"
    assert same.mean() >= least, report
    assert gap[worst] <= 1e-4, report


@pytest.mark.parametrize(("name", "weighted"), [(name, True) for name in EVERY] + [(name, False) for name in PLAIN])
def test_reference_bytes(name: str, weighted: bool) -> None:
    n_in = 1024
    importance = np.random.default_rng(1).chisquare(1, n_in).astype(np.float32) if weighted else None
    w = np.concatenate(list(_inputs(n_in).values()))
    _assert_parity(name, w, importance, 1.0 if name in LEGACY else 0.999)


@pytest.mark.parametrize("n_in", [256, 768])
def test_row_lengths(n_in: int) -> None:
    w = _inputs(n_in)["student_t"]
    importance = np.random.default_rng(2).chisquare(1, n_in).astype(np.float32)
    _assert_parity("Q4_K", w, importance, 1.0)


@pytest.mark.parametrize("name", EVERY)
def test_decode_and_bytes_on_random_bytes(name: str) -> None:
    fmt = get_format(name)
    raw = np.random.default_rng(3).integers(0, 256, (16, fmt.row_bytes(1024)), dtype=np.uint8)
    codes = fmt.from_bytes(raw)
    stored = _one_zero(raw) if name == "MXFP4" else raw
    assert np.array_equal(fmt.to_bytes(codes), stored)
    ours, theirs = np.asarray(jax.jit(fmt.decode)(codes)), _without_denormals(libggml.dequantize(name, raw))
    finite = np.isfinite(theirs)
    assert np.array_equal(np.isfinite(ours), finite)
    np.testing.assert_array_equal(ours[finite], theirs[finite])


def _without_denormals(w: np.ndarray) -> np.ndarray:
    """Zeros in their place, as XLA on CPUs has it."""
    return np.where(np.abs(w) < np.finfo(np.float32).tiny, np.float32(0), w)


def _one_zero(raw: np.ndarray) -> np.ndarray:
    """FP4 has a zero with a sign too, which means the same and is written without."""
    blocks = raw.reshape(-1, 17).copy()
    for shift in (0, 4):
        blocks[:, 1:] -= np.where(blocks[:, 1:] >> shift & 15 == 8, 8 << shift, 0).astype(np.uint8)
    return blocks.reshape(raw.shape)


def test_every_exponent_of_mxfp4() -> None:
    """The largest overflow as in C; f32 denormals are zeros here."""
    raw = np.random.default_rng(4).integers(0, 256, (256, 17), dtype=np.uint8)
    raw[:, 0] = np.arange(256)
    ours = np.asarray(jax.jit(get_format("MXFP4").decode)(get_format("MXFP4").from_bytes(raw)))
    theirs = _without_denormals(libggml.dequantize("MXFP4", raw))
    np.testing.assert_array_equal(ours, theirs)
    assert np.isinf(theirs).any()
    assert theirs[0].any()


def test_peaks_just_below_a_power_of_two() -> None:
    """Their logarithm, rounded to f32, may be that of the power, which doubles MXFP4's scale."""
    powers = np.ldexp(np.float32(1), np.arange(-120, 127)).view(np.int32)
    w = np.zeros((len(powers), 100, 32), np.float32)
    w[..., 3] = (powers[:, None] - np.arange(100, dtype=np.int32)).view(np.float32)
    w[..., 4] = w[..., 3] / -3
    _assert_parity("MXFP4", w.reshape(len(powers), -1), None, 1.0)


@functools.cache
def _real_blocks() -> Params:
    return load_model("smollm2-135m", dtype="float32").params["blk"]


@pytest.mark.parametrize(
    "name", ["IQ4_NL", "MXFP4", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_S", "IQ3_S"]
)
def test_real_weights(name: str) -> None:
    blk = _real_blocks()
    key = "ffn_down" if get_format(name).block_size == 256 else "attn_q"
    for layer in (0, 29):
        w = np.asarray(blk[layer][key]["weight"], np.float32)
        _assert_parity(name, w, None, 0.999)
