"""ref-gemma: 6 layers of width 256 with one key/value head, GELU and a tied, scaled embedding, 6.4 million parameters.

python launch/pretrain.py --config=configs/ref_gemma.py --output=runs/ref-gemma
"""

from ml_collections import ConfigDict

from ramp_jax.config import as_dict
from ramp_jax.pretrain import OptimizerConfig
from ramp_jax.refs.make import DecoderConfig, PretrainConfig


def get_config() -> ConfigDict:
    """The checkpoint's config; every field can be set as --config.field=value."""
    decoder = DecoderConfig(
        model_type="gemma", n_layers=6, d_model=256, n_heads=2, n_kv_heads=1, head_size=128, d_ff=1024, tied=True
    )
    config = PretrainConfig(decoder, optimizer=OptimizerConfig(steps=450, batch_size=4))
    return ConfigDict(as_dict(config))
