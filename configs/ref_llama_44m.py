"""ref-llama-44m: 8 layers of width 768, 44.1 million parameters, for an accelerator (minutes on one, a day on a CPU).

It wants more text than `stdlib`: the source of well-known packages after it, 45 MB in all, as `text.txt` in the current
folder or where --data says (WORKSPACE_NOTES.md has the command that makes it).

python launch/pretrain.py --config=configs/ref_llama_44m.py --output=runs/ref-llama-44m
"""

from ml_collections import ConfigDict

from ramp_jax.config import as_dict
from ramp_jax.pretrain import OptimizerConfig
from ramp_jax.refs.make import DecoderConfig, PretrainConfig


def get_config() -> ConfigDict:
    """The checkpoint's config; every field can be set as --config.field=value."""
    decoder = DecoderConfig(n_layers=8, d_model=768, n_heads=12, n_kv_heads=4, d_ff=1536)
    optimizer = OptimizerConfig(
        steps=3000, batch_size=32, learning_rate=1.5e-3, warmup=150, steps_per_call=50, calls_per_checkpoint=20
    )
    return ConfigDict(as_dict(PretrainConfig(decoder, data="text.txt", vocab_size=4096, optimizer=optimizer)))
