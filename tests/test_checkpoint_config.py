"""Checkpoints, and run configs as dictionaries."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ramp_jax import checkpoint
from ramp_jax.config import RunConfig, WindowsConfig, as_dict, from_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig


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
    ("values", "name"), [({"sed": 1}, "sed"), ({"train": {"sac": {"lr": 1}}}, "lr"), ({"calibration": {"n": 1}}, "n")]
)
def test_unknown_field_is_named(values, name):
    with pytest.raises(ValueError, match=f"the config has no '{name}'; it has "):
        from_dict(values)


def test_unknown_evaluator_is_named():
    with pytest.raises(ValueError, match="evaluator is 'oracle'; choose surrogate, perplexity, mixed"):
        from_dict({"train": {"evaluator": "oracle"}})


def test_unknown_sensitivity_method_is_named():
    with pytest.raises(ValueError, match="sensitivity_method is 'guess'; choose exact or fisher"):
        from_dict({"sensitivity_method": "guess"})
