"""ref-llama: 8 layers of width 256 with grouped queries and a tied embedding, 6.8 million parameters.

python launch/pretrain.py --config=configs/ref_llama.py --output=runs/ref-llama
"""

from ml_collections import ConfigDict

from ramp_jax.config import as_dict
from ramp_jax.pretrain import OptimizerConfig
from ramp_jax.refs.make import DecoderConfig, PretrainConfig


def get_config() -> ConfigDict:
    """The checkpoint's config; every field can be set as --config.field=value."""
    config = PretrainConfig(decoder=DecoderConfig(), optimizer=OptimizerConfig(steps=600, batch_size=4))
    return ConfigDict(as_dict(config))
