"""Numbers of an evaluation against llama-perplexity's own formulas, both protocols against transformers and llama.cpp,
and one sentence for every model or text that cannot be scored."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from scipy.special import log_softmax, softmax

import ramp_jax
from ramp_jax import data
from ramp_jax.allocation import Allocation, from_levels
from ramp_jax.checkpoint import digest
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.models import load_model
from ramp_jax.models.decoder import Head
from ramp_jax.models.load import read_description
from ramp_jax.models.metadata import plain
from ramp_jax.quantization import fake_quantize
from ramp_jax.scoring.perplexity import evaluate, head_scores, reference_of
from ramp_jax.scoring.scores import Evaluation, numbers, text_table

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PROTOCOLS = ("sliding", "llama.cpp")
SHORT = {"context": 24, "count": 2}


@pytest.fixture(scope="module")
def quantized(untied):
    return dataclasses.replace(untied, params=fake_quantize(untied, from_levels(untied, [4] * 23)))


@pytest.fixture(scope="module")
def exported(untied, tmp_path_factory):
    """The untied model as an F32 GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    export_gguf(untied, Allocation(untied.spec, untied.metadata, dict.fromkeys(names(untied), "F32")), path)
    return path


def names(model):
    return from_levels(model, [8] * 23).formats


def as_llama_perplexity(nll, base, kld, same):
    """The statistics by the sums that llama.cpp's tools/perplexity/perplexity.cpp keeps."""
    count = len(nll)

    def mean_and_error(values):
        mean = sum(values) / count
        return mean, math.sqrt((sum(v * v for v in values) / count - mean**2) / (count - 1))

    log_ppl, log_base = mean_and_error(nll), mean_and_error(base)
    covariance = (sum(nll * base) / count - sum(nll) * sum(base) / count**2) / (count - 1)
    delta_p = np.exp(-nll) - np.exp(-base)
    mse, mse_error = mean_and_error(delta_p**2)
    ratio_error = math.sqrt(log_ppl[1] ** 2 + log_base[1] ** 2 - 2 * covariance)
    top = sum(same) / count
    values = {
        "ppl": (math.exp(log_ppl[0]), math.exp(log_ppl[0]) * log_ppl[1]),
        "reference_ppl": (math.exp(log_base[0]), math.exp(log_base[0]) * log_base[1]),
        "delta_nll": (log_ppl[0] - log_base[0], ratio_error),
        "kld": mean_and_error(kld),
        "delta_p": tuple(100 * v for v in mean_and_error(delta_p)),
        "rms_delta_p": (100 * math.sqrt(mse), 100 * 0.5 / math.sqrt(mse) * mse_error),
        "same_top": (top, math.sqrt(top * (1 - top) / (count - 1))),
    }
    return {name: pair[0] for name, pair in values.items()} | {f"{n}_stderr": p[1] for n, p in values.items()}


def test_numbers_are_llama_perplexity_s(rng):
    base = rng.gamma(2.0, 1.0, 200)
    nll = base + rng.normal(0.05, 0.2, 200)
    kld, same = rng.gamma(0.5, 0.1, 200), rng.random(200) < 0.9
    found = numbers(Evaluation(nll, kld, base, same))
    for name, expected in as_llama_perplexity(nll, base, kld, same).items():
        assert found[name] == pytest.approx(expected, rel=1e-9), name
    ordered = np.sort(kld)
    assert list(found["kld_percentiles"]) == (
        ["maximum", "99.9%", "99.0%", "95.0%", "90.0%", "median", "10.0%", "5.0%", "1.0%", "0.1%", "minimum"]
    )
    assert found["kld_percentiles"]["maximum"] == ordered[-1]
    assert found["kld_percentiles"]["99.0%"] == pytest.approx(0.99 * ordered[197] + 0.01 * ordered[198])
    assert found["kld_percentiles"]["median"] == pytest.approx((ordered[99] + ordered[100]) / 2)
    assert found["kld_percentiles"]["minimum"] == ordered[0]


def test_table_holds_every_number(rng):
    nll = rng.gamma(2.0, 1.0, 2000)
    found = numbers(Evaluation(nll, nll / 50, nll - 0.01, nll < 3))
    table = text_table(found)
    for shown in (
        f"2,000\nperplexity {' ' * 21}{found['ppl']:10.4f} ± {found['ppl_stderr']:.4f}\n",
        f"{found['kld']:.6f} ± {found['kld_stderr']:.6f}",
        f"KL divergence, 99.9% {' ' * 11}{found['kld_percentiles']['99.9%']:10.6f}",
        f"{found['rms_delta_p']:.3f} ± {found['rms_delta_p_stderr']:.3f} %",
        f"{100 * found['same_top']:.3f}% ± {100 * found['same_top_stderr']:.3f}%",
    ):
        assert shown in table
    assert len(text_table(numbers(Evaluation(nll))).splitlines()) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_losses_equal_transformers(tied_directory, untied_directory, windows, protocol):
    """Every scored token of both tiny models in torch."""
    start = 0 if protocol == "sliding" else 12
    for is_tied, directory in ((True, tied_directory), (False, untied_directory)):
        ours = evaluate(load_model(str(directory)), windows, protocol=protocol)
        with torch.no_grad():
            logits = tiny.hf_model(is_tied)(torch.from_numpy(windows).long()).logits.numpy().astype(np.float64)
        picked = np.take_along_axis(log_softmax(logits[:, start:-1], axis=-1), windows[:, start + 1 :, None], axis=-1)
        np.testing.assert_allclose(ours.nll, -picked.reshape(-1), atol=1e-4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tokens_beside_the_reference_equal_numpy(untied, quantized, windows, protocol):
    start = 0 if protocol == "sliding" else 12
    result = evaluate(quantized, windows, reference=untied, protocol=protocol)
    logits = [np.asarray(m.logits(windows), np.float64)[:, start:-1] for m in (quantized, untied)]
    same = logits[0].argmax(-1) == logits[1].argmax(-1)
    assert 0.2 < same.mean() < 1
    np.testing.assert_array_equal(result.same_top, same.reshape(-1))
    p, p_ref = (np.take_along_axis(softmax(x, -1), windows[:, start + 1 :, None], -1).reshape(-1) for x in logits)
    np.testing.assert_allclose(result.ref_nll, -np.log(p_ref), atol=1e-4)
    assert numbers(result)["rms_delta_p"] == pytest.approx(100 * math.sqrt(np.mean((p - p_ref) ** 2)), rel=1e-3)


def test_reference_that_runs_window_by_window_equals_one_that_ran_before(untied, quantized, windows):
    streamed = evaluate(quantized, windows, reference=untied)
    kept = evaluate(quantized, windows, reference=reference_of(untied, windows))
    jax.tree.map(np.testing.assert_array_equal, vars(streamed), vars(kept))


def test_numbers_of_the_reference_itself(untied, windows):
    found = numbers(evaluate(untied, windows, reference=reference_of(untied, windows)))
    assert (found["delta_nll"], found["kld"], found["rms_delta_p"], found["same_top"]) == (0, 0, 0, 1)
    assert found["ppl"] == pytest.approx(evaluate(untied, windows).ppl, rel=1e-6)


def test_one_chunk_of_logits_at_a_time():
    """No array with the vocabulary as its first axis has more columns than a chunk."""
    x, head, ids = jnp.zeros((1000, 8)), Head(jnp.zeros((777, 8))), jnp.zeros(1000, jnp.int32)
    program = str(jax.make_jaxpr(head_scores)(x, head, ids, x, head))
    columns = {int(found) for found in re.findall(r"\[777,(\d+)\]", program)}
    assert max(columns) == 128


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_llama_cpp_gives_the_same_numbers(untied, quantized, windows, exported, protocol):
    """Of one file beside one reference, run here and there."""
    ours, theirs = (
        numbers(score)
        for score in (
            evaluate(load_model(str(exported)), windows, reference=quantized, protocol=protocol),
            evaluate_gguf(exported, windows, reference=quantized, protocol=protocol),
        )
    )
    assert ours.keys() == theirs.keys()
    assert theirs["tokens"] == ours["tokens"]
    for name in ("ppl", "ppl_stderr", "reference_ppl", "kld", "kld_stderr", "rms_delta_p", "rms_delta_p_stderr"):
        assert theirs[name] == pytest.approx(ours[name], rel=0.01), name
    for name, value in ours["kld_percentiles"].items():
        assert theirs["kld_percentiles"][name] == pytest.approx(value, rel=0.02, abs=2e-3), name
    assert theirs["same_top"] == ours["same_top"]
    assert theirs["delta_nll"] == pytest.approx(ours["delta_nll"], abs=2e-3)


def test_from_python(untied, exported, untied_directory):
    """A file beside a loaded model, as the README shows; llama.cpp and JAX, and all windows by default."""
    found = ramp_jax.evaluate(str(exported), reference=untied, data="builtin", **SHORT)
    assert found["kld"] < 1e-6
    assert found["same_top"] == 1
    assert (found["tokens"], found["split"], found["backend"]) == (2 * 11, "heldout", "jax")
    there = ramp_jax.evaluate(exported, reference=untied_directory, backend="llama.cpp", **SHORT)
    assert there.keys() == found.keys()
    assert there["ppl"] == pytest.approx(found["ppl"], rel=1e-3)
    every = ramp_jax.evaluate(untied, context=256, protocol="sliding", data="builtin", split="heldout", count=None)
    tokens = len(untied.tokenizer.encode(data.read_text("builtin"), add_special_tokens=False))
    assert every["windows"] == (tokens - int(0.8 * tokens)) // 256
    assert every["tokens"] == every["windows"] * 255


def test_tokenizer_without_its_model(untied, exported):
    text = "Assert statements, 1,234 of them"
    metadata, tokenizer = read_description(exported)
    assert tokenizer.encode(text) == untied.tokenizer.encode(text)
    assert metadata.keys() > untied.metadata.keys()
    assert plain(metadata)["general.architecture"] == "llama"


def test_text_that_the_allocation_was_calibrated_on(untied, tmp_path):
    """Under any name of it, by an allocation and by the exported file."""
    path, exported, copy = tmp_path / "alloc.json", tmp_path / "out.gguf", tmp_path / "copy.txt"
    copy.write_text(data.read_text("builtin") + "\n", encoding="utf-8")
    known = {"text": data.fingerprint("builtin"), "tokens": digest(np.zeros(1))}
    allocation = from_levels(untied, [4] * 23)
    calibrated = dataclasses.replace(allocation, calibration={"data": "builtin", "context": 24, "count": 2, **known})
    calibrated.save(path)
    for source in ("builtin", str(copy)):
        sentence = f"alloc.json was calibrated on the first four fifths of '{source}'; score it with --split=hel"
        with pytest.raises(ValueError, match=sentence):
            ramp_jax.evaluate(untied, allocation=path, data=source, split="all", **SHORT)
    assert ramp_jax.evaluate(untied, allocation=path, reference=untied, **SHORT)["kld"] > 0.01
    export_gguf(untied, calibrated, exported)
    for backend in ("jax", "llama.cpp"):
        with pytest.raises(ValueError, match="the file was calibrated on the first four fifths of"):
            ramp_jax.evaluate(exported, data=str(copy), split="all", backend=backend, **SHORT)
    assert ramp_jax.evaluate(exported, reference=untied, **SHORT)["kld"] > 0.01
    export_gguf(untied, allocation, exported)
    assert ramp_jax.evaluate(exported, reference=untied, split="all", **SHORT)["kld"] > 0.01


def test_windows_longer_than_the_model_reads(untied):
    with pytest.raises(ValueError, match="windows of 2048 tokens are longer than the 256 that the model was made for"):
        ramp_jax.evaluate(untied, protocol="sliding")


def test_llama_cpp_needs_a_file_of_its_own(untied, tmp_path):
    with pytest.raises(ValueError, match=r"llama.cpp scores a .gguf; make one with launch/export_gguf.py"):
        ramp_jax.evaluate(untied, backend="llama.cpp")


def damaged(w):
    return w.at[(0,) * w.ndim].set(jnp.nan)


def huge(w):
    return w * 1e38


BROKEN = {
    "layer": ("blk.1.attn_v.weight", damaged, r"in the weights of blk\.1\.attn_v\.weight, which are damaged"),
    "overflow": ("blk.2.ffn_up.weight", huge, r"in the output of layer blk\.2, although"),
    "norm": ("output_norm.weight", damaged, r"in the weights of output_norm\.weight"),
    "head": ("output.weight", damaged, r"in the weights of output\.weight"),
    "head overflow": ("output.weight", huge, "in the output of the head, output"),
    "embedding": ("token_embd.weight", lambda w: w * jnp.nan, r"in the weights of token_embd\.weight"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_loss_that_is_not_finite_says_where_it_began(untied, windows, kind):
    name, change, sentence = BROKEN[kind]
    broken = tiny.changed(untied, name, change)
    with pytest.raises(ValueError, match=rf"the loss of window 0 is not finite, first {sentence}"):
        evaluate(broken, windows)
    if kind != "head overflow":
        with pytest.raises(
            ValueError, match=rf"what the reference predicts in window 0 is not finite, first {sentence}"
        ):
            evaluate(untied, windows, reference=broken)


def test_file_whose_loss_llama_cpp_finds_not_finite(untied, tmp_path, windows):
    broken = tiny.changed(untied, "output.weight", huge)
    path = tmp_path / "a.gguf"
    export_gguf(broken, Allocation(untied.spec, untied.metadata, dict.fromkeys(names(untied), "F32")), path)
    with pytest.raises(ValueError, match=r"llama.cpp's loss of window 0 is not finite; score .*a\.gguf with --backend"):
        evaluate_gguf(path, windows)


@pytest.mark.parametrize("token", [320, -1])
def test_tokens_outside_of_the_vocabulary(untied, windows, exported, token):
    foreign = windows.copy()
    foreign[1, 3] = token
    sentence = f"holds token {token}, the model's vocabulary ends at 319; the tokenizer belongs to another model"
    for score in (
        lambda: evaluate(untied, foreign),
        lambda: reference_of(untied, foreign),
        lambda: evaluate_gguf(exported, foreign),
    ):
        with pytest.raises(ValueError, match=sentence):
            score()


def test_reference_with_another_vocabulary(untied, windows):
    larger = tiny.changed(untied, "output.weight", lambda w: jnp.concatenate([w, w[:5]]))
    with pytest.raises(ValueError, match="the reference predicts 325 tokens and the model 320; compare models of one"):
        evaluate(untied, windows, reference=larger)


def test_tokenizer_larger_than_the_vocabulary(untied, untied_directory, tmp_path):
    for file in untied_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    larger = tiny.builtin_tokenizer()
    larger.add_tokens([f"<extra {i}>" for i in range(100)])
    larger.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"its tokenizer has {len(larger)} tokens, the model a vocabulary of 320; put"
    ):
        load_model(str(tmp_path))
