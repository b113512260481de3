"""The exact table against the plain loop, its noise floor, one compilation, resuming bit for bit; Fisher beside it."""

import dataclasses
import itertools
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import log_softmax
from scipy.stats import spearmanr

from ramp_jax import sweep, workflow
from ramp_jax.config import RunConfig, WindowsConfig
from ramp_jax.formats import format_for
from ramp_jax.halo import libggml
from ramp_jax.models import allocatable, decoder, lookup
from ramp_jax.models.decoder import Head
from ramp_jax.scoring.perplexity import divergence, mean_divergences
from ramp_jax.sensitivity import exact, fisher
from ramp_jax.sensitivity.exact import exact_sensitivity
from ramp_jax.sensitivity.fisher import fisher_sensitivity
from ramp_jax.sensitivity.table import Sensitivity

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LEVELS = (4, 5, 8)
MEASURES = {"exact": exact_sensitivity, "fisher": fisher_sensitivity}


def log_probabilities(model, windows):
    """Log-probabilities f64 of the tokens that protocol llama.cpp scores in windows of 24: `[W, 11, V]`."""
    return log_softmax(np.asarray(model.logits(windows), np.float64), axis=-1)[:, 12:-1]


def mean_kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()


def quantized(model, tensor, level):
    """The model with one tensor quantized by gguf-py."""
    ggml_type = format_for(level, tensor.shape[-1]).ggml_type
    raw = libggml.quantize(ggml_type.name, np.asarray(lookup(model.params, tensor)))
    return tiny.changed(model, tensor.name, lambda _: libggml.dequantize(ggml_type.name, raw))


def plain_loop(model, windows):
    """The table by whole forward passes, in f64 from the logits on: `[T, A]`."""
    log_p = log_probabilities(model, windows)
    return np.array(
        [
            [mean_kl(log_p, log_probabilities(quantized(model, t, level), windows)) for level in LEVELS]
            for t in allocatable(model.spec)
        ]
    )


@pytest.fixture(scope="module")
def table(untied, windows):
    return exact_sensitivity(untied, windows, LEVELS)


def test_exact_equals_the_plain_loop(model, windows):
    found = exact_sensitivity(model, windows, LEVELS)
    expected = plain_loop(model, windows)
    assert found.tensors == tuple(t.name for t in allocatable(model.spec))
    assert found.levels == LEVELS
    assert expected.min() > 1e-6
    np.testing.assert_allclose(found.kld, expected, rtol=1e-4, atol=1e-7)
    assert (expected[:, 0] > expected[:, 2]).all()


def test_batch_size_changes_nothing(untied, windows, table, monkeypatch):
    """Batches of 5 variants, so that the last of a layer's 21 cells is filled up; the first holds the nudge."""
    monkeypatch.setattr(exact, "_TOKENS_AT_ONCE", 5 * windows.size)
    found = exact_sensitivity(untied, windows, LEVELS)
    np.testing.assert_allclose(found.kld, table.kld, rtol=1e-5)
    np.testing.assert_allclose(found.floor, table.floor, rtol=0.5, atol=1e-12)


@pytest.mark.parametrize("chosen", [("blk.1.ffn_up.weight", "output.weight"), ("token_embd.weight", "output.weight")])
def test_tensors_can_be_chosen(untied, windows, table, chosen):
    some = exact_sensitivity(untied, windows, LEVELS, tensors=chosen)
    assert some.tensors == chosen
    np.testing.assert_allclose(some.kld, table.kld[[table.tensors.index(name) for name in chosen]], rtol=1e-5)


def test_all_layers_share_one_compilation(untied, windows, monkeypatch):
    names = [t.name for t in allocatable(untied.spec) if t.layer is not None]
    counted = chex.assert_max_traces(decoder.block_forward.__wrapped__, n=2)
    counted = jax.jit(counted, static_argnames="block")
    for module in (exact, sweep):
        monkeypatch.setattr(module, "block_forward", counted)
    monkeypatch.setattr(exact, "_TOKENS_AT_ONCE", 5 * windows.size)
    exact_sensitivity(untied, windows, LEVELS, tensors=names)  # the windows on their own, and every batch


def test_floor_lies_far_below_the_costs(table):
    assert table.floor.shape == (len(table.tensors),)
    assert (table.floor >= 0).all()
    assert (table.floor < 1e-5 * table.kld.min(axis=1)).all()


def test_floor_of_bf16_is_rounding_that_flips(untied, windows, table):
    found = exact_sensitivity(untied.astype("bfloat16"), windows, (8,), tensors=table.tensors[:8])
    assert (found.floor > 1e3 * table.floor[:8]).all()
    assert (found.kld[:, 0] > found.floor).all()


def test_divergence_of_tiny_changes_keeps_its_digits(rng):
    """Against f64, where Σ p (log p − log q) in f32 would be rounding alone."""
    logits = rng.normal(0, 3, (4, 5000))
    change = rng.normal(0, 1e-4, logits.shape)
    log_p, log_q = log_softmax(logits, axis=-1), log_softmax(logits + change, axis=-1)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    assert expected.max() < 1e-8
    single = [a.T.astype(np.float32) for a in (np.exp(log_p), log_p, log_q)]
    np.testing.assert_allclose(divergence(*single), expected, rtol=2e-2)


def test_divergence_of_large_changes(rng):
    logits = rng.normal(0, 30, (2, 6, 50))
    log_p, log_q = log_softmax(logits, axis=-1)
    found = divergence(*(a.T.astype(np.float32) for a in (np.exp(log_p), log_p, log_q)))
    np.testing.assert_allclose(found, (np.exp(log_p) * (log_p - log_q)).sum(axis=-1), rtol=1e-5)


@pytest.mark.parametrize("tokens", [7, 128, 300])
def test_mean_divergences_equal_numpy(rng, tokens):
    """More tokens than a chunk of the head, and another head than the reference's."""
    x, ref_x = rng.normal(size=(2, tokens, 8)), rng.normal(size=(tokens, 8))
    head, ref_head = rng.normal(size=(2, 33, 8))
    log_p = log_softmax(ref_x @ ref_head.T, axis=-1)
    expected = [mean_kl(log_p, log_softmax(variant @ head.T, axis=-1)) for variant in x]
    x, head, ref_x, ref_head = (jnp.asarray(a, jnp.float32) for a in (x, head, ref_x, ref_head))
    found = mean_divergences(x, Head(head), ref_x, Head(ref_head))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_masked_levels_have_no_cost(measure, untied, windows):
    found = measure(untied, windows, (7, *LEVELS))
    np.testing.assert_array_equal(found.kld[:, 0], 0)
    assert (found.kld[:, 1:] > 0).all()


def stopped_after(monkeypatch, batches):
    """From now on, measuring stops like a killed process before one more batch than `batches`."""
    original, count = exact._costs, itertools.count()

    def costs(*arguments):
        if next(count) == batches:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(exact, "_costs", costs)


@pytest.mark.parametrize("batches", [1, 2, 7])
def test_stopped_table_goes_on_to_the_same_bits(untied, windows, table, tmp_path, monkeypatch, batches):
    path = tmp_path / "table.npz"
    monkeypatch.setattr(exact, "_TOKENS_AT_ONCE", 11 * windows.size)
    whole = exact_sensitivity(untied, windows, LEVELS)
    with monkeypatch.context() as patched:
        stopped_after(patched, batches)
        with pytest.raises(KeyboardInterrupt):
            exact_sensitivity(untied, windows, LEVELS, path=path)
    with pytest.raises(ValueError, match=r"measuring .*table.npz was stopped; run launch/train.py"):
        Sensitivity.load(path)
    with monkeypatch.context() as patched:
        stopped_after(patched, 8 - batches)  # two batches for each of three layers, one each for embedding and head
        continued = exact_sensitivity(untied, windows, LEVELS, path=path)
    for found in (continued, Sensitivity.load(path)):
        np.testing.assert_array_equal(found.kld, whole.kld)
        np.testing.assert_array_equal(found.floor, whole.floor)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_finished_table_is_read_not_measured(measure, untied, windows, tmp_path, monkeypatch):
    path = tmp_path / "table.npz"
    first = measure(untied, windows, LEVELS, path=path)
    for module in (exact, fisher):
        monkeypatch.setattr(module, "embed", lambda *_: pytest.fail("measured again"))
    np.testing.assert_array_equal(measure(untied, windows, LEVELS, path=path).kld, first.kld)


def test_run_goes_on_with_its_table(untied, tmp_path, monkeypatch):
    config = RunConfig(sensitivity=WindowsConfig(context=24, count=3))
    whole, stopped = tmp_path / "whole.npz", tmp_path / "stopped.npz"
    expected = workflow.sensitivity(untied, config, whole, print)
    with monkeypatch.context() as patched:
        stopped_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            workflow.sensitivity(untied, config, stopped, print)
    np.testing.assert_array_equal(workflow.sensitivity(untied, config, stopped, print).kld, expected.kld)
    with pytest.raises(ValueError, match=r"\(changed: method\)"):
        workflow.sensitivity(untied, dataclasses.replace(config, sensitivity_method="fisher"), stopped, print)


def changed_inputs(untied, windows):
    """Name of the field → model, windows, levels, protocol of which only that differs."""
    other = tiny.changed(untied, "output_norm.weight", lambda w: w.at[3].add(1e-3))
    folded = dataclasses.replace(untied, folding={"blk.1.attn_in": jnp.ones(64)})
    return {
        "folded weights": (other, windows, LEVELS, "llama.cpp"),
        "folding": (folded, windows, LEVELS, "llama.cpp"),
        "windows": (untied, windows[:, ::-1], LEVELS, "llama.cpp"),
        "levels": (untied, windows, (4,), "llama.cpp"),
        "protocol": (untied, windows, LEVELS, "sliding"),
    }


@pytest.fixture(scope="module")
def saved(untied, windows, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "table.npz"
    fisher_sensitivity(untied, windows, LEVELS, path=path)
    return path


@pytest.mark.parametrize("field", ["folded weights", "folding", "windows", "levels", "protocol"])
def test_changed_input_is_named(untied, windows, saved, field):
    with pytest.raises(ValueError, match=rf"table.npz was measured with other inputs \(changed: {field}[,)]"):
        fisher_sensitivity(*changed_inputs(untied, windows)[field], path=saved)


def test_other_method_and_other_version_are_named(untied, windows, saved, monkeypatch):
    with pytest.raises(ValueError, match=r"\(changed: method\)"):
        exact_sensitivity(untied, windows, LEVELS, path=saved)
    monkeypatch.setattr("ramp_jax.sensitivity.table.VERSION", 10**6)
    with pytest.raises(ValueError, match=r"\(changed: code version\)"):
        fisher_sensitivity(untied, windows, LEVELS, path=saved)


@pytest.mark.parametrize("content", [b"", b"not an archive"])
def test_file_that_is_no_table(tmp_path, content):
    (tmp_path / "table.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"table.npz is not a sensitivity table of version 2 .*; delete what is there"):
        Sensitivity.load(tmp_path / "table.npz")


def archive(path, parts, how=zipfile.ZIP_STORED):
    """An archive of bytes by name."""
    with zipfile.ZipFile(path, "w", how) as file:
        for name, content in parts:
            file.writestr(name, content)


class Planted:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"kld": np.ones((2, 3))}, "kld and floor are no float64 of 2 tensors at 2 levels"),
        ({"kld": np.ones((2, 2), np.float32)}, "kld and floor are no float64 of 2 tensors at 2 levels"),
        ({"floor": np.ones(3)}, "kld and floor are no float64 of 2 tensors at 2 levels"),
        ({"kld": np.full((2, 2), np.inf)}, "kld or floor hold infinite or negative numbers"),
        ({"kld": np.full((2, 2), -1.0)}, "kld or floor hold infinite or negative numbers"),
        ({"floor": np.full(2, -1.0)}, "kld or floor hold infinite or negative numbers"),
        ({"levels": np.asarray([8, 4])}, r"levels is \[8, 4\], expected levels by increasing size"),
        ({"levels": np.asarray(4)}, "levels is 4, expected a list"),
        ({"tensors": np.asarray(["a", "a"])}, "expected different names, at least one"),
        ({"tensors": np.asarray([1, 2])}, "expected a list"),
        ({"seconds": np.asarray(np.nan)}, "seconds is nan, expected a finite number"),
        ({"inputs": np.asarray("[]")}, r"it is \[\], expected an object"),
        ({"inputs": np.asarray("[" * 10**5)}, "RecursionError"),
        ({"inputs": np.asarray(Planted(), object)}, "does not fill its part of the file|OBJECT"),
        ({"seconds": None}, "it lacks the field 'seconds'"),
        ({"more": np.ones(1)}, "it has 'more' twice, or in vain"),
    ],
)
def test_table_that_does_not_serve_is_refused(tmp_path, changed, cause):
    path = tmp_path / "table.npz"
    Sensitivity(("a", "b"), (4, 8), np.ones((2, 2)), np.zeros(2), 1.0, {"windows": "abc"}).save(path)
    with np.load(path) as saved:
        members = {name: saved[name] for name in saved.files} | changed
    with path.open("wb") as file:
        np.savez(file, **{name: value for name, value in members.items() if value is not None})
    with pytest.raises(
        ValueError, match=rf"table.npz is not a sensitivity table of version 2 \(.*({cause}).*\); delete"
    ):
        Sensitivity.load(path)


def test_archive_that_promises_more_than_it_holds(tmp_path):
    """Sizes are believed neither of the archive nor of an array, before anything of that size is made."""
    path = tmp_path / "table.npz"
    Sensitivity(("a",), (4, 8), np.ones((1, 2)), np.zeros(1)).save(path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    kld = parts["kld.npy"]
    for content, how, cause in (
        (kld.replace(b"(1, 2), }   ", b"(9999, 2), }"), zipfile.ZIP_STORED, "does not fill its part"),
        (kld + bytes(1 << 20), zipfile.ZIP_DEFLATED, "is not stored as NumPy does"),
    ):
        archive(path, (parts | {"kld.npy": content}).items(), how)
        with pytest.raises(ValueError, match=rf"is not a sensitivity table .*\(.*({cause})"):
            Sensitivity.load(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(path, [*parts.items(), ("kld.npy", kld)])
    with pytest.raises(ValueError, match="it has 'kld' twice"):
        Sensitivity.load(path)


def test_table_saved_and_loaded(tmp_path):
    kld, floor = np.array([[0.5, 0.25], [1e-9, 0.0]]), np.array([1e-12, 0.0])
    saved = Sensitivity(("a.weight", "blk.0.b.weight"), (4, 8), kld, floor, 2.5, {"windows": "abc"})
    saved.save(tmp_path / "table.npz")
    loaded = Sensitivity.load(tmp_path / "table.npz")
    assert (loaded.tensors, loaded.levels, loaded.seconds) == (saved.tensors, saved.levels, saved.seconds)
    assert loaded.inputs == saved.inputs
    assert all(isinstance(level, int) for level in loaded.levels)
    np.testing.assert_array_equal(loaded.kld, saved.kld)
    np.testing.assert_array_equal(loaded.floor, saved.floor)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_cost_that_is_not_finite_names_the_cell(measure, untied, windows):
    broken = tiny.changed(untied, "output_norm.weight", lambda w: w.at[3].set(np.nan))
    with pytest.raises(
        ValueError, match=r"what \S+ costs at level \d is not finite; load the model with dtype=float32"
    ):
        measure(broken, windows, LEVELS)


def test_gradients_go_through_sub_blocks_as_through_the_block(model, rng):
    """By the reverse pass of the whole block, and a change of a matrix moves what the block makes of it."""
    at = next(sweep.forward(model.spec, model.params, first=1))
    x, g = (jnp.asarray(rng.normal(size=(2, 9, 64)), jnp.float32) for _ in range(2))
    factors = {width: jnp.asarray(rng.normal(size=(1, width)), jnp.float32) for width in (64, 96)}
    members = {t.name: t for t in allocatable(model.spec)}

    def changes(tensor, w):
        return [fisher.Change(jnp.multiply, factors[w.shape[1]])]

    before, moves = fisher._through_block(at, x, g[None], changes, members)
    (expected,) = jax.vjp(lambda x: at.block(at.weights, x), x)[1](g)
    np.testing.assert_allclose(before[0], expected, atol=1e-4 * float(jnp.abs(expected).max()))
    assert moves.keys() == {f"blk.1.{name}.weight" for name in tiny.LINEARS}
    for name in tiny.LINEARS:
        w = at.weights[name]["weight"]

        def changed(step, name=name, w=w):
            return at.block({**at.weights, name: {"weight": w * (1 + step * factors[w.shape[1]])}}, x)

        _, moved = jax.jvp(changed, (jnp.float32(0),), (jnp.float32(1),))
        by_token = np.asarray(jnp.sum(g * moved, axis=-1)).ravel()
        if name.startswith("attn"):  # what follows carries on token by token
            by_token = by_token.sum()
        found = moves[f"blk.1.{name}.weight"][0, 0]
        np.testing.assert_allclose(found if np.ndim(by_token) else found.sum(), by_token, rtol=1e-3, atol=1e-2)


def test_probes_have_the_fisher_matrix_as_covariance(model, windows, monkeypatch):
    """δz of a changed head, in pieces of its rows: the mean of (r · δz)² over many probes is δzᵀ (diag p − p pᵀ) δz."""
    monkeypatch.setattr(fisher, "_NUMBERS_AT_ONCE", 100 * 4097 * 6)
    state = np.random.default_rng(1).normal(size=(1, 6, 64)).astype(np.float32)
    factor = jnp.asarray(np.random.default_rng(2).normal(size=(1, 64)), jnp.float32)
    change = fisher.Change(jnp.multiply, factor)
    _, moves = fisher._from_head(model, state, lambda tensor, w: [change], jax.random.key(0), 4096, 2)
    hidden = np.asarray(exact._run_from(model.spec, model.params, state[None], 3)[0, 0, 2:-1], np.float64)
    head = np.asarray(model.params.get("output", model.params["token_embd"])["weight"], np.float64)
    p, dz = np.exp(log_softmax(hidden @ head.T, axis=-1)), hidden @ (head * np.asarray(factor)).T
    expected = (p * dz**2).sum(axis=-1) - (p * dz).sum(axis=-1) ** 2
    np.testing.assert_allclose(np.square(moves[0, :, 2:-1]).mean(axis=0), expected, rtol=0.15)
    np.testing.assert_array_equal(moves[0][:, [0, 1, 5]], 0)


@pytest.mark.parametrize("protocol", ["sliding", "llama.cpp"])
def test_fisher_is_near_the_exact_table(model, windows, protocol):
    """Whole weights are small here only at high levels: 8 must agree in size, all in order."""
    found = fisher_sensitivity(model, windows, LEVELS, protocol)
    expected = exact_sensitivity(model, windows, LEVELS, protocol)
    assert (found.tensors, found.levels) == (expected.tensors, expected.levels)
    assert spearmanr(found.kld.ravel(), expected.kld.ravel()).statistic > 0.95
    assert 0.7 < np.median(found.kld[:, 2] / expected.kld[:, 2]) < 1.4


def test_matrices_that_no_block_can_hold_are_no_part_of_tables(odd, windows):
    """They are read on the way, unchanged."""
    found = fisher_sensitivity(odd, windows, LEVELS, "sliding")
    expected = exact_sensitivity(odd, windows, LEVELS, "sliding")
    assert found.tensors == expected.tensors == tuple(t.name for t in allocatable(odd.spec))
    assert len(found.tensors) in (20, 6)
    assert 0.7 < np.median(found.kld[:, 2] / expected.kld[:, 2]) < 1.4


def test_fisher_is_deterministic(untied, windows):
    first, second, other = (fisher_sensitivity(untied, windows, LEVELS, seed=seed).kld for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
