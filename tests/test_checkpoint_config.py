"""Checkpoints, and run configs as dictionaries."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ramp_jax import checkpoint
from ramp_jax.config import RunConfig, WindowsConfig, as_dict, from_dict, read_config
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig
from ramp_jax.refs.make import PretrainConfig


class State(NamedTuple):
    """A little of everything that a run consists of."""

    weights: dict
    keys: jax.Array
    count: jax.Array
    name: str
    share: float


def state(rng, seed=0):
    weights = {"a": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32), "b": [jnp.asarray([1.5], jnp.bfloat16)]}
    keys = jax.random.split(jax.random.key(seed), 2)
    return State(weights, keys, jnp.int32(7), "adam", 0.25)


def test_checkpoint_comes_back_bit_for_bit(tmp_path, rng):
    saved = state(rng)
    checkpoint.save(tmp_path / "state", saved)
    loaded = checkpoint.load(tmp_path / "state", state(rng, seed=9)._replace(name="", share=0.0))
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    for old, new in zip(jax.tree.leaves(saved), jax.tree.leaves(loaded), strict=True):
        assert type(old) is type(new)
        if isinstance(old, jax.Array):
            assert old.dtype == new.dtype
    np.testing.assert_array_equal(loaded.weights["a"], saved.weights["a"])
    np.testing.assert_array_equal(loaded.weights["b"][0], saved.weights["b"][0])
    assert (loaded.count, loaded.name, loaded.share) == (7, "adam", 0.25)
    np.testing.assert_array_equal(jax.random.key_data(loaded.keys), jax.random.key_data(saved.keys))
    np.testing.assert_array_equal(jax.random.normal(loaded.keys[1], 3), jax.random.normal(saved.keys[1], 3))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_checkpoint_of_another_structure_is_refused(tmp_path, rng):
    saved = state(rng)
    checkpoint.save(tmp_path / "state", saved)
    others = [
        saved._replace(weights={"a": saved.weights["a"]}),
        saved._replace(weights=saved.weights | {"a": jnp.zeros((3, 2))}),
        saved._replace(count=jnp.float32(7)),
        saved._replace(keys=saved.keys[0]),
    ]
    for other in others:
        with pytest.raises(ValueError, match="is not a checkpoint of this run"):
            checkpoint.load(tmp_path / "state", other)


def test_damaged_checkpoint_is_refused(tmp_path, rng):
    checkpoint.save(tmp_path / "state", state(rng))
    content = (tmp_path / "state").read_bytes()
    for damaged in (b"", content[:-9], b"not msgpack"):
        (tmp_path / "state").write_bytes(damaged)
        with pytest.raises(ValueError, match="delete it to start afresh"):
            checkpoint.load(tmp_path / "state", state(rng))


def test_missing_checkpoint(tmp_path, rng):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "state", state(rng))


CONFIG = RunConfig(
    models=("somewhere",),
    seed=3,
    levels=(3, 4),
    calibration=WindowsConfig("text.txt", 64, 2),
    train=TrainConfig(iterations=7, sac=SacConfig(hidden=(5, 6, 7), learning_rate=0.5)),
)


@pytest.mark.parametrize("config", [RunConfig(), CONFIG])
def test_config_comes_back(config):
    """Through Python, through JSON (where tuples are lists) and through what `configs/` returns."""
    assert from_dict(as_dict(config)) == config
    assert from_dict(json.loads(json.dumps(as_dict(config)))) == config
    assert from_dict(ConfigDict(as_dict(config)).to_dict()) == config
    hash(from_dict(json.loads(json.dumps(as_dict(config)))))


def test_missing_fields_keep_their_defaults():
    config = from_dict({"seed": 4, "train": {"sac": {"hidden": [9]}}, "sensitivity": {"count": 1}})
    assert config == dataclasses.replace(
        RunConfig(),
        seed=4,
        train=TrainConfig(sac=SacConfig(hidden=(9,))),
        sensitivity=WindowsConfig(count=1),
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sed": 1}, "it has no field 'sed', the nearest is 'seed'"),
        ({"train": {"sac": {"lr": 1}}}, "train.sac has no field 'lr', there are hidden, learning_rate, "),
        ({"calibration": {"n": 1}}, "calibration has no field 'n', there are data, context, count"),
        ({"train": {"evaluator": "oracle"}}, "train.evaluator is 'oracle', expected surrogate or perplexity or mixed"),
        ({"sensitivity_method": "guess"}, "sensitivity_method is 'guess', expected exact or fisher"),
        ({"dtype": "int8"}, "dtype is 'int8', expected auto or stored or float32 or bfloat16 or float16"),
        ({"models": []}, "models is \\[\\], expected at least one model, none of them twice"),
        ({"models": ["a/x", "b/x"]}, "expected at least one model, none of them twice"),
        ({"models": "abc"}, "models is 'abc', expected a list"),
        (
            {"levels": [5, 4]},
            r"levels is \[5, 4\], expected levels by increasing size among 2, 3, 4, 4.5, 5, 6, 8, Q4_0",
        ),
        ({"levels": [4, 7]}, "expected levels by increasing size among"),
        ({"levels": []}, "expected levels by increasing size among"),
        ({"levels": [4, "5"]}, r"levels is \[4, '5'\], expected levels by increasing size"),
        ({"levels": [4, True]}, r"levels\[1\] is True, expected a finite number or a text"),
        ({"fold_level": 10**400}, r"fold_level is 1000*\.\.\.0*, expected a finite number"),
        ({"seed": True}, "seed is True, expected a whole number"),
        ({"seed": -1}, "seed is -1, expected a number from 0 to 2,147,483,647"),
        ({"calibration": 3}, "calibration is 3, expected an object"),
        ({"calibration": {"count": 0}}, "calibration.count is 0, expected a number from 1 to"),
        ({"calibration": {"data": "a\x1b[2J"}}, "calibration.data is .* expected a text that can be printed"),
        ({"train": {"shift": float("nan")}}, "train.shift is nan, expected a finite number"),
        ({"train": {"sac": {"learning_rate": 0}}}, "train.sac.learning_rate is 0, expected a finite number above 0"),
        ({"train": {"sac": {"hidden": [0]}}}, r"train.sac.hidden\[0\] is 0, expected a number from 1 to 65,536"),
        ({"train": {"narrowed": 1.5}}, "train.narrowed is 1.5, expected a number from 0 to 1"),
        ({"train": {"soft": 1}}, "train.soft is 1, expected true or false"),
        ({1: 1}, "it has no field 1"),
    ],
)
def test_field_that_does_not_serve_is_named(values, sentence):
    with pytest.raises(ValueError, match=f"^the config does not serve: .*{sentence}.*; change it there or with --conf"):
        from_dict(values)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"[" * 100_000, "RecursionError: maximum recursion depth exceeded"),
        (b"\xff{}", "'utf-8' codec can't decode byte 0xff"),
        (b'{"seed": NaN}', "NaN is no number of JSON"),
        (b'{"seed": 1, "seed": 2}', "'seed' is there twice"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"seed": 1e999}', "seed is inf, expected a whole number"),
        (b"null", "it is None, expected an object"),
        (b"", "Expecting value"),
    ],
)
def test_config_of_a_run_that_is_damaged(tmp_path, content, cause):
    (tmp_path / "config.json").write_bytes(content)
    sentence = rf"config.json is not the config of a run \({cause}.*\); choose another --workdir, or delete it and"
    with pytest.raises(ValueError, match=sentence):
        read_config(tmp_path / "config.json")


def test_every_config_of_the_project_comes_in():
    for path in (Path(__file__).parent.parent / "configs").glob("*.py"):
        values = runpy.run_path(str(path))["get_config"]().to_dict()
        cls = PretrainConfig if "decoder" in values else RunConfig
        assert as_dict(from_dict(values, cls)) == values


def test_levels_as_a_command_line_has_them():
    """One text where a name is among them, which ml_collections leaves as it is; numbers alone it parses."""
    for given in ("4,IQ3_S,5", ("4,IQ3_S,5",), ("IQ3_S", 4, 5)):
        assert from_dict({"levels": given}).levels == ("IQ3_S", 4, 5)
    with pytest.raises(ValueError, match=r"does not serve: 'Q9' is no level; choose among 2, 3, 4, .*IQ3_S; change it"):
        from_dict({"levels": ("4,Q9",)})
