r"""Mistral-7B v0.3, grouped queries, no windows: files from 2.379 to 7.702 GB.

    python launch/train.py --config=configs/mistral_7b.py --workdir=runs/mistral-7b
    python launch/allocate.py --model=mistralai/Mistral-7B-v0.3 --source_policy=runs/mistral-7b \
        --budget_gb=3.9 --dtype=bfloat16 --context=2048 --count=16 \
        --data=hf:Salesforce/wikitext:wikitext-2-raw-v1:train --output=mistral-7b.json
    python launch/export_gguf.py --model=mistralai/Mistral-7B-v0.3 \
        --allocation=mistral-7b.json --output=mistral-7b.gguf

The paper carries its policy over to Mistral-7B, without saying which: --source_policy=runs/llama-2-7b does that here.
v0.3 was chosen since llama.cpp computes all of it; v0.1 has windows of 4,096 tokens, which it leaves out, and the same
matrices but for the vocabulary (--config.models="('mistralai/Mistral-7B-v0.1',)"). Rows hold every level. While it
measures, the weights lie in memory as loaded, folded, and folded in f32: about 8 bytes each, 58 GB. Not run here yet.
"""

from ml_collections import ConfigDict

from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig

TEXT = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"


def get_config() -> ConfigDict:
    """The run's config; every field can be set as --config.field=value."""
    config = RunConfig(
        models=("mistralai/Mistral-7B-v0.3",),
        dtype="bfloat16",
        levels=(2, 3, 4, 4.5, 5, 6, 8),
        calibration=WindowsConfig(TEXT, context=2048, count=16),
        sensitivity=WindowsConfig(TEXT, context=512, count=4),
        train=TrainConfig(iterations=120, sac=SacConfig(batch_size=256)),
    )
    return ConfigDict(as_dict(config))
