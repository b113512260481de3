"""ref-qwen3: 6 layers of width 512 with norms of queries and keys and a head of its own, 13.9 million parameters.

python launch/pretrain.py --config=configs/ref_qwen3.py --output=runs/ref-qwen3
"""

from ml_collections import ConfigDict

from ramp_jax.config import as_dict
from ramp_jax.pretrain import OptimizerConfig
from ramp_jax.refs.make import DecoderConfig, PretrainConfig


def get_config() -> ConfigDict:
    """The checkpoint's config; every field can be set as --config.field=value."""
    decoder = DecoderConfig(
        model_type="qwen3", n_layers=6, d_model=512, n_heads=8, n_kv_heads=4, head_size=64, d_ff=768, tied=False
    )
    config = PretrainConfig(
        decoder, optimizer=OptimizerConfig(steps=250, batch_size=2, learning_rate=2e-3, warmup=25, embedding_std=0.1)
    )
    return ConfigDict(as_dict(config))
