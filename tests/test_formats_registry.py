"""Levels, `best`, checks, the cache, and properties that every format has."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from ramp_jax.formats import (
    DEFAULT_LEVELS,
    LEVEL_NAMES,
    LEVELS,
    encode,
    format_for,
    format_up_to,
    get_format,
    levels_of,
    ordered,
    round_trip,
    written,
)
from ramp_jax.formats.check import EncodeCache, check
from ramp_jax.formats.integers import BITS, GROUPS

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
BLOCKS += ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


def _weights(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, shape) * 0.02).astype(np.float32)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "IQ4_NL", "Q4_K"])
def test_every_row_may_have_its_own_importance(name: str) -> None:
    """Each is rounded as it is alone; one row of importance is that of all."""
    rng = np.random.default_rng(1)
    w, importance = _weights(0, (5, 512)), rng.exponential(size=(5, 512)).astype(np.float32) ** 3
    found = round_trip(w, name, importance)
    for i in range(5):
        np.testing.assert_array_equal(found[i], round_trip(w[i : i + 1], name, importance[i])[0])
    np.testing.assert_array_equal(round_trip(w, name, importance[:1]), round_trip(w, name, importance[0]))


def test_rows_that_blocks_do_not_divide_are_refused() -> None:
    for run in (encode, round_trip):
        with pytest.raises(ValueError, match="Q8_0 holds rows of a multiple of 32 weights, not 48"):
            run(_weights(0, (4, 48)), "Q8_0")


def test_levels() -> None:
    by_256 = {2: "Q2_K", 3: "Q3_K", 4: "IQ4_XS", 4.5: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
    assert {level: format_for(level, 512).name for level in LEVELS} == by_256
    by_32 = {4: "IQ4_NL", 5: "Q5_0", 6: "Q5_1", 8: "Q8_0"}
    assert {level: fmt.name for level in LEVELS if (fmt := format_for(level, 96))} == by_32
    assert format_for(8, 40) is None
    assert format_for(7, 512) is None


@pytest.mark.parametrize("n_in", [96, 512])
def test_level_means_one_thing(n_in: int) -> None:
    """The format that a level means has that level; Q4_0 and Q4_1, which none means, have one of their size."""
    means = {level: fmt for level in LEVELS if (fmt := format_for(level, n_in))}
    assert {level: fmt.level for level, fmt in means.items()} == {level: level for level in means}
    assert [get_format(name).level for name in ("Q4_0", "Q4_1")] == [4, 4.5]
    assert not {"Q4_0", "Q4_1"} & {fmt.name for fmt in means.values()}


def test_file_types_are_those_of_llama_cpp() -> None:
    floats = {"F32": 0, "F16": 1, "BF16": 32}
    legacy = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "IQ4_NL": 25, "MXFP4": 38}
    supers = {"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_XS": 30}
    lattices = {"IQ1_S": 24, "IQ1_M": 31, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ3_S": 26, "IQ2_S": 28}
    known = {**floats, **legacy, **supers, **lattices}
    assert {name: int(get_format(name).llama_ftype) for name in known} == known


def test_highest_level_that_rows_can_take() -> None:
    assert [format_up_to(level, 512).name for level in (4, 4.5, 7)] == ["IQ4_XS", "Q4_K", "Q6_K"]
    assert [format_up_to(level, 96).name for level in (4.5, 100)] == ["IQ4_NL", "Q8_0"]
    assert format_up_to(3, 96) is None


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("Q2_K", 2.625),
        ("Q3_K", 3.4375),
        ("Q4_K", 4.5),
        ("Q5_K", 5.5),
        ("Q6_K", 6.5625),
        ("IQ4_XS", 4.25),
        ("Q8_0", 8.5),
        ("MXFP4", 4.25),
        ("IQ1_S", 1.5625),
        ("IQ1_M", 1.75),
        ("IQ2_XXS", 2.0625),
        ("IQ2_XS", 2.3125),
        ("IQ2_S", 2.5625),
        ("IQ3_XXS", 3.0625),
        ("IQ3_S", 3.4375),
    ],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert get_format(name).bits_per_weight == bits


_GAINED = {"MXFP4": 0.95, "Q2_K": 0.95, "Q4_K": 0.96, "Q3_K": 0.98, **dict.fromkeys(BLOCKS[-7:], 0.95)}


@pytest.mark.parametrize("name", BLOCKS)
def test_best_is_never_worse(name: str) -> None:
    w = _weights(0, (32, 256))
    importance = np.random.default_rng(1).chisquare(1, 256).astype(np.float32) + np.float32(0.05)
    fmt = get_format(name)

    def errors(effort: str) -> np.ndarray:
        codes = encode(w, name, importance, effort)
        assert np.isfinite(fmt.decode(fmt.from_bytes(fmt.to_bytes(codes)))).all()
        off = np.asarray(fmt.decode(codes), np.float64) - w
        return (off * off * importance).reshape(-1, fmt.block_size).sum(-1)

    best, reference = errors("best"), errors("reference")
    assert (best <= reference * (1 + 1e-5)).all()
    assert best.sum() < reference.sum() * _GAINED.get(name, 1.0)


@pytest.mark.parametrize("name", ["Q2_K", "Q5_0", "IQ4_XS", "IQ1_S", "IQ2_XXS", "IQ3_S"])
def test_coarse_is_little_worse(name: str) -> None:
    w = _weights(0, (32, 256))
    importance = np.random.default_rng(1).chisquare(1, 256).astype(np.float32) + np.float32(0.05)

    def error(effort: str) -> float:
        off = np.asarray(round_trip(w, name, importance, effort), np.float64) - w
        return (off * off * importance).sum()

    assert error("coarse") < error("reference") * 1.06


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 1e3))
def test_error_falls_with_the_level(seed: int, scale: float) -> None:
    w = _weights(seed, (8, 512)) * np.float32(scale)
    errors = [np.square(np.asarray(round_trip(w, format_for(level, 512).name)) - w).sum() for level in LEVELS]
    assert errors == sorted(errors, reverse=True)


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31))
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "Q6_K"])
def test_sign_symmetry(name: str, seed: int) -> None:
    w = _weights(seed, (4, 512))
    assert np.array_equal(np.asarray(round_trip(-w, name)), -np.asarray(round_trip(w, name)))


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "IQ4_NL", "Q3_K", "Q4_K"])
def test_batching_changes_nothing(name: str) -> None:
    w = _weights(2, (3, 4, 256))
    fmt = get_format(name)
    whole = fmt.to_bytes(encode(w, name))
    rows = np.stack([fmt.to_bytes(encode(part, name)) for part in w])
    mapped = fmt.to_bytes(jax.jit(jax.vmap(functools.partial(encode, name=name)))(w))
    assert np.array_equal(whole, rows)
    assert np.array_equal(whole, mapped)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_integer_groups(bits: int, group: int) -> None:
    fmt = get_format(f"INT{bits}_G{group}")
    assert fmt.bits_per_weight == bits + 32 / group
    assert not fmt.exportable
    assert format_for(fmt.level, 256).exportable
    w = _weights(3, (8, 2 * group))
    step = np.ptp(np.concatenate([w.reshape(-1, group), np.zeros((16, 1), np.float32)], axis=1), axis=1) / (2**bits - 1)
    off = np.abs(np.asarray(round_trip(w, fmt.name)) - w).reshape(-1, group)
    assert (off <= step[:, None] * 1.1 + 1e-6).all()
    np.testing.assert_array_equal(round_trip(w, fmt.name, effort="best"), round_trip(w, fmt.name))
    with pytest.raises(ValueError, match="simulated only"):
        _ = fmt.ggml_type


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, i: (w * np.nan, i), "NaN"),
        (lambda w, i: (w + np.inf, i), "infinity"),
        (lambda w, i: (w + 1e9, i), "beyond its scales"),
        (lambda w, i: (w[:, :100], i), "no multiple of 256"),
        (lambda w, i: (w, i[:-1]), "importance has shape"),
        (lambda w, i: (w, -i), "negative or non-finite"),
    ],
)
def test_bad_input(change, message: str) -> None:
    w, importance = change(_weights(4, (2, 256)), np.ones(256, np.float32))
    with pytest.raises(ValueError, match=f"blk.0.attn_q.weight cannot be Q4_K: .*{message}"):
        check("blk.0.attn_q.weight", w, "Q4_K", importance)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("effort", ["reference", "best"])
def test_the_largest_weights_that_are_let_through_stay_finite(name: str, effort: str) -> None:
    limit = np.float32(get_format(name).largest)
    importance = np.ones(512, np.float32) if get_format(name).needs_importance else None
    w = np.zeros((2, 512), np.float32)
    w[:, 5], w[1, 300] = 0.999 * limit, -0.999 * limit
    check("a", w, name, importance)
    assert np.isfinite(np.asarray(round_trip(w, name, importance, effort))).all()
    with pytest.raises(ValueError, match="beyond its scales"):
        check("a", w * np.float32(1.01), name, importance)


def test_formats_that_need_importance_say_so() -> None:
    """Zeros count as ones."""
    w = _weights(4, (2, 256))
    np.testing.assert_array_equal(check("a", w, "IQ2_XS", np.zeros(256, np.float32)), np.ones(256))
    with pytest.raises(ValueError, match=r"a cannot be IQ2_XS: .*importance.*; calibrate.* or choose another format"):
        check("a", w, "IQ2_XS")
    with pytest.raises(ValueError, match="IQ2_XXS is rounded by importance only; calibrate"):
        encode(w, "IQ2_XXS")


def test_levels_are_written_as_numbers_or_names() -> None:
    assert levels_of(["8", "IQ3_S", "2", "IQ2_XXS", "3", "8"]) == ("IQ2_XXS", 2, 3, "IQ3_S", 8)
    assert levels_of(["4.5", "MXFP4", "IQ1_M", "4", "IQ1_S"]) == ("IQ1_S", "IQ1_M", "MXFP4", 4, 4.5)
    assert [written(level) for level in (4.5, 2, "IQ2_S")] == ["4.5", "2", "IQ2_S"]
    assert {"2", "4.5", "IQ2_XXS", "Q4_0", "MXFP4"} <= set(LEVEL_NAMES)
    assert not {"F16", "Q4_K"} & set(LEVEL_NAMES)
    with pytest.raises(ValueError, match="no format has level 7"):
        ordered([7, 8])


def test_lattices_are_offered_by_default() -> None:
    named = [level for level in DEFAULT_LEVELS if isinstance(level, str)]
    assert named == ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
    assert set(DEFAULT_LEVELS) == {*named, *LEVELS}
    sizes = [format_for(level, 256).bits_per_weight for level in DEFAULT_LEVELS]
    assert sizes == sorted(sizes)


def test_cache_encodes_once_and_zero_importance_is_none() -> None:
    cache, w = EncodeCache(), _weights(5, (4, 256))
    first = cache.encode("a", w, "Q4_K")
    assert cache.encode("b", w.copy(), "Q4_K", np.zeros(256, np.float32)) is first
    assert cache.hits == 1
    assert cache.encode("a", w, "Q4_K", effort="best") is not first
    assert cache.encode("a", w + 1, "Q4_K") is not first
