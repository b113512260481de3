r"""Qwen2.5-1.5B, biases of q, k and v and a tied embedding: files from 0.507 to 1.641 GB.

    python launch/train.py --config=configs/qwen2_5_1_5b.py --workdir=runs/qwen2.5-1.5b
    python launch/allocate.py --model=Qwen/Qwen2.5-1.5B --source_policy=runs/qwen2.5-1.5b \
        --budget_gb=0.85 --dtype=bfloat16 --context=2048 --count=16 \
        --data=hf:Salesforce/wikitext:wikitext-2-raw-v1:train --output=qwen2.5-1.5b.json
    python launch/export_gguf.py --model=Qwen/Qwen2.5-1.5B \
        --allocation=qwen2.5-1.5b.json --output=qwen2.5-1.5b.gguf

Its vocabulary adds 6 MB. Rows are of 1,536 and 8,960 weights, which superblocks of 256 divide: they hold every level.
Not run here yet.
"""

from ml_collections import ConfigDict

from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig

TEXT = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"


def get_config() -> ConfigDict:
    """The run's config; every field can be set as --config.field=value."""
    config = RunConfig(
        models=("Qwen/Qwen2.5-1.5B",),
        dtype="bfloat16",
        levels=(2, 3, 4, 4.5, 5, 6, 8),
        calibration=WindowsConfig(TEXT, context=2048, count=16),
        sensitivity=WindowsConfig(TEXT, context=512, count=4),
        train=TrainConfig(iterations=120, sac=SacConfig(batch_size=256)),
    )
    return ConfigDict(as_dict(config))
