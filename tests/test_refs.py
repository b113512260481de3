"""Reference checkpoints: from text to directory, the names that find them, and what quantizing costs them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ramp_jax import data, pretrain
from ramp_jax.allocation import from_levels
from ramp_jax.config import as_dict, from_dict
from ramp_jax.models import allocatable, load_model, references, tensors
from ramp_jax.models.metadata import plain
from ramp_jax.models.spec import make_spec
from ramp_jax.pretrain import OptimizerConfig
from ramp_jax.quantization import fake_quantize
from ramp_jax.refs import make
from ramp_jax.refs.make import DecoderConfig, PretrainConfig, make_checkpoint
from ramp_jax.scoring.perplexity import evaluate

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("ref_*.py"))
TINY = PretrainConfig(
    DecoderConfig("gemma", 2, 64, 2, 1, 32, 64, context_length=48),
    data="stdlib:json,abc",
    vocab_size=300,
    context=32,
    optimizer=OptimizerConfig(steps=10, batch_size=4, warmup=2),
)


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Optax raises a float to an integer power, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of the tiny config: (workdir, output, held-out numbers)."""
    folder = tmp_path_factory.mktemp("refs")
    found = make_checkpoint(TINY, folder / "run", folder / "out", say=lambda _: None)
    return folder / "run", folder / "out", found


def test_checkpoint_is_a_model_with_its_tokenizer(made):
    _, output, found = made
    model = load_model(str(output))
    assert model.spec == make_spec(**as_dict(TINY.decoder), vocab_size=300)
    text = "def spam(eggs):\n    return 'Ünïcode' * 123\n"
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    assert plain(model.metadata)["tokenizer.ggml.pre"] == "smollm"
    windows = data.windows(TINY.data, model.tokenizer, context=32, count=128, split="heldout")
    assert found["heldout_tokens"] == windows.size
    assert found["heldout_nll"] == pytest.approx(evaluate(model, windows, protocol="sliding").nll.mean())
    assert found["heldout_nll"] < np.log(300) - 0.3
    assert 1 < found["bits_per_byte"] < 8


def test_run_leaves_its_record(made):
    workdir, _, found = made
    assert json.loads((workdir / make.RESULT).read_text()) == found
    rows = [json.loads(line) for line in (workdir / make.METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10]
    assert rows[1]["loss"] < rows[0]["loss"]


def test_made_again_it_is_the_same_to_the_byte(made, tmp_path):
    _, output, _ = made
    make_checkpoint(TINY, tmp_path / "run", tmp_path / "out", say=lambda _: None)
    names = sorted(path.name for path in output.iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (output / name).read_bytes(), name


def test_training_never_sees_held_out_text(made, monkeypatch, tmp_path):
    """Neither the tokenizer nor the weights: their text ends before the first held-out token."""
    seen = {}
    trainer = make.train_tokenizer

    def watch_tokenizer(text, size):
        seen["text"] = text
        return trainer(text, size)

    def watch_run(key, spec, config, windows, **_):
        seen["windows"] = windows
        raise KeyboardInterrupt

    monkeypatch.setattr(make, "train_tokenizer", watch_tokenizer)
    monkeypatch.setattr(pretrain, "run", watch_run)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(TINY, tmp_path / "run", tmp_path / "out", say=lambda _: None)
    tokenizer = load_model(str(made[1])).tokenizer
    first = data.windows(TINY.data, tokenizer, context=32, count=None, split="heldout")[0]
    whole = data.read_text(TINY.data)
    begin = whole.index(tokenizer.decode(first))
    assert whole.startswith(seen["text"])
    assert len(seen["text"]) < begin
    trained = tokenizer.decode(seen["windows"].reshape(-1))
    assert whole.startswith(trained)
    assert 0.7 * len(whole) < len(trained) <= begin


def test_run_of_another_config_or_output_is_refused(made, tmp_path):
    workdir, output, _ = made
    with pytest.raises(FileExistsError, match=r"out exists already; delete it or choose another --output"):
        make_checkpoint(TINY, workdir, output)
    other = dataclasses.replace(TINY, seed=1)
    with pytest.raises(ValueError, match=r"holds a run with another seed; choose another --workdir"):
        make_checkpoint(other, workdir, tmp_path / "out")


def test_text_with_too_few_pairs_for_the_vocabulary():
    with pytest.raises(ValueError, match=r"the text gives \d+ tokens and 2048 were asked for"):
        make.train_tokenizer("few words " * 50, 2048)


def test_level_table_is_what_uniform_allocations_cost(made):
    model = load_model(str(made[1]))
    windows = data.windows(TINY.data, model.tokenizer, context=32, count=4, split="heldout")
    rows = make.level_table(model, windows)
    assert [row["level"] for row in rows] == [4, 5, 6, 8]  # rows of 64 and 32: no superblocks of 256
    members = allocatable(model.spec)
    params = fake_quantize(model, from_levels(model, [4] * len(members)))
    expected = evaluate(model, windows, params=params, reference=model, protocol="sliding")
    assert rows[0]["nll"] == pytest.approx(expected.nll.mean(), rel=1e-5)
    assert rows[0]["delta_nll"] == pytest.approx((expected.nll - expected.ref_nll).mean(), abs=1e-5)
    assert rows[0]["kld"] == pytest.approx(expected.mean_kld, rel=1e-3)
    assert rows[0]["kld"] > 10 * rows[-1]["kld"] > 0
    lines = make.text_table(rows).splitlines()
    assert len(lines) == 5
    assert f"{rows[0]['kld']:.4f}" in lines[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_describe_models_that_every_level_fits(path):
    values = {}
    exec(compile(path.read_text(), path, "exec"), values)
    config = from_dict(values["get_config"]().to_dict(), PretrainConfig)
    spec = make_spec(**as_dict(config.decoder), vocab_size=config.vocab_size)
    assert all(t.shape[-1] % 256 == 0 for t in allocatable(spec))
    assert config.context <= spec.context_length
    millions = sum(t.size for t in tensors(spec)) / 1e6
    assert f"{millions:.1f} million parameters" in values["__doc__"]
    name = path.stem.replace("_", "-")
    assert f"--config=configs/{path.name} --output=runs/{name}" in values["__doc__"]
    assert name in references._CHECKPOINTS


def test_shipped_checkpoints_are_small_and_run():
    folders = [path for path in references._SHIPPED.iterdir() if (path / "config.json").is_file()]
    assert folders
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) <= 16e6
    for folder in folders:
        model = load_model(folder.name)
        windows = data.windows("builtin", model.tokenizer, context=256, count=2, split="heldout")
        assert evaluate(model, windows).nll.mean() < np.log(model.spec.vocab_size) - 2
        assert len(model.tokenizer) == model.spec.vocab_size


def test_checkpoint_that_is_rebuilt_is_found_or_says_how(made, tmp_path, monkeypatch):
    monkeypatch.setattr(references, "_SHIPPED", tmp_path / "nothing")
    monkeypatch.setenv("RAMP_REFS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"make it with `python launch/pretrain\.py --config=.*ref_qwen3\.py"):
        load_model("ref-qwen3")
    (tmp_path / "ref-qwen3").symlink_to(made[1])
    assert load_model("ref-qwen3").spec.architecture == "gemma"
