"""The policy that comes with the package: trained on the three reference checkpoints, for models that it never saw.

    python launch/pretrain.py --config=configs/ref_gemma.py --output=runs/ref-gemma    # and ref_qwen3; ref-llama ships
    python launch/train.py --config=configs/pretrained.py --workdir=runs/pretrained

Half of the episodes lack the lowest levels, as models do whose rows no superblock divides, and half lack any, as where
other formats are offered. Longer training serves the reference checkpoints better and others worse: 80 iterations did
best on the one that was left out (WORKSPACE_NOTES.md).
"""

from ml_collections import ConfigDict

from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.formats import DEFAULT_LEVELS
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig


def get_config() -> ConfigDict:
    """The run's config; every field can be set as --config.field=value."""
    config = RunConfig(
        models=("ref-llama", "ref-gemma", "ref-qwen3"),
        dtype="float32",
        levels=DEFAULT_LEVELS,
        fold_level=4.5,
        calibration=WindowsConfig(count=4),
        sensitivity=WindowsConfig(context=128, count=4),
        train=TrainConfig(iterations=80, narrowed=0.5, thinned=0.5, shift=0.5, sac=SacConfig(batch_size=256)),
    )
    return ConfigDict(as_dict(config))
